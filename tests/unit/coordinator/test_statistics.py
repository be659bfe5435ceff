from __future__ import annotations

import time

import pytest

from services.common.items import Identity, Proposed, Timings, Tokens
from services.common.values import FinishReason, Proposal
from services.coordinator.statistics import GenerationStatistics, StatisticsCollector
from services.coordinator.tally import GenerationTally

IDENTITY = Identity("s", 1, 1, 0, 5)


def a_collector() -> StatisticsCollector:
    return StatisticsCollector(arrived_ns=time.perf_counter_ns(), lossy=False, num_replaced_tokens=0)


def count(collector: StatisticsCollector, drafted: int, accepted: int, kept: int | None = None) -> None:
    proposed = Proposed(IDENTITY, Proposal(1, (1,) * drafted), Timings(total_ns=2_000_000))
    tokens = (1,) * (accepted + 1)
    verified = Tokens(IDENTITY, tokens, accepted, drafted, True, timings=Timings(total_ns=3_000_000))
    collector.round(proposed, verified, len(tokens) if kept is None else kept, 6_000_000, 7)


def snapshot(collector: StatisticsCollector) -> GenerationStatistics:
    return collector.snapshot(num_prompt_tokens=5, num_generated_tokens=1)


def test_positions_behind_the_first_rejection_are_censored() -> None:
    collector = a_collector()
    count(collector, drafted=4, accepted=1)
    count(collector, drafted=4, accepted=4)
    statistics = snapshot(collector)
    assert statistics.num_accepted_tokens_per_pos == (2, 1, 1, 1)
    assert statistics.num_verified_tokens_per_pos == (2, 2, 1, 1)
    assert (statistics.num_drafts, statistics.num_draft_tokens, statistics.num_accepted_tokens) == (2, 8, 5)


def test_what_is_trimmed_away_was_neither_drafted_nor_accepted() -> None:
    collector = a_collector()
    count(collector, drafted=4, accepted=4, kept=2)
    statistics = snapshot(collector)
    assert (statistics.num_draft_tokens, statistics.num_accepted_tokens) == (2, 2)
    assert statistics.num_verified_tokens_per_pos == (1, 1)


def test_an_empty_proposal_is_a_round_without_a_draft() -> None:
    collector = a_collector()
    count(collector, drafted=0, accepted=0)
    statistics = snapshot(collector)
    assert (statistics.num_rounds, statistics.num_drafts) == (1, 0)


def test_overhead_is_wall_time_less_what_the_workers_reported() -> None:
    collector = a_collector()
    count(collector, drafted=2, accepted=1)
    collector.decoded(3, 1_000_000)
    statistics = snapshot(collector)
    assert (statistics.overhead_ms, statistics.draft_ms, statistics.verify_ms) == ((1.0,), 2.0, 4.0)
    assert statistics.num_rounds == 4


def test_rounds_say_where_they_begin_and_what_was_drafted() -> None:
    collector = a_collector()
    count(collector, drafted=4, accepted=1)
    count(collector, drafted=4, accepted=4, kept=2)
    count(collector, drafted=0, accepted=0)
    assert snapshot(collector).rounds == ((7, 4, 1, 2.0, 3.0), (7, 2, 2, 2.0, 3.0), (7, 0, 0, 2.0, 3.0))


def test_latencies_are_taken_between_messages_with_tokens(monkeypatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: round(now_s[0] * 1e9))
    tally = GenerationTally()
    collector = StatisticsCollector(arrived_ns=round(100e9), lossy=False, num_replaced_tokens=0, tally=tally)
    for at_s, num_tokens in ((102.0, 3), (102.5, 0), (103.0, 5), (106.0, 2)):
        now_s[0] = at_s
        collector.emitted(num_tokens)
        assert collector.has_emitted
    now_s[0] = 107.0
    collector.finished(FinishReason.EOS)
    assert (tally.ttft_s.count, tally.ttft_s.sum) == (1, 2.0)
    assert (tally.itl_s.count, tally.itl_s.sum) == (2, 4.0)
    assert (tally.tpot_s.count, tally.tpot_s.sum) == (1, pytest.approx(4.0 / 7))
    assert (tally.e2e_s.count, tally.e2e_s.sum) == (1, 7.0)
    assert (tally.num_generated_tokens, tally.finished) == (10, {FinishReason.EOS: 1})
    assert snapshot(collector).ttft_ms == 2000


def test_one_message_with_all_tokens_has_no_time_per_output_token() -> None:
    tally = GenerationTally()
    collector = StatisticsCollector(arrived_ns=0, lossy=False, num_replaced_tokens=0, tally=tally)
    collector.emitted(4)
    collector.finished(FinishReason.LENGTH)
    assert (tally.tpot_s.count, tally.itl_s.count, tally.e2e_s.count) == (0, 0, 1)


def test_statistics_survive_the_record() -> None:
    collector = a_collector()
    count(collector, drafted=2, accepted=1)
    statistics = snapshot(collector)
    assert GenerationStatistics.from_json(statistics.to_json()) == statistics
