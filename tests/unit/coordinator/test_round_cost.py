"""What rounds cost, learned from observed times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.round_cost import RoundCost, TargetTimes, _bucket

MS = 1_000_000


def test_the_price_of_a_row_outlasts_thousands_of_equal_steps() -> None:
    times = TargetTimes()
    for rows in (1, 2, 5, 9):
        times.observe(rows, round((20 + 0.5 * rows) * MS))
    for _ in range(3000):
        times.observe(5, round(22.5 * MS))
    assert times.row_ns == pytest.approx(0.5 * MS, rel=0.01)
    assert times.rows_ns(17) == pytest.approx(28.5 * MS, rel=0.01)


def test_a_step_that_took_far_longer_is_cut() -> None:
    times = TargetTimes()
    for _ in range(20):
        times.observe(1, 20 * MS)
    times.observe(1, 2000 * MS)
    assert times.rows_ns(1) < 23 * MS


@given(a=st.integers(1, 20_000), b=st.integers(1, 20_000))
def test_only_similar_numbers_of_rows_share_a_mean(a: int, b: int) -> None:
    if _bucket(a) == _bucket(b):
        assert max(a, b) < 1.15 * min(a, b) or (max(a, b) < 16 and a == b)
    else:
        assert (_bucket(a) < _bucket(b)) == (a < b)


def learned(*, row_ms: float, token_ms: float) -> RoundCost:
    cost = RoundCost()
    for rows in (1, 8, 32, 64):
        cost.observe_step(rows, round((20 + row_ms * rows) * MS))
    cost.observe_draft(4, round(4 * token_ms * MS))
    return cost


def test_one_sequence_waits_for_draft_and_target() -> None:
    assert learned(row_ms=0.0, token_ms=3.0).round_ns(1, 5, 4) == pytest.approx(32 * MS)


def test_drafting_is_free_while_the_target_is_busy_with_others() -> None:
    cost = learned(row_ms=2.0, token_ms=30.0)
    assert cost.round_ns(64, 320, 4) == pytest.approx(2 * (20 + 2.0 * 160) * MS, rel=0.01)


def test_the_rest_is_what_rounds_of_about_as_many_sequences_took_longer() -> None:
    cost = learned(row_ms=0.0, token_ms=3.0)
    for _ in range(200):
        cost.observe_round(1, 5, 4, 37 * MS)
    assert cost.round_ns(1, 3, 2) == pytest.approx(31 * MS, rel=0.01)
    for _ in range(4000):
        cost.observe_round(16, 80, 4, 52 * MS)
    assert cost.round_ns(16, 80, 4) == pytest.approx(52 * MS, rel=0.01)
    assert cost.round_ns(1, 3, 2) == pytest.approx(31 * MS, rel=0.01)


def test_doubt_brings_the_rest_back_to_what_the_model_says() -> None:
    cost = learned(row_ms=0.0, token_ms=3.0)
    for _ in range(200):
        cost.observe_round(1, 5, 4, 64 * MS)
    for _ in range(20):
        cost.doubt(1)
    assert cost.round_ns(1, 5, 4) == pytest.approx(32 * MS, rel=0.05)
