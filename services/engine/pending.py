"""An item that waits for its answer, and where its time goes.

Owns: the stamps behind Timings. Must not know: what the item asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from services.common.items import Close, Decode, Open, Propose, Timings, Verify

Item = TypeVar("Item", bound=Open | Propose | Verify | Decode | Close)


@dataclass(slots=True)
class Pending(Generic[Item]):
    """An item in progress. Times in nanoseconds of the monotonic clock."""

    item: Item
    arrived_ns: int
    started_ns: int | None = None
    forward_ns: int = 0

    def add_step(self, started_ns: int, ended_ns: int) -> None:
        """Counts a step that the item took part in."""
        if self.started_ns is None:
            self.started_ns = started_ns
        self.forward_ns += ended_ns - started_ns

    def timings(self, now_ns: int) -> Timings:
        """Of an answer given now."""
        started_ns = now_ns if self.started_ns is None else self.started_ns
        return Timings(
            queue_ns=max(0, started_ns - self.arrived_ns),
            forward_ns=self.forward_ns,
            total_ns=max(0, now_ns - self.arrived_ns),
        )

    def answered(self, now_ns: int) -> None:
        """Starts anew from an answer that is not the last one."""
        self.arrived_ns, self.started_ns, self.forward_ns = now_ns, None, 0
