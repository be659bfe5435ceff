"""The circuit breaker, on a clock that the test moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.breaker import FIRST_DELAY_S, MAX_DELAY_S, THRESHOLD, CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(clock, lambda: 0.0)


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        for _ in range(THRESHOLD - 1):
            breaker.failed()
        assert breaker.allows
        breaker.succeeded()
    for _ in range(THRESHOLD):
        breaker.failed()
    assert not breaker.allows


def test_a_certain_failure_is_enough(breaker: CircuitBreaker) -> None:
    breaker.failed(certain=True)
    assert not breaker.allows


def test_after_the_delay_one_trial_is_let_through(breaker: CircuitBreaker, clock: Clock) -> None:
    breaker.failed(certain=True)
    clock.now_s += FIRST_DELAY_S
    assert breaker.allows
    breaker.begin()
    assert not breaker.allows
    breaker.succeeded()
    assert breaker.allows


def test_a_trial_without_news_gives_way_to_another(breaker: CircuitBreaker, clock: Clock) -> None:
    breaker.failed(certain=True)
    clock.now_s += FIRST_DELAY_S
    breaker.begin()
    clock.now_s += FIRST_DELAY_S
    assert breaker.allows


def test_failed_trials_double_the_delay_up_to_a_limit(breaker: CircuitBreaker, clock: Clock) -> None:
    breaker.failed(certain=True)
    delays = []
    for _ in range(8):
        begun_s = clock.now_s
        while not breaker.allows:
            clock.now_s += 0.125
        delays.append(clock.now_s - begun_s)
        breaker.begin()
        breaker.failed()
    assert delays[:3] == [FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    assert delays[-1] == MAX_DELAY_S


def test_work_that_began_before_it_opened_fails_without_further_effect(breaker: CircuitBreaker, clock: Clock) -> None:
    breaker.failed(certain=True)
    for _ in range(100):
        breaker.failed()
    clock.now_s += FIRST_DELAY_S
    assert breaker.allows


@given(st.lists(st.sampled_from(["begin", "failed", "certain", "succeeded", "wait"]), max_size=60))
def test_whatever_happens_it_allows_again_after_the_longest_delay(events: list[str]) -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock, lambda: 0.5)
    for event in events:
        match event:
            case "wait":
                clock.now_s += 0.3
            case "certain":
                breaker.failed(certain=True)
            case _:
                getattr(breaker, event)()
    clock.now_s += MAX_DELAY_S
    assert breaker.allows
