"""One part of the system: a process under a fixed address, with proxies before it.

Owns: its process, and its ways to die, stand still and be cut off. Must not know: when that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from services.cli.processes import Process
from tests.chaos.faults import Role
from tests.fakes.tcp_proxy import TcpProxy

_START_S = 120.0
_STOP_S = 5.0


class PartProcess:
    """A process that may be started again and again, each time with logs of its own.

    It ends with the thread that starts it: start it on the main one.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_dir: Path,
        env: Mapping[str, str],
        is_ready: Callable[[], bool] | None = None,
    ) -> None:
        """It is ready when `is_ready` says so; without, when it prints its ready line."""
        self._name, self._command, self._log_dir, self._env = name, command, log_dir, env
        self._is_ready = is_ready
        self._process: Process | None = None
        self.incarnation = 0

    async def start(self) -> None:
        """Returns once it serves. Raises CommandFailed, with the end of its log."""
        self.incarnation += 1
        process = Process(f"{self._name}.{self.incarnation}", self._command, self._log_dir, self._env)
        self._process = process
        if self._is_ready is None:
            await asyncio.to_thread(process.wait_ready, _START_S)
        else:
            await asyncio.to_thread(process.wait_until, self._is_ready, _START_S, "before it was ready")

    async def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            await asyncio.to_thread(self._process.stop, _STOP_S)

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    @property
    def memory_bytes(self) -> int | None:
        """Resident; None while it does not run."""
        if self._process is not None:
            with contextlib.suppress(psutil.Error):
                return int(psutil.Process(self._process.pid).memory_info().rss)
        return None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running


@dataclass(slots=True)
class Part:
    """A process, and the proxies through which the others reach it. `data` is what it keeps over a restart."""

    name: str
    role: Role
    port: int
    process: PartProcess
    proxies: list[TcpProxy]
    data: Path | None = field(default=None)

    @property
    def direct_address(self) -> str:
        """Past the proxies."""
        return f"127.0.0.1:{self.port}"

    async def kill(self) -> None:
        await self.process.kill()

    async def start(self) -> None:
        await self.process.start()

    def lose_data(self) -> None:
        if self.data is not None:
            shutil.rmtree(self.data)

    def pause(self) -> None:
        self.process.signal(signal.SIGSTOP)

    def wake(self) -> None:
        self.process.signal(signal.SIGCONT)
