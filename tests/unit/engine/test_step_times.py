"""Step times learned from observations."""

from __future__ import annotations

from random import Random

import pytest

from services.engine.step_times import StepTimes


def test_row_and_prefill_costs_are_recovered_from_mixed_steps() -> None:
    times, random = StepTimes(), Random(1)
    for _ in range(200):
        num_rows, num_prefill_tokens = random.randint(1, 40), random.choice([0, 0, 30])
        noise = random.uniform(0.98, 1.02)
        times.observe(num_rows, num_prefill_tokens, round(noise * (20_000 + 100 * num_rows + 50 * num_prefill_tokens)))
    assert times.rows_ns(1) == pytest.approx(20_100, rel=0.02)
    assert times.rows_ns(60) == pytest.approx(26_000, rel=0.03)
    assert times.prefill_token_ns == pytest.approx(50, rel=0.4)


def test_equal_steps_say_nothing_of_a_rows_cost() -> None:
    times = StepTimes()
    for _ in range(10):
        times.observe(8, 0, 1000)
    assert times.rows_ns(1) == times.rows_ns(80) == pytest.approx(1000)


def test_nothing_is_known_before_the_first_step() -> None:
    assert StepTimes().rows_ns(5) == 0.0
    assert StepTimes().prefill_token_ns is None


def test_prefill_seen_before_any_rows_is_an_upper_bound_until_rows_are_seen() -> None:
    times = StepTimes()
    times.observe(0, 10, 1100)
    assert times.prefill_token_ns == pytest.approx(110)
    times.observe(1, 0, 1000)
    assert times.prefill_token_ns == pytest.approx(10)


def test_noise_of_small_prefills_cancels_out() -> None:
    times, random = StepTimes(), Random(2)
    for _ in range(400):
        for num_prefill_tokens in (0, 8):
            times.observe(4, num_prefill_tokens, round(20_000 + random.gauss(0, 2_000) + 500 * num_prefill_tokens))
    assert times.prefill_token_ns == pytest.approx(500, rel=0.25)


def test_estimates_follow_a_device_that_changes() -> None:
    times = StepTimes()
    for duration_ns in [1000] * 100 + [3000] * 200:
        times.observe(4, 0, duration_ns)
    assert times.rows_ns(4) == pytest.approx(3000, rel=0.05)
