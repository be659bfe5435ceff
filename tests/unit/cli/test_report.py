"""The aggregation of a run, on samples with known answers."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cli.bench.document import CaseReport, Document, as_object
from services.cli.bench.load import Block
from services.cli.bench.machine import environment
from services.cli.bench.report import FormulaTerms, Percentiles, build_report
from services.cli.bench.sample import Failure, Key, Mode, Sample
from services.cli.bench.show import figures
from services.cli.bench.sweep import Case
from services.client import Round, Statistics
from services.common.errors import Unavailable
from services.common.values import VerificationMethod

MS = 1_000_000
DRAFTED = Statistics(
    num_drafts=4,
    num_draft_tokens=8,
    num_accepted_tokens=5,
    num_accepted_tokens_per_pos=(3, 2),
    num_verified_tokens_per_pos=(4, 3),
    num_rounds=5,
    overhead_ms=(0.2, 0.4),
)


def sample(index: int, mode: Mode, arrivals: tuple[tuple[int, int], ...], category: str = "qa") -> Sample:
    count = sum(n for _, n in arrivals)
    statistics = DRAFTED if mode is Mode.SPECULATIVE else Statistics(num_rounds=count)
    arrivals_ns = tuple((at * MS, n) for at, n in arrivals)
    return Sample(Key(index, 0, category), mode, 0, arrivals_ns, tuple(range(count)), statistics)


def run() -> list[Block]:
    plain = sample(0, Mode.PLAIN, ((100, 1), (200, 1), (300, 1), (400, 1), (500, 1)))
    speculative = sample(0, Mode.SPECULATIVE, ((100, 1), (200, 3), (300, 1)))
    return [Block(Mode.PLAIN, (plain,), 500 * MS), Block(Mode.SPECULATIVE, (speculative,), 250 * MS)]


def test_rates_and_latencies_of_the_modes():
    report = build_report(run())
    assert report.plain is not None
    assert report.speculative is not None
    assert (report.plain.tokens_per_s, report.speculative.tokens_per_s) == (10.0, 20.0)
    assert report.plain.ttft_ms == Percentiles(100.0, 100.0)
    assert report.speculative.tpot_ms == Percentiles(50.0, 50.0)
    assert report.speculative.itl_ms == Percentiles(100.0, 100.0)
    assert (report.speedup, report.decode_speedup) == (2.0, 2.0)


def test_tokens_of_the_first_message_are_not_in_tpot():
    report = build_report([Block(Mode.PLAIN, (sample(0, Mode.PLAIN, ((100, 3), (200, 2))),), MS)])
    assert report.plain is not None
    assert report.plain.tpot_ms.p50 == 50.0


def test_acceptance_is_censored_per_position():
    acceptance = build_report(run()).acceptance
    assert acceptance.acceptance_rate == 0.625
    assert acceptance.mean_acceptance_length == 2.25
    assert acceptance.acceptance_rate_per_position == (0.75, 0.5)
    assert acceptance.conditional_acceptance_per_position == (0.75, 0.6667)
    assert acceptance.alpha == pytest.approx(5 / 7, abs=1e-4)


def test_outputs_are_compared_by_prompt():
    blocks = run()
    other = dataclasses.replace(sample(1, Mode.PLAIN, ((1, 2),)), token_ids=(1, 2))
    twin = dataclasses.replace(other, mode=Mode.SPECULATIVE, token_ids=(1, 3))
    report = build_report([*blocks, Block(Mode.PLAIN, (other,), MS), Block(Mode.SPECULATIVE, (twin,), MS)])
    assert (report.num_requests, report.num_identical_outputs) == (2, 1)


def test_failures_are_counted_by_reason_and_not_compared():
    failure = Failure(Key(1, 0, "qa"), Mode.PLAIN, Unavailable("NO_TARGET", "no target"))
    report = build_report([*run(), Block(Mode.PLAIN, (failure,), MS)])
    assert (report.num_requests, report.failed_requests, report.failures) == (2, 1, {"NO_TARGET": 1})
    assert (report.num_identical_outputs, report.overall.num_compared) == (1, 1)
    assert "identical outputs 1/1, failed requests 1" in figures(report)


def test_a_categorys_speedup_is_of_rates_where_outputs_differ_in_length():
    plain = sample(0, Mode.PLAIN, ((100, 1), (200, 1)))
    speculative = sample(0, Mode.SPECULATIVE, ((100, 1), (200, 3)))
    report = build_report([Block(Mode.PLAIN, (plain,), 200 * MS), Block(Mode.SPECULATIVE, (speculative,), 200 * MS)])
    assert report.speedup == report.categories["qa"].speedup == 2.0


def test_cpu_time_is_divided_by_rounds():
    report = build_report(run(), {Mode.PLAIN: 10.0, Mode.SPECULATIVE: 20.0})
    assert report.plain is not None
    assert report.speculative is not None
    assert report.plain.coordinator_cpu_ms_per_round == 2.0
    assert report.speculative.coordinator_cpu_ms_per_round == 4.0


def test_a_mode_that_was_not_run_is_none():
    report = build_report(run()[:1])
    assert (report.speculative, report.speedup, report.num_identical_outputs) == (None, None, None)
    assert report.categories["qa"].speedup is None


def test_formula_of_the_contract():
    report = build_report(run(), terms=FormulaTerms(4, 0.1))
    check = report.formula
    assert check is not None
    alpha = report.acceptance.alpha or 0.0
    assert check.predicted_speedup == pytest.approx((1 - alpha**5) / ((1 - alpha) * 1.4), abs=1e-4)
    assert check.relative_error == pytest.approx(2.0 / check.predicted_speedup - 1, abs=1e-3)
    assert check.cost_ratio_given


def test_formula_where_everything_is_accepted():
    perfect = dataclasses.replace(DRAFTED, num_accepted_tokens_per_pos=(4, 4), num_verified_tokens_per_pos=(4, 4))
    blocks = run()
    sample_of = blocks[1].outcomes[0]
    assert isinstance(sample_of, Sample)
    blocks[1] = Block(Mode.SPECULATIVE, (dataclasses.replace(sample_of, statistics=perfect),), 250 * MS)
    check = build_report(blocks, terms=FormulaTerms(4, 0.0)).formula
    assert check is not None
    assert check.predicted_speedup == 5.0


def test_cost_is_measured_where_it_is_not_given():
    assert build_report(run(), terms=FormulaTerms(4, None)).formula is None
    rounds = (Round(1, 4, 3, 20.0, 100.0), Round(5, 4, 0, 20.0, 100.0))
    blocks = run()
    sample_of = blocks[1].outcomes[0]
    assert isinstance(sample_of, Sample)
    drafted = dataclasses.replace(DRAFTED, rounds=rounds, overhead_ms=(1.0, 1.0))
    blocks[1] = Block(Mode.SPECULATIVE, (dataclasses.replace(sample_of, statistics=drafted),), 250 * MS)
    check = build_report(blocks, terms=FormulaTerms(4, None)).formula
    assert check is not None
    assert (check.cost_ratio, check.cost_ratio_given) == (0.05, False)


def test_json_has_the_promised_fields():
    case = CaseReport(Case("ngram", 4, 0.0, VerificationMethod.COUPLED), build_report(run()), ())
    document = Document(
        (case,), {}, environment(["bench", "--prompts", "/a/b/c.jsonl", "--json=/a/d.json", "--seed=1"])
    )
    fields = json.loads(json.dumps(as_object(document)))
    for mode in ("plain", "speculative"):
        assert isinstance(fields[mode]["tokens_per_s"], float)
        for latency in ("ttft_ms", "tpot_ms", "itl_ms"):
            assert set(fields[mode][latency]) == {"p50", "p99"}
    names = "num_requests failed_requests speedup acceptance_rate mean_acceptance_length acceptance_rate_per_position"
    assert set(names.split()) | {"num_identical_outputs", "coordinator_overhead_ms"} <= fields.keys()
    assert fields["environment"]["command"] == "outrider bench --prompts c.jsonl --json=d.json --seed=1"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1e6), max_size=30))
def test_percentiles_lie_within_the_values(values):
    percentiles = Percentiles.of(values)
    if not values:
        assert percentiles == Percentiles(None, None)
        return
    assert percentiles.p50 is not None
    assert percentiles.p99 is not None
    assert min(values) - 1e-3 <= percentiles.p50 <= percentiles.p99 <= max(values) + 1e-3
