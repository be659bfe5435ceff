"""What placement and sequences see of a connection to a worker.

Owns: that seam. Must not know: whether one channel stands behind it or, while certificates change, two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from services.common.errors import OutriderError
from services.common.items import DraftItem, DraftResult, Identity, TargetItem, TargetResult
from services.common.values import WorkerInfo, WorkerLoad
from services.coordinator.worker_link import Lane

ItemT = TypeVar("ItemT", bound=TargetItem | DraftItem)
ResultT = TypeVar("ResultT", bound=TargetResult | DraftResult)


class Link(Protocol[ItemT, ResultT]):
    """As services.coordinator.worker_link.WorkerLink, whose docstrings say what each is."""

    on_change: Callable[[], None]
    on_broken: Callable[[], None]

    @property
    def address(self) -> str: ...

    @property
    def info(self) -> WorkerInfo | None: ...

    @property
    def load(self) -> WorkerLoad: ...

    @property
    def num_foreign(self) -> int: ...

    @property
    def up(self) -> bool: ...

    @property
    def trouble(self) -> OutriderError: ...

    def start(self) -> None: ...

    async def aclose(self) -> None: ...

    async def wait_up(self, timeout_s: float) -> bool: ...

    async def describe(self, timeout_s: float) -> WorkerInfo: ...

    def open_lane(self, identity: Identity) -> Lane[ItemT, ResultT]: ...
