"""An event loop whose time passes only while everything waits: hours of waiting take no time, and repeat exactly."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For code that waits on this loop alone: no sockets, no threads."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(_SkippingSelector(self))

    def time(self) -> float:
        return self.now_s

    def nanoseconds(self) -> int:
        return round(self.now_s * 1e9)


class _SkippingSelector(selectors.DefaultSelector):
    """Where the loop would sleep, its time goes on instead."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing is left that could end it")
        self._loop.now_s += max(0.0, timeout)
        return super().select(0)


def run(main: Coroutine[Any, Any, T], loop: VirtualTimeLoop) -> T:
    """Runs to the end, then closes the loop."""
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main)
