"""A service as a process of its own: started, told to stop as Kubernetes does, and never left behind.

Owns: the process. Must not know: what the service is, beyond its module and flags.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Version:
    """Of which version a service is: this one; one that tests.fakes.other_version makes; or what lies in `tree`."""

    name: str = "present"
    tree: Path | None = None

    def command(self, module: str) -> list[str]:
        other = ["tests.fakes.other_version", self.name] if self.name in ("predecessor", "successor") else []
        return [sys.executable, "-m", *other, module]

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": f"{self.tree}{os.pathsep}{self.tree / 'protos' / 'gen'}"} if self.tree else {}


PRESENT = Version()


@dataclass(frozen=True, slots=True)
class ServiceProcess:
    """A service that has said that it is ready."""

    process: asyncio.subprocess.Process
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def terminate(self, timeout_s: float = 30.0) -> int:
        """Sends SIGTERM; the exit status."""
        self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), timeout_s)


@contextlib.asynccontextmanager
async def service_process(
    module: str, *flags: str, version: Version = PRESENT, port: int = 0, **environment: str
) -> AsyncIterator[ServiceProcess]:
    """`python -m module` on a port of loopback, once it is ready; 0: a free one. Killed on exit if it still runs."""
    command = [*version.command(module), "--host", "127.0.0.1", "--port", str(port), "--metrics-port", "-1", *flags]
    own = {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env=own | version.environment | environment, cwd=version.tree
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        yield ServiceProcess(process, json.loads(line)["port"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
