"""Rank 0's side: starts the other ranks, sends them the steps, notices when one ends.

Owns: the processes of the other ranks, the pipes to them, and their end. Must not know: what a step is, verification,
the wire.

    rank 0 ──pipe──▶ standard input of each rank: the ShardSpec, then the message of each step
    ranks  ◀──────▶ each other, within a forward: torch.distributed's process group

A pipe waits without a time limit, and its end tells a rank that rank 0 is gone, however that went. A rank that ends
while nobody closes takes the worker down: the failure is reported, and a process that a lost rank holds up in a
collective call ends by itself after a grace time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import BinaryIO, cast

import torch.distributed as dist

from services.common.errors import WorkerFailed
from services.common.failure import Failure
from services.engine.shard import ShardSpec
from services.engine.tensor_parallel import group
from services.engine.tensor_parallel.frames import write_frame
from services.engine.tensor_parallel.message import Ints

log = logging.getLogger(__name__)

ABORT_GRACE_S = 15.0
"""How long the process may take to end after a rank was lost."""
_STOP_S = 5.0
_POLL_S = 0.02
_STDERR = 2


class Ranks:
    """The ranks 1 to N-1 of this process's model. Calls come from one thread at a time."""

    def __init__(self, spec: ShardSpec, failure: Failure) -> None:
        """Starts them, and joins the group with them. Raises WorkerFailed where one ends before it has joined."""
        self._failure = failure
        self._closing = threading.Event()
        self._ranks: list[_Rank] = []
        self._monitors: list[threading.Thread] = []
        try:
            store = group.open_store(spec.size)
            for number in range(1, spec.size):
                self._start(replace(spec, rank=number), store.port)
            while not group.have_announced(store, spec.size):
                if failure.error is not None:
                    raise failure.error
                time.sleep(_POLL_S)
            group.join(store, 0, spec.size, spec.rank_device)
        except BaseException:
            self.close()
            raise

    def send(self, message: Ints) -> None:
        """Has every rank compute a step, or zero its pool. Raises WorkerFailed where one is gone."""
        frame = message.tobytes()
        for rank in self._ranks:
            rank.send(frame)

    def close(self) -> None:
        """Ends the ranks; no process is left on return. Calling it again changes nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        for rank in self._ranks:
            rank.hang_up()
        for rank in self._ranks:
            rank.wait(_STOP_S)
        for monitor in self._monitors:
            monitor.join()
        if dist.is_initialized() and self._failure.error is None:
            dist.destroy_process_group()

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    def _start(self, spec: ShardSpec, port: int) -> None:
        rank = _Rank(spec, port)
        monitor = threading.Thread(target=self._monitor, args=(rank,), name=f"rank {rank.number}", daemon=True)
        self._ranks.append(rank)
        self._monitors.append(monitor)
        monitor.start()
        rank.send(spec.encode())

    def _monitor(self, rank: _Rank) -> None:
        status = rank.process.wait()
        if self._closing.is_set():
            return
        error = WorkerFailed(f"rank {rank.number} of {len(self._ranks) + 1} ended with status {status}")
        log.critical("%s; the worker ends", error)
        self._failure.report(error)
        if not self._closing.wait(ABORT_GRACE_S):
            log.critical("the process did not end within %g s of losing a rank", ABORT_GRACE_S)
            os._exit(1)


class _Rank:
    """One process, and the pipe to it."""

    def __init__(self, spec: ShardSpec, port: int) -> None:
        """Starts it, and tells it where the others meet."""
        self.number = spec.rank
        command = [sys.executable, "-P", "-m", "services.engine.tensor_parallel"]
        place = {"RANK": spec.rank, "LOCAL_RANK": spec.rank, "WORLD_SIZE": spec.size, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": group.ADDRESS, **{key: str(value) for key, value in place.items()}}
        # Standard output is for the ready line of rank 0 alone.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=_STDERR, env=environment)
        self._pipe = cast(BinaryIO, self.process.stdin)

    def send(self, frame: bytes) -> None:
        """Raises WorkerFailed where it is gone."""
        try:
            write_frame(self._pipe, frame)
            self._pipe.flush()
        except OSError as error:
            raise WorkerFailed(f"rank {self.number} takes no steps any more: {error}") from error

    def hang_up(self) -> None:
        """Lets it end. Harmless where it has."""
        with contextlib.suppress(OSError):
            self._pipe.close()

    def wait(self, timeout_s: float) -> None:
        """Returns once it has ended; kills it after `timeout_s`."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
