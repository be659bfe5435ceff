"""How long a round takes, learned from what rounds and decoded tokens took.

Owns: the model of a target that many sequences share, and its estimates. Must not know: clocks, acceptance, who asks.
Times in nanoseconds.

    t(rows)      a step of the target: base + row * rows, by least squares over the means of similar numbers of rows.
                 Means of sizes that are not in use stay, so that the price of a row is known where all steps are alike
    d            a drafted token, from the draft worker's own times
    plain        t(N) + rest_0(N)                                                N sequences decode, a token a step
    round(K)     min over m of max(m * t(R / m), K * d + t(R / m)) + rest_1(N)   R rows of N sequences that draft

m is the number of groups that the sequences fall into. With one, the target idles while they draft; with more it
computes one group's step while the others draft, so that drafting costs nothing until it outlasts the others' steps.
The target's hold keeps them in the number that is best. The rests are what rounds and tokens took beyond the model, on
average: network, commits, waiting, and whatever the model does not know. They belong to about as many sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_GROUPS = 4
TIME_WEIGHT = 0.125
REST_ROUNDS = 4
"""Rounds, of each sequence, that a rest is the average of. The first ones find the others out of step."""
MAX_COUNT = 32.0
DOUBT = 2
"""Probes, for each sequence, after which about a third is left of what rounds took beyond the model."""
STALE_AFTER = 4000
"""Observed steps after which a size that did not occur counts half."""
OUTLIER = 2.0
"""What took longer than so many times the expected counts as that: prefill beside it, or a process in between."""
MAX_WALL = 1.5
"""The same for a whole round, or a token: those out of step with the others are to weigh little."""
FIRST_COUNT = 4
"""Observations before anything can be called an outlier."""


@dataclass(slots=True)
class Mean:
    """An exponentially weighted mean; the first observations count alike."""

    value: float = 0.0
    count: float = 0.0

    def observe(self, value: float, weight: float) -> None:
        self.count += 1
        self.value += max(weight, 1.0 / self.count) * (value - self.value)

    def observe_time(self, value: float, weight: float) -> None:
        """A duration; an outlier is cut."""
        self.observe(min(value, OUTLIER * self.value) if self.count >= FIRST_COUNT else value, weight)


@dataclass(slots=True)
class _Size:
    """Steps of about the same number of rows."""

    rows: Mean
    time_ns: Mean
    last: int = 0


class TargetTimes:
    """Steps of one target."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._num_observed = 0
        self._base_ns = self._row_ns = 0.0
        self._newest = (0, 0)
        self._stale = False
        self._version = 0

    @property
    def known(self) -> bool:
        return bool(self._sizes)

    @property
    def version(self) -> int:
        """Grows with every new fit."""
        self._fit()
        return self._version

    @property
    def row_ns(self) -> float:
        """What a row costs beyond the step."""
        self._fit()
        return self._row_ns

    def rows_ns(self, num_rows: float) -> float:
        self._fit()
        return self._base_ns + self._row_ns * num_rows

    def observe(self, num_rows: int, step_ns: int) -> None:
        size = self._sizes.setdefault(_bucket(num_rows), _Size(Mean(), Mean()))
        self._num_observed += 1
        size.rows.observe(num_rows, TIME_WEIGHT)
        size.time_ns.observe_time(step_ns, TIME_WEIGHT)
        size.last = self._num_observed
        if self._newest != (num_rows, step_ns):  # else all sequences of one step tell of it, which is fitted once
            self._newest, self._stale = (num_rows, step_ns), True

    def _fit(self) -> None:
        """Weighted least squares over the sizes."""
        if not self._stale:
            return
        self._stale = False
        self._version += 1
        points = [(self._weight(s), s.rows.value, s.time_ns.value) for s in self._sizes.values()]
        total = sum(w for w, _, _ in points)
        mean_rows = sum(w * rows for w, rows, _ in points) / total
        mean_ns = sum(w * ns for w, _, ns in points) / total
        variance = sum(w * (rows - mean_rows) ** 2 for w, rows, _ in points)
        covariance = sum(w * (rows - mean_rows) * (ns - mean_ns) for w, rows, ns in points)
        slope = covariance / variance if variance > 0.0 else 0.0
        self._row_ns = min(max(0.0, slope), mean_ns / mean_rows)
        self._base_ns = mean_ns - self._row_ns * mean_rows

    def _weight(self, size: _Size) -> float:
        return float(min(size.time_ns.count, MAX_COUNT) * 0.5 ** ((self._num_observed - size.last) / STALE_AFTER))


class RoundCost:
    """Rounds and decoded tokens of the sequences that share a draft pool and a target."""

    def __init__(self) -> None:
        self.target = TargetTimes()
        self._token = Mean()
        self._rests: tuple[dict[int, float], dict[int, float]] = ({}, {})
        self._modelled: tuple[tuple[float, ...], float] = ((), 0.0)
        """The round that was last asked for, and its time without a rest: all sequences ask for the same one."""

    @property
    def known(self) -> bool:
        """Whether the target and the draft have been seen at work."""
        return self.target.known and self._token.count > 0

    def plain_ns(self, num_sequences: int) -> float:
        """A decoded token of each of them."""
        return self._with_rest(False, num_sequences, self.target.rows_ns(num_sequences))

    def round_ns(self, num_sequences: int, num_rows: float, num_draft_tokens: int) -> float:
        """A round of each of them, with that many rows in all and at most that many tokens to be drafted."""
        return self._with_rest(True, num_sequences, self._round_ns(num_sequences, num_rows, num_draft_tokens))

    def observe_step(self, num_rows: int, step_ns: int) -> None:
        if num_rows and step_ns:
            self.target.observe(num_rows, step_ns)

    def observe_draft(self, num_tokens: int, forward_ns: int) -> None:
        if num_tokens:
            self._token.observe_time(forward_ns / num_tokens, TIME_WEIGHT)

    def observe_plain(self, num_sequences: int, wall_ns: int) -> None:
        """The time from one decoded token of a sequence to its next."""
        self._observe_rest(False, num_sequences, self.target.rows_ns(num_sequences), wall_ns)

    def observe_round(self, num_sequences: int, num_rows: float, num_draft_tokens: int, wall_ns: int) -> None:
        """A round of one of them, where all did as these numbers say."""
        key = (num_sequences, num_rows, num_draft_tokens, self.target.version)
        if self._modelled[0] != key:
            self._modelled = key, self._round_ns(num_sequences, num_rows, num_draft_tokens)
        self._observe_rest(True, num_sequences, self._modelled[1], wall_ns)

    def doubt(self, num_sequences: int) -> None:
        """Expects rounds to take a little less than they did: while nobody drafts, that may have changed."""
        rests, size = self._rests[True], num_sequences.bit_length()
        rests[size] = self._rest(True, num_sequences) * (1.0 - 1.0 / (DOUBT * num_sequences))

    def _round_ns(self, num_sequences: int, num_rows: float, num_draft_tokens: int) -> float:
        gap_ns = num_draft_tokens * self._token.value
        best_ns = float("inf")
        for groups in range(1, min(num_sequences, MAX_GROUPS) + 1):
            step_ns = self.target.rows_ns(num_rows / groups)
            best_ns = min(best_ns, max(groups * step_ns, gap_ns + step_ns))
        return best_ns

    def _observe_rest(self, drafting: bool, num_sequences: int, model_ns: float, wall_ns: float) -> None:
        rest_ns = self._rest(drafting, num_sequences)
        off_ns = min(wall_ns, MAX_WALL * max(model_ns, model_ns + rest_ns)) - model_ns - rest_ns
        self._rests[drafting][num_sequences.bit_length()] = rest_ns + off_ns / (REST_ROUNDS * num_sequences)

    def _with_rest(self, drafting: bool, num_sequences: int, model_ns: float) -> float:
        return max(0.5 * model_ns, model_ns + self._rest(drafting, num_sequences))

    def _rest(self, drafting: bool, num_sequences: int) -> float:
        """That of the nearest number of sequences that was seen; 0 before any was."""
        rests, size = self._rests[drafting], num_sequences.bit_length()
        nearest = min(rests, key=lambda seen: abs(seen - size), default=None)
        return rests[nearest] if nearest is not None else 0.0


def _bucket(num_rows: int) -> int:
    """Equal for numbers of rows that differ by less than an eighth or so."""
    if num_rows < 8:
        return num_rows
    shift = num_rows.bit_length() - 4
    return (num_rows >> shift) + 8 * shift
