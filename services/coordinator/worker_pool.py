"""The workers of one role or draft pool, which come and go.

Owns: a link for each address that discovery names, its circuit breaker, and how much this coordinator has placed there.
Must not know: models, sessions, which worker is chosen. Used by one event loop.
Invariant: a worker that is no longer named keeps its link while something is claimed on it, and gets nothing new.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from services.common.breaker import CircuitBreaker
from services.common.errors import OutriderError, Unavailable
from services.common.items import DraftItem, DraftResult, TargetItem, TargetResult
from services.common.service import end_tasks
from services.coordinator.discovery import Discovery, Endpoint, Endpoints
from services.coordinator.link import Link

log = logging.getLogger(__name__)
ItemT = TypeVar("ItemT", bound=TargetItem | DraftItem)
ResultT = TypeVar("ResultT", bound=TargetResult | DraftResult)
T = TypeVar("T")

_RECHECK_S = 0.1
"""Circuit breakers close with time, unannounced."""


class PooledWorker(Generic[ItemT, ResultT]):
    """A link, and what the pool knows of its worker besides."""

    def __init__(self, link: Link[ItemT, ResultT]) -> None:
        self.link = link
        self.breaker = CircuitBreaker()
        self.endpoint: Endpoint | None = Endpoint(link.address)
        """As discovery names it; None: no longer."""
        self.num_claims = 0
        self.last_up_s = 0.0
        """When the link was last up, by the loop's clock."""

    @property
    def address(self) -> str:
        return self.link.address

    @property
    def draining(self) -> bool:
        """Whether it gets nothing new, and what it has is to be moved."""
        return self.endpoint is None or self.endpoint.draining or self.link.load.draining

    @property
    def placeable(self) -> bool:
        return self.link.up and not self.draining and self.breaker.allows

    @property
    def num_sequences(self) -> int:
        """Claimed here, and what others have there."""
        return self.num_claims + self.link.num_foreign


class WorkerPool(Generic[ItemT, ResultT]):
    """Runs from `start` to `aclose`."""

    def __init__(
        self, discoveries: Sequence[Discovery], new_link: Callable[[str], Link[ItemT, ResultT]], name: str
    ) -> None:
        """`new_link` makes the link to an address; `name` is for people."""
        self._discoveries = tuple(discoveries)
        self._new_link = new_link
        self._name = name
        self._named: list[Endpoints] = [Endpoints()] * len(self._discoveries)
        self._workers: dict[str, PooledWorker[ItemT, ResultT]] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self.on_change: Callable[[], None] = lambda: None
        """Called when a worker comes, goes, connects, breaks off or begins to drain."""

    def __str__(self) -> str:
        return self._name

    @property
    def workers(self) -> tuple[PooledWorker[ItemT, ResultT], ...]:
        return tuple(self._workers.values())

    @property
    def troubles(self) -> list[OutriderError]:
        """Why there are no workers, or what ails those that are not up."""
        if not self._workers:
            return [Unavailable("NO_WORKERS", f"{self}: no worker is known yet", retry_after_ms=1000)]
        return [worker.link.trouble for worker in self._workers.values() if not worker.link.up]

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow(i)) for i in range(len(self._discoveries))]

    async def aclose(self) -> None:
        await end_tasks(*self._tasks)
        for worker in list(self._workers.values()):
            self._retire(worker)
        await asyncio.gather(*self._closing)

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether `condition`, of the workers' states, came true within `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while not condition():
            if (left_s := deadline_s - loop.time()) <= 0:
                return False
            waiter = loop.create_future()
            self._waiters.add(waiter)
            try:
                await asyncio.wait([waiter], timeout=min(left_s, _RECHECK_S))
            finally:
                self._waiters.discard(waiter)
        return True

    async def wait_all_up(self, timeout_s: float) -> bool:
        """Whether there were workers, and all that are named were up, within `timeout_s`."""
        return await self.wait_until(self._all_up, timeout_s)

    def _all_up(self) -> bool:
        return bool(self._workers) and all(worker.link.up for worker in self._workers.values())

    def claim(self, worker: PooledWorker[ItemT, ResultT]) -> None:
        """Something is placed there, until `release`."""
        worker.num_claims += 1
        worker.breaker.begin()

    def release(self, worker: PooledWorker[ItemT, ResultT]) -> None:
        worker.num_claims -= 1
        if worker.endpoint is None and not worker.num_claims:
            self._retire(worker)

    async def _follow(self, index: int) -> None:
        async with contextlib.aclosing(self._discoveries[index].watch()) as changes:
            async for endpoints in changes:
                self._named[index] = endpoints
                self._update({endpoint.address: endpoint for named in self._named for endpoint in named})

    def _update(self, named: dict[str, Endpoint]) -> None:
        for address, endpoint in named.items():
            if address not in self._workers:
                self._add(address)
            self._workers[address].endpoint = endpoint
        for address, worker in list(self._workers.items()):
            if address not in named:
                worker.endpoint = None
                log.info("%s: %s is no longer named", self, address)
                if not worker.num_claims:
                    self._retire(worker)
        self._notify()

    def _add(self, address: str) -> None:
        log.info("%s: found %s", self, address)
        worker = PooledWorker(self._new_link(address))
        self._workers[address] = worker
        worker.link.on_change = lambda: self._changed(worker)
        worker.link.on_broken = worker.breaker.failed
        worker.link.start()

    def _changed(self, worker: PooledWorker[ItemT, ResultT]) -> None:
        worker.last_up_s = asyncio.get_running_loop().time()
        self._notify()

    def _retire(self, worker: PooledWorker[ItemT, ResultT]) -> None:
        if self._workers.get(worker.address) is worker:
            del self._workers[worker.address]
            task = asyncio.create_task(worker.link.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _notify(self) -> None:
        self.on_change()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
