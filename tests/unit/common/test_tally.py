"""Counts without a library: histograms against counting by hand, and bounds on what may be told apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.common.metrics import Families, Family
from services.common.tally import MAX_CALL_KINDS, OTHER, CallKind, CallTally, Histogram, Watched, WorkerTally
from services.common.values import DeviceUsage
from services.coordinator.tally import MAX_KINDS, CoordinatorTally, GenerationTally, Kind

BOUNDS = (0.5, 1.0, 2.0)


@given(st.lists(st.sampled_from([0.0, 0.4, 0.5, 0.6, 1.0, 1.5, 2.0, 2.1, 100.0])))
def test_a_histogram_in_the_exposition_counts_as_one_by_hand(values: list[float]) -> None:
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.observe(value)
    samples = {(s.name, s.labels.get("le")): s.value for s in exposed(histogram)}
    for bound in BOUNDS:
        assert samples["outrider_h_bucket", str(bound)] == sum(value <= bound for value in values)
    assert samples["outrider_h_bucket", "+Inf"] == samples["outrider_h_count", None] == histogram.count == len(values)
    assert abs(samples["outrider_h_sum", None] - sum(values)) < 1e-9


def exposed(histogram: Histogram) -> list:
    class One:
        def collect(self):
            yield Families({"role": "x"}).histogram(Family("h", "Help."), [((), histogram)])

        def describe(self):
            return ()

    registry = CollectorRegistry()
    registry.register(One())
    [family] = text_string_to_metric_families(generate_latest(registry).decode())
    assert all(sample.labels["role"] == "x" for sample in family.samples)
    return family.samples


def test_reasons_beyond_the_bound_are_one() -> None:
    calls = CallTally([CallKind("Generate", "INTERNAL", "DEFECT")])
    for number in range(2 * MAX_CALL_KINDS):
        calls.ended("Generate", "INTERNAL", f"R{number}")
    calls.ended("Generate", "INTERNAL", "DEFECT")
    assert len(calls.counts) == MAX_CALL_KINDS + 1
    assert calls.counts[CallKind("Generate", "INTERNAL", OTHER)] == MAX_CALL_KINDS + 1
    assert calls.counts[CallKind("Generate", "INTERNAL", "DEFECT")] == 1


def test_kinds_of_generations_beyond_the_bound_are_one() -> None:
    tally = CoordinatorTally()
    tallies = [tally.of(Kind("model", f"pool{number}")) for number in range(2 * MAX_KINDS)]
    assert len(tally.kinds) == MAX_KINDS + 1
    assert tallies[-1] is tallies[MAX_KINDS] is not tallies[0]
    assert tally.of(Kind("model", "pool0")) is tallies[0]


@given(st.lists(st.integers(1, 16).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))))
def test_positions_are_counted_as_vllm_does_and_those_behind_a_rejection_were_not_reached(
    rounds: list[tuple[int, int]],
) -> None:
    tally = GenerationTally()
    for num_drafted, num_accepted in rounds:
        tally.draft(num_drafted, num_accepted)
    for position in range(16):
        assert tally.accepted_per_pos[position] == sum(accepted > position for _, accepted in rounds)
        assert tally.verified_per_pos[position] == sum(
            drafted > position and accepted >= position for drafted, accepted in rounds
        )
    assert sum(tally.accepted_per_pos) == tally.num_accepted_tokens == sum(accepted for _, accepted in rounds)


def test_a_workers_activity_is_what_its_tally_adds_up_to() -> None:
    tally = WorkerTally()
    tally.step(num_sequences=3, num_rows=9, num_prefill_tokens=5, duration_ns=2_000_000)
    tally.step(num_sequences=1, num_rows=1, num_prefill_tokens=0, duration_ns=1_000_000)
    tally.answered(4, 500_000)
    activity = Watched(tally, lambda: (10, 6), lambda: DeviceUsage(1, 2), lambda: 0.5).activity()
    assert (activity.num_steps, activity.num_step_sequences, activity.num_step_rows) == (2, 4, 10)
    assert (activity.busy_ns, activity.num_prefill_tokens, activity.num_tokens) == (3_000_000, 5, 4)
    assert (activity.num_answers, activity.queue_ns) == (1, 500_000)
    assert (activity.num_prefix_tokens, activity.num_prefix_hit_tokens) == (10, 6)
    assert (activity.memory_used_bytes, activity.memory_total_bytes) == (1, 2)
