"""A generation's way to a worker of one role: the worker it is placed on now, and the next one when that fails.

Owns: the claim on the worker, and which workers have failed this generation since one last answered it.
Must not know: models, which worker is best (a function is given), items, sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Generic, Protocol, TypeVar

from services.common.errors import DeadlineExceeded, OutriderError
from services.common.items import DraftItem, DraftResult, TargetItem, TargetResult
from services.coordinator.link import Link
from services.coordinator.worker_pool import PooledWorker, WorkerPool

ItemT = TypeVar("ItemT", bound=TargetItem | DraftItem)
ResultT = TypeVar("ResultT", bound=TargetResult | DraftResult)

Choose = Callable[[Collection[str]], PooledWorker[ItemT, ResultT] | None]
"""The best worker that is placeable, except those at the given addresses."""


class Route(Protocol[ItemT, ResultT]):
    """What a sequence needs to know of placement. `close` is the last call."""

    @property
    def link(self) -> Link[ItemT, ResultT] | None:
        """The worker's that the generation is placed on; None: on none at present."""
        ...

    @property
    def should_move(self) -> bool:
        """Whether the worker is to be left, and another one would take the generation. Cheap."""
        ...

    @property
    def has_other(self) -> bool:
        """Whether another worker than the present one would take the generation."""
        ...

    def place(self) -> bool:
        """Whether the generation is placed now: where it was, if it may be opened there, or on another worker that has
        not failed it."""
        ...

    def leave(self) -> None:
        """Gives the present worker up, through no fault of its own."""
        ...

    def lost(self, error: OutriderError, *, certain: bool = False) -> None:
        """The present worker failed the generation. `certain`: if it was late, nobody else need try it for now."""
        ...

    def succeeded(self) -> None:
        """The present worker has answered."""
        ...

    async def wait(self, timeout_s: float) -> bool:
        """Forgets which workers have failed, and tries `place` for `timeout_s`. Whether it succeeded."""
        ...

    def forgive(self) -> None:
        """Forgets which workers have failed."""
        ...

    @property
    def hopeless(self) -> OutriderError | None:
        """Why waiting is useless, if it is."""
        ...

    def close(self) -> None: ...


class PoolRoute(Generic[ItemT, ResultT]):
    """A route within one pool (Route)."""

    def __init__(
        self,
        pool: WorkerPool[ItemT, ResultT],
        choose: Choose[ItemT, ResultT],
        hopeless: Callable[[], OutriderError | None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._choose = choose
        self._hopeless = hopeless
        self._worker: PooledWorker[ItemT, ResultT] | None = None
        self._failed: set[str] = set()

    @property
    def link(self) -> Link[ItemT, ResultT] | None:
        return self._worker.link if self._worker else None

    @property
    def should_move(self) -> bool:
        return self._worker is not None and self._worker.draining and self.has_other

    @property
    def has_other(self) -> bool:
        present = {self._worker.address} if self._worker else set()
        return self._choose(self._failed | present) is not None

    def place(self) -> bool:
        if self._worker is not None and (self._worker.draining or not self._worker.link.up):
            self.leave()  # it was chosen a while ago
        if self._worker is None and (worker := self._choose(self._failed)):
            self._worker = worker
            self._pool.claim(worker)
        return self._worker is not None

    def leave(self) -> None:
        if self._worker is not None:
            worker, self._worker = self._worker, None
            self._pool.release(worker)

    def lost(self, error: OutriderError, *, certain: bool = False) -> None:
        if self._worker is not None:
            self._failed.add(self._worker.address)
            if isinstance(
                error, DeadlineExceeded
            ):  # broken streams count once, not for each generation; refusals never
                self._worker.breaker.failed(certain=certain)
            self.leave()

    def succeeded(self) -> None:
        self._failed.clear()
        if self._worker is not None:
            self._worker.breaker.succeeded()

    async def wait(self, timeout_s: float) -> bool:
        self.forgive()
        return (
            await self._pool.wait_until(lambda: self.place() or self.hopeless is not None, timeout_s) and self.place()
        )

    def forgive(self) -> None:
        self._failed.clear()

    @property
    def hopeless(self) -> OutriderError | None:
        return self._hopeless()

    def close(self) -> None:
        self.leave()
