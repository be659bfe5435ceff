"""How long a target holds a step for sequences that are due back: the rule of services.engine.hold, for the plan.

Owns: that rule. Must not know: events, how sequences come and go. Pure. Times in milliseconds.

With a gap d away and steps of t, k = (d + t) / t steps fit into a cycle: a step is held while it has less than its
share of the sequences. With k = 1 it is held only where one step for all is clearly quicker than two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

MAX_HOLD_MS = 100.0
MAX_CYCLE_EXCESS = 0.1
MIN_GAIN = 1.05


class Away(NamedTuple):
    """A sequence that is due back: at `usual_ms` in all but rare cases, at `due_ms` at the latest."""

    usual_ms: float
    due_ms: float
    gap_ms: float
    deviation_ms: float
    num_rows: int


class Ready(NamedTuple):
    """What the step would hold now; `since_ms`: when its hold began."""

    since_ms: float
    num_sequences: int
    num_rows: int
    prefill_ms: float = 0.0


def held_until_ms(now_ms: float, ready: Ready, away: Sequence[Away], rows_ms: Callable[[int], float]) -> float:
    """When the step is to begin at the latest; `now_ms`: at once. `away`: those who are due later than now."""
    step_ms = rows_ms(ready.num_rows) + ready.prefill_ms
    bound_ms = min(MAX_HOLD_MS, step_ms)
    expected = sorted(away)
    expected = [one for one in expected if one.gap_ms <= bound_ms] or expected
    num_groups = _num_groups(ready, expected, rows_ms)
    num_missing = -(-(ready.num_sequences + len(expected)) // num_groups) - ready.num_sequences
    due = expected[:num_missing] if num_missing > 0 else []
    if not due or due[-1].usual_ms > ready.since_ms + bound_ms:
        return now_ms
    if ready.prefill_ms if num_groups > 1 else not _pays(ready, due, rows_ms):
        return now_ms
    return max(now_ms, min(max(one.due_ms for one in due), ready.since_ms + bound_ms))


def _num_groups(ready: Ready, expected: Sequence[Away], rows_ms: Callable[[int], float]) -> int:
    """How many steps, one after the other, may serve all once before whom the first one served is kept waiting."""
    step_ms = rows_ms(ready.num_rows + sum(one.num_rows for one in expected))
    if not expected or not step_ms:
        return 1
    gap_ms = sum(one.gap_ms for one in expected) / len(expected)
    return max(1, int((1 + MAX_CYCLE_EXCESS) * (gap_ms + step_ms) / step_ms))


def _pays(ready: Ready, due: Sequence[Away], rows_ms: Callable[[int], float]) -> bool:
    """Whether waiting for all of `due` takes clearly less time than two steps; each brings the same tokens."""
    num_rows = sum(one.num_rows for one in due)
    longest_ms = max(one.gap_ms + 2 * one.deviation_ms for one in due)
    apart_ms = rows_ms(ready.num_rows) + rows_ms(num_rows) + 2 * ready.prefill_ms
    return apart_ms > MIN_GAIN * (longest_ms + rows_ms(ready.num_rows + num_rows) + ready.prefill_ms)
