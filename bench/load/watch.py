"""Memory and queues of a cluster while it is under load.

Owns: reading them regularly, and the most there was. Must not know: what the load is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import psutil

from services.client import OutriderClient

_INTERVAL_S = 0.25


@dataclass(slots=True)
class Watched:
    """The most that was seen."""

    max_running: int = 0
    max_waiting: int = 0
    max_target_queue: int = 0
    max_rss_mib: dict[str, float] = field(default_factory=dict)
    num_readings: int = 0


@contextlib.asynccontextmanager
async def watching(client: OutriderClient, pids: Mapping[str, int]) -> AsyncIterator[Watched]:
    """Reads from enter to exit, and at exit; processes by their name."""
    watched = Watched()
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}

    async def read() -> None:
        status = await client.get_cluster_status()
        watched.num_readings += 1
        watched.max_running = max(watched.max_running, status.num_requests_running)
        watched.max_waiting = max(watched.max_waiting, status.num_requests_waiting)
        for worker in status.workers:
            if worker.info and worker.role == "target":
                watched.max_target_queue = max(watched.max_target_queue, worker.info.load.num_queued)
        for name, process in processes.items():
            rss_mib = process.memory_info().rss / 2**20
            watched.max_rss_mib[name] = round(max(watched.max_rss_mib.get(name, 0.0), rss_mib), 1)

    async def read_regularly() -> None:
        while True:
            await read()
            await asyncio.sleep(_INTERVAL_S)

    reader = asyncio.create_task(read_regularly())
    try:
        yield watched
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
    await read()
