"""Runs a command that dies with its parent: `python -I -S tether.py PARENT_PID COMMAND...`.

Owns: nothing but that bond. Must not know: what is run. Standard library only, so that it starts in milliseconds.

The kernel sends SIGKILL to this process when its parent ends, however that ends (prctl PR_SET_PDEATHSIG, which exec
keeps). The bond is made after the fork, by the child itself, so that the parent may have threads. A parent that ended
before it was made is noticed by the changed parent id. Elsewhere than on Linux the command runs without the bond.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - the very point


if __name__ == "__main__":
    main()
