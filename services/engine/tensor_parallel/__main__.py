"""`python -m services.engine.tensor_parallel`: a rank that follows the steps of rank 0, which starts it.

Owns: its life. It ends with rank 0: when its standard input ends, at once between steps, or after a grace time out of a
collective call that nobody will complete. Signals from a terminal or a supervisor are left to rank 0.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from typing import BinaryIO

from services.common.errors import ConfigError, ModelUnsupported
from services.engine.tensor_parallel.frames import read_frame

ORPHAN_GRACE_S = 2.0
"""How long a step may go on without rank 0."""


class Inbox:
    """What rank 0 sends. A thread reads it, so that rank 0's end is noticed during a step too."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next(self) -> bytes | None:
        """Waits for the next message; None once rank 0 is gone."""
        return self._frames.get()

    def end(self) -> None:
        """This rank has nothing left to wait for, and ends by itself."""
        self._ended.set()

    def _read(self) -> None:
        while (frame := read_frame(self._pipe)) is not None:
            self._frames.put(frame)
        self._frames.put(None)
        if not self._ended.wait(ORPHAN_GRACE_S):
            os._exit(1)


def follow(first: bytes, inbox: Inbox) -> None:
    """Loads this rank's shard, of which the first message tells, and computes its part of every step that follows."""
    import numpy as np
    import torch.distributed as dist

    from services.engine.progress import Reporter
    from services.engine.shard import ShardSpec, load_shard
    from services.engine.tensor_parallel import group
    from services.engine.tensor_parallel.leading_runner import obey

    spec = ShardSpec.decode(first)
    store = group.join_store(int(os.environ["MASTER_PORT"]), spec.size)
    group.announce(store, spec.rank)
    group.join(store, spec.rank, spec.size, spec.rank_device)
    shard = load_shard(spec, Reporter(quiet=True))
    sys.stderr.write(f"{shard.memory}\n")
    while (message := inbox.next()) is not None:
        obey(shard.runner, np.frombuffer(message, dtype=np.int64))
    dist.destroy_process_group()


def main() -> None:
    """Exits with 1 where the rank cannot go on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    inbox = Inbox(sys.stdin.buffer)
    try:
        if (first := inbox.next()) is not None:
            follow(first, inbox)
        inbox.end()
    except (ConfigError, ModelUnsupported) as error:
        sys.stderr.write(f"rank {os.environ['RANK']}: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
