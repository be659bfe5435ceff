"""With how many threads a CPU's steps are computed: all, or half of them, whichever has lately been faster.

Owns: the choice and what it was learned from. Must not know: clocks, torch, models.

Threads of one step meet behind every product, hundreds of times. Where another process runs on one of their cores, each
meeting may wait until the scheduler lets the late thread go on, for milliseconds: a step then takes many times as long
as with threads that leave that core alone, whatever the other process's priority is.

Steps are told apart by the power of two of their tokens, as small steps gain little from threads and large ones much.
Of each kind and number of threads the last few times are kept and compared by their median, which one late moment does
not move. Half of the threads are tried once at the start, where a step took far longer than usual, and else almost
never, as large steps take twice as long with them. While they are in use, all threads are tried from time to time:
again at once where that was faster, after twice the wait where it was not.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

NUM_TIMES = 3
FIRST_WAIT = 4
"""Steps before the first try."""
FIRST_INTERVAL = 32
MAX_INTERVAL = 2048
LATE = 2.5
"""So many times the median is far longer than usual."""
MIN_GAIN = 1.05
"""By which the other number must be faster."""


@dataclass(slots=True)
class _Kind:
    """Steps of about equally many tokens."""

    in_use: int
    other: int
    times: dict[int, deque[int]] = field(default_factory=dict)
    """By the number of threads, newest last."""
    wait: int = FIRST_WAIT
    """Steps before the other number is tried."""
    interval: int = FIRST_INTERVAL
    """The last wait before all threads were tried."""

    def median(self, num_threads: int) -> float:
        """Infinite where it was never tried."""
        times = self.times.get(num_threads)
        return statistics.median(times) if times else float("inf")


class ThreadChoice:
    """Asked before each step and told of it afterwards; `max_threads` is at least 1."""

    def __init__(self, max_threads: int) -> None:
        self._max_threads = max_threads
        self._kinds: dict[int, _Kind] = {}

    def num_threads(self, num_tokens: int) -> int:
        """For a step of so many tokens."""
        if self._max_threads == 1:
            return 1
        kind = self._kind(num_tokens)
        return kind.in_use if kind.wait else kind.other

    def observe(self, num_tokens: int, num_threads: int, duration_ns: int) -> None:
        """A step has been computed with `num_threads`, as they were chosen."""
        if self._max_threads == 1:
            return
        kind = self._kind(num_tokens)
        usual_ns = kind.median(num_threads)
        kind.times.setdefault(num_threads, deque(maxlen=NUM_TIMES)).append(duration_ns)
        if num_threads == kind.in_use:
            kind.wait = max(0, kind.wait - 1)
            if duration_ns > LATE * usual_ns:
                kind.wait, kind.interval = 0, FIRST_INTERVAL
        else:
            self._tried(kind, duration_ns)

    def _tried(self, kind: _Kind, duration_ns: int) -> None:
        if MIN_GAIN * duration_ns >= kind.median(kind.in_use):
            kind.interval = min(2 * kind.interval, MAX_INTERVAL)
            kind.wait = MAX_INTERVAL if kind.in_use == self._max_threads else kind.interval
        elif MIN_GAIN * kind.median(kind.other) < kind.median(kind.in_use):
            kind.in_use, kind.other = kind.other, kind.in_use
            kind.wait = kind.interval = FIRST_INTERVAL

    def _kind(self, num_tokens: int) -> _Kind:
        return self._kinds.setdefault(num_tokens.bit_length(), _Kind(self._max_threads, max(1, self._max_threads // 2)))
