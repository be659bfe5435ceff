"""When a step of the target is worth holding back: until those return who were answered a moment ago.

Owns: the decision and its estimates of who returns when. Must not know: items, blocks, threads. Time is an argument.

Sequences that verify come and go: answered, they are away for a gap (commit, draft, network), then ask again. Where a
step lasts longer than the gap, they fall into two halves of which one waits while the other is computed. Each step
costs about the same for half of them as for all, so the rate halves; and it stays so, as nothing brings them together.

Let R be ready to verify, A away and due soon, P decode without drafts (they take part in every step), r their rows,
g the tokens that a verify of theirs has brought on average, x the time of the prefill that waits, t(rows) the time of
a step, d the longest of their gaps. One cycle serves R and A once:

    step now     t(r_R + r_P) + x, then t(r_A + r_P) + x      (g_R + g_A + 2 g_P) / (sum of both)
    hold         d, then t(r_R + r_A + r_P) + x               (g_R + g_A + g_P) / (d + t + x)

Held is where the second rate, in tokens a millisecond, is the higher one. A step is never held longer than the step
that it delays would take, nor longer than `max_hold_ns`; who stays away longer is not waited for (the target is free
again when it returns), nor who is overdue.

How long somebody stays away is estimated as TCP does a round trip (Jacobson 1988, "Congestion avoidance and control"):
exponential averages of the gap and of its deviation. Who is away for more than gap + 4 deviations is overdue; the last
of many is reckoned to come after gap + 2 deviations, which is d.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.engine.step_times import StepTimes

DEFAULT_MAX_HOLD_NS = 100_000_000
GAP_WEIGHT = 0.125
DEVIATION_WEIGHT = 0.25
TOKENS_WEIGHT = 0.125
MIN_SLACK = 0.125
"""Part of the gap that somebody may be late at least, however regular it was."""
MIN_SLACK_NS = 200_000
EXPECTED_REACHES = 4
"""Who has been away for so many times its reach is no longer thought to come back."""
FIRST_REACH_NS = 50_000_000
"""Taken for the reach of who was never seen to come back."""


@dataclass(slots=True)
class Rhythm:
    """How one sequence comes and goes, and what it brings."""

    num_rows: int = 0
    """Of its last verify."""
    num_tokens: float = 1.0
    """Of a verify, averaged."""
    left_ns: int | None = None
    """When it was answered; None while it is not away."""
    gap_ns: float = 0.0
    """0: never seen to come back."""
    deviation_ns: float = 0.0

    def leave(self, now_ns: int, num_rows: int, num_tokens: int) -> None:
        """It was answered, and is expected to come back."""
        self.num_tokens += (TOKENS_WEIGHT if self.num_rows else 1.0) * (num_tokens - self.num_tokens)
        self.num_rows = num_rows
        self.left_ns = now_ns

    def come_back(self, now_ns: int) -> None:
        """It asks again."""
        if self.left_ns is None:
            return
        gap_ns, self.left_ns = max(1, now_ns - self.left_ns), None
        if not self.gap_ns:
            self.gap_ns, self.deviation_ns = float(gap_ns), gap_ns / 2
            return
        off_ns = gap_ns - self.gap_ns
        self.gap_ns += GAP_WEIGHT * off_ns
        self.deviation_ns += DEVIATION_WEIGHT * (abs(off_ns) - self.deviation_ns)

    @property
    def reach_ns(self) -> float:
        """It is rarely away longer than this; beyond it is overdue."""
        return self.gap_ns + max(4 * self.deviation_ns, MIN_SLACK * self.gap_ns, MIN_SLACK_NS)

    @property
    def due_ns(self) -> float:
        """When it is back at the latest, if it is as always; 0 if it is not away or was never seen to come back."""
        return self.left_ns + self.reach_ns if self.left_ns is not None and self.gap_ns else 0.0

    def is_expected(self, now_ns: int) -> bool:
        """Whether it is away, and not for so long that it has probably stopped."""
        reach_ns = self.reach_ns if self.gap_ns else FIRST_REACH_NS
        return self.left_ns is not None and now_ns - self.left_ns < EXPECTED_REACHES * reach_ns


@dataclass(slots=True)
class Ready:
    """What the next step would hold if it were computed now."""

    num_rows: int = 0
    """R's."""
    num_tokens: float = 0.0
    """R's, expected."""
    num_plain: int = 0
    """Rows of P, and as many tokens."""
    prefill_ns: float = 0.0


class HoldPolicy:
    """Decides on one target's steps. Asked before each, and told of each; in between is one hold."""

    def __init__(self, times: StepTimes, max_hold_ns: int = DEFAULT_MAX_HOLD_NS) -> None:
        self._times = times
        self._max_hold_ns = max_hold_ns
        self._held_since_ns: int | None = None

    def hold_ns(self, now_ns: int, ready: Ready, away: Iterable[Rhythm]) -> int:
        """0: compute the step now. Else ask again when somebody returns, or after that many nanoseconds."""
        step_ns = self._times.rows_ns(ready.num_rows + ready.num_plain) + ready.prefill_ns
        bound_ns = min(self._max_hold_ns, step_ns)
        due = [rhythm for rhythm in away if rhythm.due_ns > now_ns and rhythm.gap_ns <= bound_ns]
        if not due or not self._pays(ready, due):
            return 0
        if self._held_since_ns is None:
            self._held_since_ns = now_ns
        last_ns = min(max(rhythm.due_ns for rhythm in due), self._held_since_ns + bound_ns)
        return max(0, int(last_ns - now_ns))

    def stepped(self) -> None:
        """A step is being computed: the hold has ended, if there was one."""
        self._held_since_ns = None

    def _pays(self, ready: Ready, due: list[Rhythm]) -> bool:
        """Whether waiting for all of `due` gives more tokens a nanosecond than two steps one after the other."""
        num_rows = sum(rhythm.num_rows for rhythm in due)
        num_tokens = ready.num_tokens + sum(rhythm.num_tokens for rhythm in due)
        longest_ns = max(rhythm.gap_ns + 2 * rhythm.deviation_ns for rhythm in due)
        rows_ns, plain, prefill_ns = self._times.rows_ns, ready.num_plain, ready.prefill_ns
        now_ns = rows_ns(ready.num_rows + plain) + rows_ns(num_rows + plain) + 2 * prefill_ns
        held_ns = longest_ns + rows_ns(ready.num_rows + num_rows + plain) + prefill_ns
        return (num_tokens + plain) * now_ns > (num_tokens + 2 * plain) * held_ns
