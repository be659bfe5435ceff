"""When a step of the target is worth holding back: until those return who were answered a moment ago.

Owns: the decision and its estimates of who returns when. Must not know: items, blocks, threads. Time is an argument.

Sequences that verify come and go: answered, they are away for a gap (commit, draft, network), then ask again. Where a
step lasts longer than the gap, they fall into two halves of which one waits while the other is computed. Each step
costs about the same for half of them as for all, so the rate halves; and it stays so, as nothing brings them together.

Let R be ready to verify, A away and due, n of them together, P decode without drafts (they take part in every step), r
their rows, g the tokens that a verify of theirs has brought on average, x the time of the prefill that waits, t(rows)
the time of a step, d the gap.

Where a gap is longer than a step, k = (d + t) / t steps fit into a cycle of d + t, and nobody waits as long as no more
than k groups share the target. So a step is held while it has less than n / k sequences: then groups merge, until there
are k. With k > 1 that costs nothing in the long run, and it is left only where P or a prefill would wait for it.

Where a gap is shorter, k = 1 and every cycle is held. One cycle serves R and A once:

    step now     t(r_R + r_P) + x, then t(r_A + r_P) + x      (g_R + g_A + 2 g_P) / (sum of both)
    hold         d, then t(r_R + r_A + r_P) + x               (g_R + g_A + g_P) / (d + t + x)

Held is where the second rate, in tokens a millisecond, is clearly the higher one. A step is never held longer than the
step that it delays would take, nor longer than `max_hold_ns`; where the sequences that lack are not back by then, it is
not held at all. Nobody who is overdue is waited for, nor, while others are away for less than a step, who is for more.

How long somebody stays away is estimated as TCP does a round trip (Jacobson 1988, "Congestion avoidance and control"):
exponential averages of the gap and of its deviation. Who is away for more than gap + 4 deviations is overdue; the last
of many is reckoned to come after gap + 2 deviations, which is d.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.engine.step_times import StepTimes

DEFAULT_MAX_HOLD_NS = 100_000_000
GAP_WEIGHT = 0.125
DEVIATION_WEIGHT = 0.25
TOKENS_WEIGHT = 0.125
MIN_SLACK = 0.125
"""Part of the gap that somebody may be late at least, however regular it was."""
MIN_SLACK_NS = 200_000
MAX_CYCLE_EXCESS = 0.1
"""What a cycle of several steps may be longer than the shortest possible one."""
MIN_GAIN = 1.05
"""By which the rate of tokens must rise."""
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
    usual_ns: float = field(init=False, default=0.0)
    """When it is back in all but rare cases; it is away."""
    due_ns: float = field(init=False, default=0.0)
    """When it is back at the latest, if it is as always; 0 if it is not away or was never seen to come back."""

    def __post_init__(self) -> None:
        self._foresee()

    def leave(self, now_ns: int, num_rows: int, num_tokens: int) -> None:
        """It was answered, and is expected to come back."""
        self.num_tokens += (TOKENS_WEIGHT if self.num_rows else 1.0) * (num_tokens - self.num_tokens)
        self.num_rows = num_rows
        self.left_ns = now_ns
        self._foresee()

    def _foresee(self) -> None:
        """Once, since many ask while it is away."""
        if self.left_ns is not None:
            self.usual_ns = self.left_ns + self.gap_ns + 2 * self.deviation_ns
            self.due_ns = self.left_ns + self.reach_ns if self.gap_ns else 0.0

    def come_back(self, now_ns: int) -> None:
        """It asks again."""
        if self.left_ns is None:
            return
        gap_ns, self.left_ns, self.due_ns = max(1, now_ns - self.left_ns), None, 0.0
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

    def is_expected(self, now_ns: int) -> bool:
        """Whether it is away, and not for so long that it has probably stopped."""
        reach_ns = self.reach_ns if self.gap_ns else FIRST_REACH_NS
        return self.left_ns is not None and now_ns - self.left_ns < EXPECTED_REACHES * reach_ns


@dataclass(slots=True)
class Ready:
    """What the next step would hold if it were computed now."""

    num_sequences: int = 0
    """R's."""
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
        since_ns = now_ns if self._held_since_ns is None else self._held_since_ns
        expected = sorted((r for r in away if r.due_ns > now_ns), key=lambda r: r.usual_ns)
        expected = [r for r in expected if r.gap_ns <= bound_ns] or expected
        num_groups = self._num_groups(ready, expected)
        num_missing = -(-(ready.num_sequences + len(expected)) // num_groups) - ready.num_sequences
        due = expected[:num_missing] if num_missing > 0 else []
        if not due or due[-1].usual_ns > since_ns + bound_ns:
            return 0
        if num_groups > 1 and (ready.num_plain or ready.prefill_ns):
            return 0
        if num_groups == 1 and not self._pays(ready, due):
            return 0
        self._held_since_ns = since_ns
        last_ns = min(max(rhythm.due_ns for rhythm in due), since_ns + bound_ns)
        return max(0, int(last_ns - now_ns))

    def stepped(self) -> None:
        """A step is being computed: the hold has ended, if there was one."""
        self._held_since_ns = None

    def _num_groups(self, ready: Ready, expected: list[Rhythm]) -> int:
        """How many steps, one after the other, may serve all once before whom the first one served is kept waiting."""
        step_ns = self._times.rows_ns(ready.num_rows + ready.num_plain + sum(rhythm.num_rows for rhythm in expected))
        if not expected or not step_ns:
            return 1
        gap_ns = sum(rhythm.gap_ns for rhythm in expected) / len(expected)
        return max(1, int((1 + MAX_CYCLE_EXCESS) * (gap_ns + step_ns) / step_ns))

    def _pays(self, ready: Ready, due: list[Rhythm]) -> bool:
        """Whether waiting for all of `due` gives more tokens a nanosecond than two steps one after the other."""
        num_rows = sum(rhythm.num_rows for rhythm in due)
        num_tokens = ready.num_tokens + sum(rhythm.num_tokens for rhythm in due)
        longest_ns = max(rhythm.gap_ns + 2 * rhythm.deviation_ns for rhythm in due)
        rows_ns, plain, prefill_ns = self._times.rows_ns, ready.num_plain, ready.prefill_ns
        now_ns = rows_ns(ready.num_rows + plain) + rows_ns(num_rows + plain) + 2 * prefill_ns
        held_ns = longest_ns + rows_ns(ready.num_rows + num_rows + plain) + prefill_ns
        return (num_tokens + plain) * now_ns > MIN_GAIN * (num_tokens + 2 * plain) * held_ns
