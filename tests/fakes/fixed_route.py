"""A route that leads to one worker, whatever happens (services.coordinator.route.Route)."""

from __future__ import annotations

from typing import Any

from services.common.errors import OutriderError
from services.coordinator.worker_link import WorkerLink


class FixedRoute:
    """For generations beside which there is no placement."""

    should_move = False
    has_other = False
    hopeless = None

    def __init__(self, link: WorkerLink[Any, Any]) -> None:
        self.link = link
        self.closed = False

    def place(self) -> bool:
        return True

    def leave(self) -> None:
        """There is nothing else."""

    def lost(self, error: OutriderError, *, certain: bool = False) -> None:
        """There is nothing else."""

    def succeeded(self) -> None:
        """As ever."""

    async def wait(self, timeout_s: float) -> bool:
        return await self.link.wait_up(timeout_s)

    def forgive(self) -> None:
        """Nothing is held against it."""

    def close(self) -> None:
        self.closed = True
