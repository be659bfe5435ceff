"""A coordinator as a process of its own, that can be killed and paused.

Owns: the process. Must not know: its workers and its store, beyond their addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator

from tests.fakes.ports import held_port


@contextlib.asynccontextmanager
async def coordinator_process(
    target_port: int, draft_port: int, redis_url: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process, once it is ready, and its address, where nobody answers when it is dead; killed on exit."""
    with held_port() as port:
        flags = ["--port", str(port), "--metrics-port", "-1", "--redis-url", redis_url, "--tokenizer", "simulated"]
        flags += ["--targets", f"127.0.0.1:{target_port}", "--drafts", f"127.0.0.1:{draft_port}"]
        command = [sys.executable, "-m", "services.coordinator", *flags]
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            assert child.stdout is not None
            assert json.loads(await child.stdout.readline())["port"] == port
            yield child, f"127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
