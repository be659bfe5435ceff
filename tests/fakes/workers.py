"""Workers without sockets: links that are up as a test says, found by a discovery that a test feeds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from services.common.errors import OutriderError, Unavailable
from services.common.values import ModelInfo, WorkerInfo, WorkerLoad
from services.coordinator.discovery import Endpoint, Endpoints
from services.coordinator.worker_pool import WorkerPool


class FedDiscovery:
    """Names what `feed` was given last (services.coordinator.discovery.Discovery)."""

    def __init__(self, *addresses: str) -> None:
        self._queue: asyncio.Queue[Endpoints] = asyncio.Queue()
        if addresses:
            self.feed(*addresses)

    def feed(self, *endpoints: str | Endpoint) -> None:
        self._queue.put_nowait(frozenset(Endpoint(e) if isinstance(e, str) else e for e in endpoints))

    async def watch(self) -> AsyncGenerator[Endpoints]:
        while True:
            yield await self._queue.get()


class FakeLink:
    """What pools and placement need of services.coordinator.worker_link.WorkerLink."""

    def __init__(self, address: str, info: WorkerInfo | None) -> None:
        self.address = address
        self.info = info
        self.up = info is not None
        self.load = WorkerLoad()
        self.num_foreign = 0
        self.trouble: OutriderError = Unavailable("STREAM_BROKEN", f"{address} is away")
        self.closed = False
        self.on_change: Callable[[], None] = lambda: None
        self.on_broken: Callable[[], None] = lambda: None

    def __str__(self) -> str:
        return f"worker {self.address}"

    def start(self) -> None:
        self.on_change()

    async def aclose(self) -> None:
        self.closed = True

    def set_up(self, up: bool) -> None:
        self.up = up
        self.on_change()
        if not up:
            self.on_broken()


def info_of(
    address: str, role: str = "target", *, vocab: str = "same", noise_version: int = 1, **model: Any
) -> WorkerInfo:
    """`model`: fields of its ModelInfo."""
    fields = {"name": f"a {role}", "digest": "digest", "vocab_size": 8, "dtype": "float32", "device": "cpu", **model}
    return WorkerInfo(
        instance_id=f"instance of {address}",
        role=role,
        model=ModelInfo(vocab_digest=vocab, **fields),
        drafter="model" if role == "draft" else "",
        max_draft_tokens=16,
        max_sequences=8,
        max_sequence_len=64,
        noise_version=noise_version,
    )


class FakePool:
    """A pool of fake links. `start` it within a running loop."""

    def __init__(self, *infos: tuple[str, WorkerInfo | None]) -> None:
        self.infos = dict(infos)
        self.links: dict[str, FakeLink] = {}
        self.discovery = FedDiscovery(*self.infos)
        self.pool: WorkerPool[Any, Any] = WorkerPool([self.discovery], self._new_link, "targets")

    def _new_link(self, address: str) -> Any:
        self.links[address] = FakeLink(address, self.infos.get(address))
        return self.links[address]


async def settle() -> None:
    """Lets what is ready run."""
    for _ in range(5):
        await asyncio.sleep(0)
