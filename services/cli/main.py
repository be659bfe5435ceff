"""The `outrider` command's entry.

Owns: what Ctrl-C does while the commands are still being imported, which takes half a second: end quietly.
Must not know: the commands. Imports nothing that is slow.
"""

from __future__ import annotations

import signal
from typing import NoReturn


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command and exits, as services.cli.commands.run says."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:  # else it is ignored, and stays so
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from services.cli import commands

    signal.signal(signal.SIGINT, on_interrupt)
    commands.run(arguments)


if __name__ == "__main__":
    main()
