"""How long a step takes, learned from steps observed: what a row costs, what a token of prefill costs.

Owns: the estimates. Must not know: clocks, sequences, who wants a step. Times in nanoseconds.

    t(rows, prefill) = base + row * rows + prefill_token * prefill

Steps without prefill give base and row, by exponentially weighted least squares on (rows, time); where all had equally
many rows, a row costs nothing more. Steps with prefill give prefill_token: their time beyond that of their rows, per
token, over the last few hundred tokens of prefill. A step that lasted less than its rows should counts as it was, so
that noise cancels out; and what rows cost is taken from what is known of it when it is asked for, so that prefill seen
before any rows is too much only until rows are seen.
"""

from __future__ import annotations

import math

ROW_DECAY = 0.98
PREFILL_HORIZON = 256
"""Tokens of prefill after which a step with prefill weighs 1 / e: as much in few large steps as in many small ones."""
MIN_ROW_VARIANCE = 0.25


class StepTimes:
    """Estimates of one device's step times."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._mean_rows = 0.0
        self._mean_ns = 0.0
        self._variance = 0.0
        self._covariance = 0.0
        self._prefill_tokens = 0.0
        self._prefill_steps = 0.0
        self._prefill_rows = 0.0
        self._prefill_ns = 0.0
        """Of the steps with prefill, whole."""

    def observe(self, num_rows: int, num_prefill_tokens: int, duration_ns: int) -> None:
        """Takes in a step that has been computed."""
        if not num_prefill_tokens:
            self._observe_rows(num_rows, duration_ns)
        else:
            kept = math.exp(-num_prefill_tokens / PREFILL_HORIZON)
            self._prefill_tokens = kept * self._prefill_tokens + num_prefill_tokens
            self._prefill_steps = kept * self._prefill_steps + 1.0
            self._prefill_rows = kept * self._prefill_rows + num_rows
            self._prefill_ns = kept * self._prefill_ns + duration_ns

    def rows_ns(self, num_rows: float) -> float:
        """A step of that many rows, without prefill. 0 before the first one was seen."""
        row_ns = max(0.0, self._covariance / self._variance) if self._variance > MIN_ROW_VARIANCE else 0.0
        return max(0.0, self._mean_ns + row_ns * (num_rows - self._mean_rows))

    @property
    def knows_rows(self) -> bool:
        """Whether a step without prefill was seen."""
        return self._weight > 0

    @property
    def mean_ns(self) -> float:
        """The steps without prefill, averaged."""
        return self._mean_ns

    @property
    def prefill_token_ns(self) -> float | None:
        """What a step takes longer for each token of prefill. None before that was seen."""
        if not self._prefill_tokens:
            return None
        rows_ns = self._prefill_steps * self.rows_ns(self._prefill_rows / self._prefill_steps)
        return max(0.0, self._prefill_ns - rows_ns) / self._prefill_tokens

    @property
    def num_tokens_known(self) -> int:
        """What a step's cost is known of: the tokens that prefill's estimate rests on, or the rows of a usual step."""
        return int(max(self._prefill_tokens, self._mean_rows))

    def _observe_rows(self, num_rows: int, duration_ns: int) -> None:
        """Weighted means, variance and covariance in one pass (West 1979, "Updating mean and variance estimates")."""
        self._weight = ROW_DECAY * self._weight + 1.0
        share = 1.0 / self._weight
        rows_off, ns_off = num_rows - self._mean_rows, duration_ns - self._mean_ns
        self._mean_rows += share * rows_off
        self._mean_ns += share * ns_off
        self._variance = (1.0 - share) * (self._variance + share * rows_off * rows_off)
        self._covariance = (1.0 - share) * (self._covariance + share * rows_off * ns_off)
