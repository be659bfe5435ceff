"""Drafts that become slow, pause, and recover, on a virtual clock: real generations and cores, simulated models."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from tests.fakes.virtual_cluster import Counted, Times, VirtualCluster
from tests.fakes.virtual_time import VirtualTimeLoop, run

T = TypeVar("T")
TIMES = Times(step_ms=10.0, token_ms=1.0, acceptance=0.7)
STEP_S = TIMES.step_ms / 1e3
LENGTHS = pytest.mark.parametrize("num_draft_tokens", [4, None])
"""Fixed, adaptive."""


def with_cluster(main: Callable[[VirtualCluster], Awaitable[T]]) -> T:
    async def whole() -> T:
        cluster = VirtualCluster(TIMES)
        try:
            return await main(cluster)
        finally:
            await cluster.aclose()

    return run(whole(), VirtualTimeLoop())


def duration_s(generation: Counted) -> float:
    return generation.last_s - generation.began_s


@LENGTHS
@pytest.mark.parametrize("pause_s", [0.04, 0.18, 2.0])
@pytest.mark.parametrize(("num_tokens", "most"), [(150, 1.2), (900, 1.05)])
def test_a_draft_that_became_slow_costs_little_over_plain_decoding(
    num_draft_tokens: int | None, pause_s: float, num_tokens: int, most: float
) -> None:
    async def main(cluster: VirtualCluster) -> Counted:
        quick = await cluster.generate_one(40, num_draft_tokens)
        assert duration_s(quick) < 0.8 * 40 * STEP_S
        cluster.draft_clock.pause_s = lambda: pause_s
        return await cluster.generate_one(num_tokens, num_draft_tokens)

    slow = with_cluster(main)
    assert duration_s(slow) <= most * num_tokens * STEP_S
    assert slow.statistics.num_drafts <= 3


@LENGTHS
@pytest.mark.parametrize("pause_s", [0.02, 0.1])
def test_sequences_that_share_a_slow_draft_lose_little_over_plain_decoding(
    num_draft_tokens: int | None, pause_s: float
) -> None:
    async def rate(num_draft_tokens: int | None) -> float:
        cluster = VirtualCluster(TIMES)
        cluster.draft_clock.pause_s = lambda: pause_s
        return await cluster.generate(4, num_draft_tokens, skipped=8, measured=150)

    plain, drafted = (run(rate(length), VirtualTimeLoop()) for length in (0, num_draft_tokens))
    assert drafted >= 0.88 * plain


@LENGTHS
def test_a_draft_that_was_always_too_slow_costs_little_from_the_first_generation_on(
    num_draft_tokens: int | None,
) -> None:
    async def main(cluster: VirtualCluster) -> list[Counted]:
        cluster.draft_clock.pause_s = lambda: 0.1
        return [await cluster.generate_one(50, num_draft_tokens) for _ in range(8)]

    assert sum(map(duration_s, with_cluster(main))) <= 1.1 * 8 * 50 * STEP_S


@LENGTHS
def test_a_draft_that_is_quick_again_is_used_again_soon(num_draft_tokens: int | None) -> None:
    """It is slow for the second to the fourth of about six seconds."""

    async def main(cluster: VirtualCluster) -> Counted:
        clock = cluster.draft_clock
        clock.pause_s = lambda: 0.18 if 1.0 < clock.now_s < 4.0 else 0.0
        return await cluster.generate_one(900, num_draft_tokens)

    recovered = with_cluster(main)
    assert recovered.statistics.num_drafts >= 150
    assert duration_s(recovered) <= 0.8 * 900 * STEP_S


@LENGTHS
def test_a_pause_now_and_then_costs_a_draft_little_more_than_itself(num_draft_tokens: int | None) -> None:
    async def main(cluster: VirtualCluster) -> Counted:
        steps = itertools.count(1)
        cluster.draft_clock.pause_s = lambda: 0.3 if next(steps) % 200 == 0 else 0.0
        return await cluster.generate_one(600, num_draft_tokens)

    paused = with_cluster(main)
    assert paused.statistics.num_drafts >= 160
    assert duration_s(paused) <= 0.72 * 600 * STEP_S


@LENGTHS
def test_jitter_of_tens_of_milliseconds_does_not_turn_a_draft_off(num_draft_tokens: int | None) -> None:
    async def main(cluster: VirtualCluster) -> Counted:
        steps = itertools.count(1)
        cluster.draft_clock.pause_s = lambda: 0.03 if next(steps) % 40 == 0 else 0.0
        return await cluster.generate_one(600, num_draft_tokens)

    jittery = with_cluster(main)
    assert jittery.statistics.num_drafts >= 200
    assert duration_s(jittery) <= 0.7 * 600 * STEP_S
