"""Whether new work may go to a server that has failed before.

Owns: one server's circuit breaker. Must not know: which servers there are, why something failed. Pure but for its
clock.

    closed  --`threshold` failures in a row, or a certain one-->  open for a delay, twice as long each time
    open    --the delay is over, and work begins-->               trial; another begins only after a delay without news
    trial   --failure-->  open                                    any state  --success-->  closed
"""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable

THRESHOLD = 3
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 5.0
_JITTER = 0.25
"""Share of a delay by which it may be shorter, so that coordinators do not try again together."""


class _State(enum.Enum):
    CLOSED = enum.auto()
    OPEN = enum.auto()
    TRIAL = enum.auto()


class CircuitBreaker:
    """Ask `allows` before work is placed, call `begin` when it is, then `succeeded` and `failed` as news comes."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        """`clock` gives seconds, `jitter` numbers in [0, 1)."""
        self._clock = clock
        self._jitter = jitter
        self._state = _State.CLOSED
        self._num_failures = 0
        self._num_openings = 0
        self._until = 0.0
        """When a trial may begin; meaningful unless closed."""

    @property
    def allows(self) -> bool:
        return self._state is _State.CLOSED or self._clock() >= self._until

    def begin(self) -> None:
        """Work was placed on the worker: where it had failed, this is the trial."""
        if self._state is not _State.CLOSED and self.allows:
            self._state = _State.TRIAL
            self._until = self._clock() + self._delay_s

    def succeeded(self) -> None:
        self._state, self._num_failures, self._num_openings = _State.CLOSED, 0, 0

    def failed(self, *, certain: bool = False) -> None:
        """`certain`: one is enough. While open, work that began earlier may fail without further effect."""
        if self._state is _State.OPEN:
            return
        self._num_failures += 1
        if certain or self._state is _State.TRIAL or self._num_failures >= THRESHOLD:
            self._state = _State.OPEN
            self._num_openings += 1
            self._until = self._clock() + self._delay_s

    @property
    def _delay_s(self) -> float:
        delay_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._num_openings - 1, 16))
        return delay_s * (1.0 - _JITTER * self._jitter())
