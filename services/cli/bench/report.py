"""What a run's samples come to: the report that `--json` writes and the tables show.

Owns: the aggregation. Must not know: how samples were taken, how the report is shown. Pure.

Rates of a mode: all its tokens over the wall time of its blocks. Per-request times: percentiles over requests, ITL over
messages, overhead over rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from services.cli.bench.acceptance import Acceptance, acceptance_before_repetition, acceptance_of, ratio
from services.cli.bench.categories import (
    CategoryReport,
    category_report,
    category_reports,
    group_reports,
    num_identical,
)
from services.cli.bench.formula import FormulaCheck, check_formula
from services.cli.bench.limits import Limits, limits_of
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
    acceptance_before_repetition: Acceptance
    coordinator_overhead_ms: Percentiles
    categories: dict[str, CategoryReport]
    groups: dict[str, CategoryReport]
    overall: CategoryReport
    limits: Limits | None
    formula: FormulaCheck | None


class FormulaTerms(NamedTuple):
    """What the formula needs besides the run: K, and c where it is given; else c is measured."""

    num_draft_tokens: int
    cost_ratio: float | None


def build_report(
    blocks: Sequence[Block], cpu_ms: dict[Mode, float] | None = None, terms: FormulaTerms | None = None
) -> Report:
    """Aggregates a run.

    `cpu_ms`: the coordinator's CPU time in each mode's blocks, where it is known. Without `terms` there is no formula.
    """
    samples = {mode: _samples(blocks, mode) for mode in Mode}
    failures = [outcome for block in blocks for outcome in block.outcomes if isinstance(outcome, Failure)]
    modes = {mode: _mode_report(blocks, mode, samples[mode], cpu_ms) for mode in Mode}
    plain, speculative = modes[Mode.PLAIN], modes[Mode.SPECULATIVE]
    keys = {outcome.key for block in blocks for outcome in block.outcomes}
    speculated = list(samples[Mode.SPECULATIVE].values())
    acceptance = acceptance_of(speculated)
    limits = limits_of(speculated, plain.decode_ms_per_token if plain else None)
    decode_ms = [mode.decode_ms_per_token if mode else None for mode in (plain, speculative)]
    decode_speedup = ratio(*decode_ms)
    return Report(
        num_requests=len(keys),
        failed_requests=len(failures),
        failures=dict(Counter(failure.error.reason for failure in failures)),
        plain=plain,
        speculative=speculative,
        speedup=ratio(speculative.tokens_per_s, plain.tokens_per_s) if plain and speculative else None,
        decode_speedup=decode_speedup,
        num_identical_outputs=num_identical(samples) if plain and speculative else None,
        acceptance=acceptance,
        acceptance_before_repetition=acceptance_before_repetition(speculated),
        coordinator_overhead_ms=Percentiles.of(ms for s in speculated for ms in s.statistics.overhead_ms),
        categories=category_reports(keys, samples),
        groups=group_reports(keys, samples),
        overall=category_report(keys, samples),
        limits=limits,
        formula=_formula(terms, acceptance, limits, decode_speedup, speculated),
    )


def _formula(
    terms: FormulaTerms | None,
    acceptance: Acceptance,
    limits: Limits | None,
    decode_speedup: float | None,
    samples: Sequence[Sample],
) -> FormulaCheck | None:
    """None where a mode, acceptance or the draft's cost was not measured."""
    alpha, alphas = acceptance.alpha, acceptance.conditional_acceptance_per_position
    if terms is None or alpha is None or decode_speedup is None:
        return None
    cost_ratio = terms.cost_ratio
    if cost_ratio is None:
        if limits is None or not limits.mean_draft_len:
            return None
        cost_ratio = limits.draft_ms / limits.mean_draft_len / limits.plain_ms_per_token
    rounds = [r for sample in samples for r in sample.statistics.rounds]
    given = terms.cost_ratio is not None
    return check_formula(
        alpha, alphas, terms.num_draft_tokens, decode_speedup, rounds, cost_ratio, cost_ratio_given=given
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
        decode_ms_per_token=ratio(decode_ms, sum(sample.num_decode_tokens for sample in measured)),
        ttft_ms=Percentiles.of(s.ttft_ns / 1e6 for s in measured if s.ttft_ns is not None),
        tpot_ms=Percentiles.of(s.tpot_ns / 1e6 for s in measured if s.tpot_ns is not None),
        itl_ms=Percentiles.of(gap / 1e6 for s in measured for gap in s.itl_ns),
        total_ms=Percentiles.of(s.total_ns / 1e6 for s in measured),
        coordinator_cpu_ms_per_round=ratio(cpu_ms[mode], num_rounds) if cpu_ms else None,
    )
