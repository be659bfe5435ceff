"""The benchmark's arithmetic: what was measured in, ratios and shares out.

Owns: the definitions of the figures. Must not know: how anything is measured or shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Peer:
    """transformers' `generate` in one configuration. Tokens a second, one sequence, a value a round."""

    name: str
    dtype: str
    tokens_per_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.tokens_per_s)


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one run; every list has a value a round, and the rounds take their turns at everything."""

    dtype: str
    weight_bytes: int
    """Read by every step, whatever its rows."""
    bandwidths: list[float] = field(default_factory=list)
    """Bytes a second of reading a large array."""
    step_ms: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """By (sequences, rows of each)."""
    tokens_per_s: dict[int, list[float]] = field(default_factory=dict)
    """Plain decoding by the number of concurrent sequences, over all of them, while all decode."""
    burst_tokens_per_s: dict[int, list[float]] = field(default_factory=dict)
    """The same from the arrival of all requests at once until the last is done, prefill included."""
    peers: list[Peer] = field(default_factory=list)
    cold_ttft_ms: list[float] = field(default_factory=list)
    hit_ttft_ms: list[float] = field(default_factory=list)
    alone_gaps_ms: list[list[float]] = field(default_factory=list)
    """Times between tokens of decoding sequences; a list a round."""
    beside_prefill_gaps_ms: list[list[float]] = field(default_factory=list)
    continuous: dict[str, Any] = field(default_factory=dict)
    """transformers' continuous batching, or why it has no figure."""
    failed_peers: dict[str, str] = field(default_factory=dict)
    """Peers without a figure, and the reason."""
    sharing: dict[str, dict[str, float]] = field(default_factory=dict)
    """Steps a second of draft and target with a core each, alone and beside each other."""
    lag: dict[int, dict[str, Any]] = field(default_factory=dict)
    """How late a target worker's event loop is during forwards, by the forward's threads (0: one a core)."""

    @property
    def bandwidth(self) -> float:
        """The best round: what else runs on the machine can only take from it."""
        return max(self.bandwidths)

    @property
    def limit_ms(self) -> float:
        """The least a step can take: the weights read once."""
        return self.weight_bytes / self.bandwidth * 1e3

    def step(self, sequences: int, rows: int) -> float:
        """Median milliseconds."""
        return statistics.median(self.step_ms[sequences, rows])

    def rate(self, sequences: int) -> float:
        """Median tokens a second."""
        return statistics.median(self.tokens_per_s[sequences])

    def burst_rate(self, sequences: int) -> float:
        """Median tokens a second, prefill included."""
        return statistics.median(self.burst_tokens_per_s[sequences])

    def step_share(self, sequences: int, rows: int) -> float:
        """Of the limit for a step."""
        return self.limit_ms / self.step(sequences, rows)

    def rate_share(self, tokens_per_s: float, sequences: int = 1) -> float:
        """Of the rate at which each step takes no longer than the weights' reading and gives each sequence a token."""
        return tokens_per_s * self.limit_ms / 1e3 / sequences


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run is judged by."""

    plain_vs_transformers: float
    """Tokens a second over those of the fastest peer in the same dtype."""
    plain_vs_transformers_any_dtype: float
    rows8_vs_rows1: float
    concurrency16_vs_1: float
    """Tokens a second of 16 requests that come together over those of one, prefill included on both sides."""
    steady_concurrency16_vs_1: float
    """The same while all of them decode."""
    share_of_bandwidth_limit: float
    """Of a step of one row."""
    prefix_hit_ttft_ratio: float
    prefill_interference_p50_ratio: float
    """Times between tokens of sequences beside a prefill over those without it, of the rounds' medians the median."""
    prefill_interference_p99_ratio: float
    """The same of the rounds' 99th percentiles: a moment's noise of the machine concerns one round alone."""


def figures(measured: Measured) -> Figures:
    """Medians over the rounds, then their ratios."""
    plain = measured.rate(1)
    same = max(peer.rate for peer in measured.peers if peer.dtype == measured.dtype)
    return Figures(
        plain_vs_transformers=plain / same,
        plain_vs_transformers_any_dtype=plain / max(peer.rate for peer in measured.peers),
        rows8_vs_rows1=measured.step(1, 8) / measured.step(1, 1),
        concurrency16_vs_1=measured.burst_rate(16) / measured.burst_rate(1),
        steady_concurrency16_vs_1=measured.rate(16) / plain,
        share_of_bandwidth_limit=measured.step_share(1, 1),
        prefix_hit_ttft_ratio=statistics.median(measured.hit_ttft_ms) / statistics.median(measured.cold_ttft_ms),
        prefill_interference_p50_ratio=interference(measured, 50),
        prefill_interference_p99_ratio=interference(measured, 99),
    )


QUANTILES = (50, 90, 99, 100)


def quantiles(rounds: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Each round's percentiles, and how many values they are of."""
    found = {f"p{percent}": [percentile(values, percent) for values in rounds] for percent in QUANTILES}
    return {**found, "count": [float(len(values)) for values in rounds]}


def interference(measured: Measured, percent: float) -> float:
    """The median over the rounds of a percentile beside a prefill over the same round's without."""
    rounds = zip(measured.beside_prefill_gaps_ms, measured.alone_gaps_ms, strict=True)
    return statistics.median(percentile(beside, percent) / percentile(alone, percent) for beside, alone in rounds)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is at least as large as `percent` of all (nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
