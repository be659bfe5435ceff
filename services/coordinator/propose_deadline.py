"""When a proposal is late: a draft's share of the round, learned from the proposals before.

Owns: the estimate of one draft pool. Must not know: what becomes of a late draft. Pure.

The mean and the mean deviation of the proposals' times, as retransmission timers are set (Jacobson 1988, "Congestion
avoidance and control"): late is what takes longer than mean + 4 deviations, and each time twice as long is allowed.
"""

from __future__ import annotations

MIN_DEADLINE_S = 0.25
"""Below this, a busy machine's pauses would pass for losses."""
_MEAN_WEIGHT, _DEVIATION_WEIGHT, _NUM_DEVIATIONS = 1 / 8, 1 / 4, 4.0


class ProposeDeadline:
    """Told of every proposal; asked before each."""

    def __init__(self, max_s: float) -> None:
        """`max_s` holds while nothing is known, and bounds what is learned."""
        self._max_s = max_s
        self._mean_s: float | None = None
        self._deviation_s = 0.0
        self._mean_tokens = 0.0
        self._patience = 1.0

    def seconds(self, num_draft_tokens: int) -> float:
        """For a proposal of so many tokens."""
        if self._mean_s is None:
            return self._max_s
        longer = max(1.0, (1 + num_draft_tokens) / (1 + self._mean_tokens))
        usual_s = (self._mean_s + _NUM_DEVIATIONS * self._deviation_s) * longer
        return min(self._max_s, max(MIN_DEADLINE_S, usual_s) * self._patience)

    def arrived(self, num_draft_tokens: int, took_s: float) -> None:
        """A proposal came in time, for which so many tokens were asked."""
        self._patience = 1.0
        if self._mean_s is None:
            self._mean_s, self._deviation_s, self._mean_tokens = took_s, took_s / 2, num_draft_tokens
            return
        error_s = took_s - self._mean_s
        self._mean_s += _MEAN_WEIGHT * error_s
        self._deviation_s += _DEVIATION_WEIGHT * (abs(error_s) - self._deviation_s)
        self._mean_tokens += _MEAN_WEIGHT * (num_draft_tokens - self._mean_tokens)

    def was_late(self) -> None:
        self._patience = min(2.0 * self._patience, 1024.0)
