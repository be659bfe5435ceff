"""What a run's samples come to: the report that `--json` writes and the table shows.

Owns: the aggregation. Must not know: how samples were taken, how the report is shown. Pure.

Rates of a mode: all its tokens over the wall time of its blocks. Per-request times: percentiles over requests, ITL over
messages, overhead over rounds. Formula: Leviathan et al. 2023, theorem 3.8, with the conditional acceptance alpha that
the run realised: (1 - alpha^(K+1)) / ((1 - alpha)(1 + K c)), c = a draft token's time over a target forward's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from services.cli.bench.load import Block
from services.cli.bench.sample import Failure, Key, Mode, Sample


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of milliseconds; None where nothing was measured."""

    p50: float | None
    p99: float | None

    @classmethod
    def of(cls, values_ms: Iterable[float]) -> Percentiles:
        values = list(values_ms)
        if not values:
            return cls(None, None)
        p50, p99 = np.percentile(values, (50, 99))
        return cls(round(float(p50), 3), round(float(p99), 3))


@dataclass(frozen=True, slots=True)
class ModeReport:
    """One mode. `decode_ms_per_token` is pooled: all time after first messages over all tokens that arrived in it."""

    num_requests: int
    num_tokens: int
    wall_s: float
    tokens_per_s: float
    decode_ms_per_token: float | None
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    itl_ms: Percentiles
    total_ms: Percentiles
    coordinator_cpu_ms_per_round: float | None = None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What became of drafted tokens. `alpha` is the conditional acceptance, pooled over positions."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    acceptance_rate: float | None
    mean_acceptance_length: float | None
    acceptance_rate_per_position: tuple[float, ...]
    conditional_acceptance_per_position: tuple[float, ...]
    alpha: float | None


@dataclass(frozen=True, slots=True)
class CategoryReport:
    """One category. `speedup` compares the summed durations of the requests that succeeded in both modes."""

    num_requests: int
    speedup: float | None
    acceptance_rate: float | None
    mean_acceptance_length: float | None
    num_identical_outputs: int | None


@dataclass(frozen=True, slots=True)
class FormulaCheck:
    """The measured decode speed-up of a simulated cluster against the formula."""

    alpha: float
    num_draft_tokens: int
    cost_ratio: float
    predicted_speedup: float
    measured_speedup: float
    relative_error: float


@dataclass(frozen=True, slots=True)
class Report:
    """A run. `num_requests` counts each prompt once, though it was sent in each mode; `failed_requests` counts both."""

    num_requests: int
    failed_requests: int
    failures: dict[str, int]
    plain: ModeReport | None
    speculative: ModeReport | None
    speedup: float | None
    decode_speedup: float | None
    num_identical_outputs: int | None
    acceptance: Acceptance
    coordinator_overhead_ms: Percentiles
    categories: dict[str, CategoryReport]


def build_report(blocks: Sequence[Block], cpu_ms: dict[Mode, float] | None = None) -> Report:
    """Aggregates a run. `cpu_ms`: the coordinator's CPU time in each mode's blocks, where it is known."""
    samples = {mode: _samples(blocks, mode) for mode in Mode}
    failures = [outcome for block in blocks for outcome in block.outcomes if isinstance(outcome, Failure)]
    modes = {mode: _mode_report(blocks, mode, samples[mode], cpu_ms) for mode in Mode}
    plain, speculative = modes[Mode.PLAIN], modes[Mode.SPECULATIVE]
    drafted = samples[Mode.SPECULATIVE] or samples[Mode.PLAIN]
    keys = {outcome.key for block in blocks for outcome in block.outcomes}
    return Report(
        num_requests=len(keys),
        failed_requests=len(failures),
        failures=dict(Counter(failure.error.reason for failure in failures)),
        plain=plain,
        speculative=speculative,
        speedup=_ratio(speculative.tokens_per_s, plain.tokens_per_s) if plain and speculative else None,
        decode_speedup=(
            _ratio(plain.decode_ms_per_token, speculative.decode_ms_per_token) if plain and speculative else None
        ),
        num_identical_outputs=_num_identical(samples) if plain and speculative else None,
        acceptance=acceptance_of(samples[Mode.SPECULATIVE].values()),
        coordinator_overhead_ms=Percentiles.of(ms for s in drafted.values() for ms in s.statistics.overhead_ms),
        categories=_categories(keys, samples),
    )


def acceptance_of(samples: Iterable[Sample]) -> Acceptance:
    """Pools the statistics of generations."""
    statistics = [sample.statistics for sample in samples]
    drafts = sum(s.num_drafts for s in statistics)
    drafted = sum(s.num_draft_tokens for s in statistics)
    accepted = sum(s.num_accepted_tokens for s in statistics)
    accepted_at = [sum(at) for at in zip_longest(*(s.num_accepted_tokens_per_pos for s in statistics), fillvalue=0)]
    verified_at = [sum(at) for at in zip_longest(*(s.num_verified_tokens_per_pos for s in statistics), fillvalue=0)]
    conditional = [_ratio(a, v) for a, v in zip(accepted_at, verified_at, strict=False)]
    return Acceptance(
        num_drafts=drafts,
        num_draft_tokens=drafted,
        num_accepted_tokens=accepted,
        acceptance_rate=_ratio(accepted, drafted),
        mean_acceptance_length=1 + accepted / drafts if drafts else None,
        acceptance_rate_per_position=tuple(round(a / drafts, 4) for a in accepted_at) if drafts else (),
        conditional_acceptance_per_position=tuple(value for value in conditional if value is not None),
        alpha=_ratio(sum(accepted_at), sum(verified_at)),
    )


def check_formula(report: Report, num_draft_tokens: int, cost_ratio: float) -> FormulaCheck | None:
    """None where a mode, or acceptance, was not measured."""
    alpha, measured = report.acceptance.alpha, report.decode_speedup
    if alpha is None or measured is None:
        return None
    length = num_draft_tokens + 1.0 if alpha == 1 else (1 - alpha ** (num_draft_tokens + 1)) / (1 - alpha)
    predicted = length / (1 + num_draft_tokens * cost_ratio)
    return FormulaCheck(
        alpha=alpha,
        num_draft_tokens=num_draft_tokens,
        cost_ratio=cost_ratio,
        predicted_speedup=round(predicted, 4),
        measured_speedup=measured,
        relative_error=round(measured / predicted - 1, 4),
    )


def _samples(blocks: Sequence[Block], mode: Mode) -> dict[Key, Sample]:
    outcomes = (outcome for block in blocks if block.mode is mode for outcome in block.outcomes)
    return {outcome.key: outcome for outcome in outcomes if isinstance(outcome, Sample)}


def _mode_report(
    blocks: Sequence[Block], mode: Mode, samples: dict[Key, Sample], cpu_ms: dict[Mode, float] | None
) -> ModeReport | None:
    if not any(block.mode is mode for block in blocks):
        return None
    measured = list(samples.values())
    wall_s = sum(block.wall_ns for block in blocks if block.mode is mode) / 1e9
    num_tokens = sum(sample.num_tokens for sample in measured)
    num_rounds = sum(sample.statistics.num_rounds for sample in measured)
    decode_ms = sum(sample.decode_ns for sample in measured) / 1e6
    return ModeReport(
        num_requests=len(measured),
        num_tokens=num_tokens,
        wall_s=round(wall_s, 3),
        tokens_per_s=round(num_tokens / wall_s, 3) if wall_s else 0.0,
        decode_ms_per_token=_ratio(decode_ms, sum(sample.num_decode_tokens for sample in measured)),
        ttft_ms=Percentiles.of(s.ttft_ns / 1e6 for s in measured if s.ttft_ns is not None),
        tpot_ms=Percentiles.of(s.tpot_ns / 1e6 for s in measured if s.tpot_ns is not None),
        itl_ms=Percentiles.of(gap / 1e6 for s in measured for gap in s.itl_ns),
        total_ms=Percentiles.of(s.total_ns / 1e6 for s in measured),
        coordinator_cpu_ms_per_round=_ratio(cpu_ms[mode], num_rounds) if cpu_ms else None,
    )


def _num_identical(samples: dict[Mode, dict[Key, Sample]]) -> int:
    plain, speculative = samples[Mode.PLAIN], samples[Mode.SPECULATIVE]
    return sum(plain[key].token_ids == speculative[key].token_ids for key in plain.keys() & speculative.keys())


def _categories(keys: set[Key], samples: dict[Mode, dict[Key, Sample]]) -> dict[str, CategoryReport]:
    reports = {}
    for category in sorted({key.category for key in keys}):
        of = {mode: {k: s for k, s in samples[mode].items() if k.category == category} for mode in Mode}
        both = of[Mode.PLAIN].keys() & of[Mode.SPECULATIVE].keys()
        plain_ns, speculative_ns = (sum(of[mode][key].total_ns for key in both) for mode in Mode)
        acceptance = acceptance_of(of[Mode.SPECULATIVE].values())
        reports[category] = CategoryReport(
            num_requests=sum(key.category == category for key in keys),
            speedup=_ratio(plain_ns, speculative_ns),
            acceptance_rate=acceptance.acceptance_rate,
            mean_acceptance_length=acceptance.mean_acceptance_length,
            num_identical_outputs=_num_identical(of) if both else None,
        )
    return reports


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return round(numerator / denominator, 4) if numerator is not None and denominator else None
