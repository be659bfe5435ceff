"""Timeouts in an event loop's own time: while this process stands still, nobody else is late.

Owns: how such time is counted. Must not know: what is waited for.

A loop that had no time for a while finds its timers due before it has looked at what has come meanwhile (uvloop runs
them first). So a wait is counted in ticks: each counts once however late it is, and between two of them the loop looks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

NUM_TICKS = 10


class PatientTimer:
    """Calls `on_late` once, after `seconds` in ticks of the running loop, unless it is cancelled before."""

    def __init__(self, seconds: float, on_late: Callable[[], None]) -> None:
        self._tick_s = seconds / NUM_TICKS
        self._on_late = on_late
        self._num_left = NUM_TICKS
        self._handle = asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    def cancel(self) -> None:
        """Harmless when it has called."""
        self._handle.cancel()

    def _tick(self) -> None:
        self._num_left -= 1
        if self._num_left:
            self._handle = asyncio.get_running_loop().call_later(self._tick_s, self._tick)
        else:
            self._on_late()


@contextlib.asynccontextmanager
async def patience(seconds: float) -> AsyncIterator[None]:
    """As asyncio.timeout: its body is ended by TimeoutError when it takes longer."""
    async with asyncio.timeout(None) as timeout:
        timer = PatientTimer(seconds, lambda: timeout.reschedule(asyncio.get_running_loop().time()))
        try:
            yield
        finally:
            timer.cancel()
