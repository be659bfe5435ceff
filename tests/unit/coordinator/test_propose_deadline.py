"""When a proposal counts as late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.propose_deadline import MIN_DEADLINE_S, ProposeDeadline

MAX_S = 5.0


def learned(took_s: float, num_draft_tokens: int = 4, num_proposals: int = 40) -> ProposeDeadline:
    deadline = ProposeDeadline(MAX_S)
    for _ in range(num_proposals):
        deadline.arrived(num_draft_tokens, took_s)
    return deadline


def test_the_limit_holds_while_nothing_is_known() -> None:
    assert ProposeDeadline(MAX_S).seconds(4) == MAX_S


def test_a_steady_draft_is_late_soon_after_its_usual_time_but_never_within_the_floor() -> None:
    assert learned(0.01).seconds(4) == MIN_DEADLINE_S
    assert learned(1.0).seconds(4) == pytest.approx(1.0, rel=0.05)


def test_more_tokens_may_take_longer_and_fewer_no_less() -> None:
    deadline = learned(1.0, num_draft_tokens=4)
    assert deadline.seconds(9) == pytest.approx(2 * deadline.seconds(4))
    assert deadline.seconds(1) == deadline.seconds(4)


def test_each_lateness_allows_twice_as_long_until_one_arrives() -> None:
    deadline = learned(1.0)
    usual_s = deadline.seconds(4)
    deadline.was_late()
    deadline.was_late()
    assert deadline.seconds(4) == pytest.approx(4 * usual_s)
    deadline.was_late()
    assert deadline.seconds(4) == MAX_S
    deadline.arrived(4, 1.0)
    assert deadline.seconds(4) == pytest.approx(usual_s, rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 16), st.floats(0, 10)) | st.none(), max_size=50), st.floats(0.01, 10))
def test_it_stays_within_its_limits(events: list[tuple[int, float] | None], max_s: float) -> None:
    deadline = ProposeDeadline(max_s)
    for event in events:
        if event is None:
            deadline.was_late()
        else:
            deadline.arrived(*event)
        assert min(MIN_DEADLINE_S, max_s) <= deadline.seconds(4) <= max_s
