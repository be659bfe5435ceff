"""How long a step takes, learned from steps observed: what a row costs, what a token of prefill costs.

Owns: the estimates. Must not know: clocks, sequences, who wants a step. Times in nanoseconds.

    t(rows, prefill) = base + row * rows + prefill_token * prefill

Steps without prefill give base and row, by exponentially weighted least squares on (rows, time); where all had equally
many rows, a row costs nothing more. Steps with prefill give prefill_token: the time beyond that of their rows, per
token, exponentially weighted by tokens; before rows were seen alone that is too much, and the newer steps correct it.
"""

from __future__ import annotations

ROW_DECAY = 0.98
PREFILL_DECAY = 0.8
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
        self._prefill_ns = 0.0

    def observe(self, num_rows: int, num_prefill_tokens: int, duration_ns: int) -> None:
        """Takes in a step that has been computed."""
        if not num_prefill_tokens:
            self._observe_rows(num_rows, duration_ns)
        else:
            excess_ns = max(0.0, duration_ns - self.rows_ns(num_rows))
            self._prefill_tokens = PREFILL_DECAY * self._prefill_tokens + num_prefill_tokens
            self._prefill_ns = PREFILL_DECAY * self._prefill_ns + excess_ns

    def rows_ns(self, num_rows: int) -> float:
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
        return self._prefill_ns / self._prefill_tokens if self._prefill_tokens else None

    def _observe_rows(self, num_rows: int, duration_ns: int) -> None:
        """Weighted means, variance and covariance in one pass (West 1979, "Updating mean and variance estimates")."""
        self._weight = ROW_DECAY * self._weight + 1.0
        share = 1.0 / self._weight
        rows_off, ns_off = num_rows - self._mean_rows, duration_ns - self._mean_ns
        self._mean_rows += share * rows_off
        self._mean_ns += share * ns_off
        self._variance = (1.0 - share) * (self._variance + share * rows_off * rows_off)
        self._covariance = (1.0 - share) * (self._covariance + share * rows_off * ns_off)
