"""The simulation against what can be computed, and against real generations and cores on a virtual clock."""

from __future__ import annotations

import pytest

from services.cli.plan.setting import Request, Setting, Times
from services.cli.plan.simulation import simulate
from tests.fakes import virtual_cluster
from tests.fakes.virtual_cluster import VirtualCluster, served, tokens_per_s


def test_one_sequence_gives_the_formula() -> None:
    """Leviathan et al. 2023, theorem 3.8."""
    times = Times(step_ms=100.0, token_ms=10.0, alphas=(0.7,), delay_ms=0.0, overhead_ms=0.0)
    outcome = simulate(times, Setting(1, 4, num_rounds=20_000))
    assert outcome.tokens_per_s / 10.0 == pytest.approx((1 - 0.7**5) / (0.3 * 1.4), rel=0.01)
    assert outcome.target_busy == pytest.approx(100 / 140, rel=0.01)
    assert outcome.draft_busy == pytest.approx(40 / 140, rel=0.01)


def test_plain_decoding_pays_for_every_row_and_for_the_coordinator() -> None:
    times = Times(step_ms=20.0, row_ms=0.5, overhead_ms=0.1)
    assert simulate(times, Setting(8, 0)).tpot_ms == pytest.approx(24.0)
    assert simulate(Times(step_ms=20.0, overhead_ms=1.0), Setting(64, 0)).tpot_ms == pytest.approx(64.0)


def test_those_who_shared_a_step_are_drafted_for_together() -> None:
    times = Times(step_ms=40.0, token_ms=6.0, alphas=(1.0,), delay_ms=1.0, overhead_ms=0.5)
    cycle_ms = 40.0 + 8 * 0.5 + 2 * 6.0 + 4 * 1.0
    assert simulate(times, Setting(8, 2)).tokens_per_s == pytest.approx(8 * 3 * 1e3 / cycle_ms, rel=0.01)


def test_the_simulation_repeats() -> None:
    times = Times(step_ms=20.0, token_ms=2.0)
    assert simulate(times, Setting(4, 4)) == simulate(times, Setting(4, 4))


def test_a_second_draft_helps_where_one_is_the_bottleneck() -> None:
    times = Times(step_ms=5.0, token_ms=1.0, token_row_ms=2.0, alphas=(0.9,))
    one, two = (simulate(times, Setting(16, 4, num_drafts=n)).tokens_per_s for n in (1, 2))
    assert two > 1.5 * one


@pytest.mark.parametrize(("num_sequences", "measured"), [(1, 150), (4, 80), (16, 60)])
@pytest.mark.parametrize(
    "times",
    [
        virtual_cluster.Times(row_ms=0.05, token_ms=2.0, acceptance=0.7),
        virtual_cluster.Times(row_ms=0.1, token_ms=6.0, acceptance=0.7, delay_ms=0.5),
        virtual_cluster.Times(step_ms=10.0, row_ms=0.1, token_ms=1.0, acceptance=0.4, delay_ms=2.0),
    ],
)
@pytest.mark.parametrize("num_draft_tokens", [0, 4])
def test_rates_are_those_of_the_services(
    times: virtual_cluster.Times, num_sequences: int, measured: int, num_draft_tokens: int
) -> None:
    alphas: list[tuple[float, ...]] = []

    def note(cluster: VirtualCluster) -> None:
        alphas.append(cluster.alphas or (0.0,))

    actual = tokens_per_s(times, num_sequences, num_draft_tokens, skipped=16, measured=measured, on_end=note)
    planned = simulate(
        Times(times.step_ms, times.row_ms, times.token_ms, 0.0, alphas[0], times.delay_ms, 0.0),
        Setting(num_sequences, num_draft_tokens, num_rounds=max(60, 2000 // num_sequences)),
    )
    assert planned.tokens_per_s == pytest.approx(actual, rel=0.05)


HEAVY = virtual_cluster.Times(row_ms=0.05, prefill_token_ms=0.2)
LONG = virtual_cluster.Times(row_ms=0.1, token_ms=1.0, prefill_token_ms=0.05, delay_ms=1.0)
POOR = virtual_cluster.Times(step_ms=10.0, row_ms=0.1, acceptance=0.4, prefill_token_ms=0.3)
LIGHT = virtual_cluster.Times(row_ms=0.05, prefill_token_ms=0.02)


@pytest.mark.parametrize(
    ("times", "prompt_len", "num_sequences", "num_requests", "num_draft_tokens"),
    [
        (HEAVY, 200, 1, 12, 0),
        (HEAVY, 200, 4, 8, 0),
        (HEAVY, 200, 4, 8, 4),
        (LONG, 700, 1, 16, 4),
        (LONG, 700, 4, 8, 4),
        (LONG, 700, 16, 3, 0),
        (POOR, 50, 1, 16, 4),
        (POOR, 50, 4, 6, 0),
        (LIGHT, 100, 16, 4, 4),
    ],
)
def test_requests_with_prompts_are_served_as_by_the_services(
    times: virtual_cluster.Times, prompt_len: int, num_sequences: int, num_requests: int, num_draft_tokens: int
) -> None:
    alphas: list[tuple[float, ...]] = []

    def note(cluster: VirtualCluster) -> None:
        alphas.append(cluster.alphas or (0.0,))

    request = Request(prompt_len, 60)
    actual = served(
        times,
        num_sequences,
        num_draft_tokens,
        prompt_len=prompt_len,
        output_len=request.output_len,
        num_requests=num_requests,
        on_end=note,
    )
    planned = simulate(
        Times(times.step_ms, times.row_ms, times.token_ms, 0.0, alphas[0], times.delay_ms, 0.0, times.prefill_token_ms),
        Setting(num_sequences, num_draft_tokens, request=request, num_requests=max(4, 40 // num_sequences)),
    )
    assert planned.tokens_per_s == pytest.approx(actual.tokens_per_s, rel=0.05)
    assert planned.tpot_ms == pytest.approx(actual.tpot_ms, rel=0.05)
    assert planned.ttft_ms == pytest.approx(actual.ttft_ms, rel=0.1, abs=times.step_ms / 3)
