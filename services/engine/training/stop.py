"""When a run ends before its work does: on a signal, or after its time.

Owns: the question, which loops ask between steps. Must not know: what they do.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable


class Stop:
    """`wanted` becomes true once, for good. Signals are heard from `listen` on; a second one ends the process."""

    def __init__(self, max_minutes: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline = clock() + max_minutes * 60 if max_minutes else None
        self._signalled = False

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        self._signalled = True
        signal.signal(number, signal.SIG_DFL)

    @property
    def wanted(self) -> bool:
        return self._signalled or (self._deadline is not None and self._clock() >= self._deadline)
