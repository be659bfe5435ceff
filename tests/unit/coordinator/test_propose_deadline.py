"""What a proposal may take, and when a slow worker is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.propose_deadline import (
    HABIT,
    MAX_BACKOFF_S,
    MAX_SLOWNESS,
    MIN_PATIENCE_S,
    OVERDUE,
    PATIENCE,
    RECOVERY,
    SLACK,
    Asked,
    DraftPace,
    ProposeDeadline,
)

MAX_S = 5.0


def seen(step_s: float) -> ProposeDeadline:
    deadline = ProposeDeadline(MAX_S)
    deadline.stepped(round(step_s * 1e9))
    return deadline


def asked(deadline: ProposeDeadline, since_s: float = 0.0, *, trial: bool = False) -> Asked:
    return Asked(1, 4, deadline.pace("a"), since_s, trial)


def test_the_limit_holds_before_the_target_was_seen_at_work() -> None:
    deadline = ProposeDeadline(MAX_S)
    assert deadline.slow_s(4) == deadline.patience_s(4) == MAX_S


def test_a_proposal_may_take_what_the_target_takes_for_the_tokens_that_it_brings() -> None:
    deadline = seen(0.1)
    assert deadline.slow_s(4) == pytest.approx(SLACK * 0.4)
    for _ in range(500):
        deadline.verified(4, 2)
    assert deadline.slow_s(4) == pytest.approx(SLACK * 0.2)
    assert deadline.slow_s(8) == pytest.approx(SLACK * 0.4)
    assert deadline.patience_s(4) == pytest.approx(PATIENCE * deadline.slow_s(4))


def test_a_token_is_what_the_most_useless_proposal_is_worth() -> None:
    deadline = seen(0.1)
    for _ in range(500):
        deadline.verified(4, 0)
    assert deadline.slow_s(4) == pytest.approx(SLACK * 0.1)


def test_a_first_token_counts_until_there_are_others() -> None:
    deadline = ProposeDeadline(MAX_S)
    deadline.stepped(round(1e9), first=True)
    assert deadline.slow_s(1) == pytest.approx(SLACK)
    deadline.stepped(round(0.1e9))
    deadline.stepped(round(1e9), first=True)
    assert deadline.slow_s(1) == pytest.approx(SLACK * 0.1)


@given(
    st.lists(st.tuples(st.integers(0, 10**10), st.booleans()) | st.integers(0, 16), max_size=40),
    st.floats(0.01, 10),
    st.floats(0, 20),
    st.integers(1, 16),
)
def test_it_stays_within_its_limits(events: list[tuple[int, bool] | int], max_s: float, least_s: float, k: int) -> None:
    deadline = ProposeDeadline(max_s, least_s)
    for event in events:
        if isinstance(event, int):
            deadline.verified(16, event)
        else:
            deadline.stepped(event[0], first=event[1])
        assert min(least_s, max_s) <= deadline.slow_s(k) <= deadline.patience_s(k) <= max_s
        assert deadline.patience_s(k) >= min(MIN_PATIENCE_S, max_s)


def test_a_slow_worker_is_tried_at_once_and_used_again_when_it_is_quick() -> None:
    deadline = seen(0.01)
    pace = deadline.pace("a")
    assert not pace.begin_trial(0.0)
    assert not deadline.answered(asked(deadline), 0.3)
    assert not pace.in_use
    assert deadline.pace("b").in_use
    assert pace.begin_trial(0.3)
    assert not pace.begin_trial(0.3)  # one at a time
    assert deadline.answered(asked(deadline, 0.3, trial=True), 0.31)
    assert pace.in_use


def test_slow_proposals_that_came_count_by_what_they_took_of_the_patience() -> None:
    deadline = seen(0.01)
    patience_s, num_answered = deadline.patience_s(4), 0
    while deadline.pace("a").in_use:
        num_answered += 1
        deadline.answered(asked(deadline), 0.7 * patience_s)
    assert num_answered == 2


def test_pauses_between_many_timely_proposals_do_not_add_up() -> None:
    deadline = seen(0.01)
    for _ in range(100):
        deadline.answered(asked(deadline), 0.7 * deadline.patience_s(4))
        for _ in range(10):
            deadline.answered(asked(deadline), 0.001)
    assert deadline.pace("a").in_use


def test_each_slow_trial_doubles_the_time_to_the_next() -> None:
    pace, now_s, waits = DraftPace(), 0.0, []
    pace.slow(now_s, 0.1)
    for _ in range(8):
        began_s = now_s
        while not pace.begin_trial(now_s):
            now_s += 0.01
        waits.append(now_s - began_s)
        now_s += 0.1
        pace.end_trial(now_s, 0.1)
    assert waits[0] == 0.0
    assert waits[1:5] == pytest.approx([0.2, 0.4, 0.8, 1.6], abs=0.02)
    assert waits[5:] == pytest.approx([MAX_BACKOFF_S] * 3, abs=0.02)


def test_only_many_timely_proposals_make_up_for_slow_ones() -> None:
    pace = DraftPace()
    pace.slow(0.0, 0.1)
    pace.end_trial(1.0, 0.1)
    pace.end_trial(2.0, 0.1)
    pace.end_trial(3.0, 0.01, timely=True)
    pace.slow(4.0, 0.1)
    assert not pace.begin_trial(4.5)
    pace.end_trial(10.0, 0.01, timely=True)
    for _ in range(round(MAX_SLOWNESS / RECOVERY)):
        pace.timely()
    pace.slow(11.0, 0.1)
    assert pace.begin_trial(11.0)


def test_one_pause_of_a_worker_counts_once_however_many_sequences_it_delays() -> None:
    pace = DraftPace()
    for _ in range(64):
        pace.slow(1.0, 0.3)
    assert not pace.is_habitual
    assert pace.begin_trial(1.0)
    pace.end_trial(1.01, 0.01, timely=True)
    pace.slow(1.02, 0.3)  # asked for before
    assert pace.in_use


def test_a_worker_that_is_slow_each_time_is_habitual_until_it_is_used_again() -> None:
    pace = DraftPace()
    pace.slow(0.0, 0.1)
    for number in range(1, round(HABIT)):
        assert not pace.is_habitual
        pace.end_trial(float(number), 0.1)
    assert pace.is_habitual
    pace.end_trial(9.0, 0.01, timely=True)
    assert not pace.is_habitual


def test_a_trial_that_is_never_answered_makes_way_for_another() -> None:
    pace = DraftPace()
    pace.slow(0.0, 0.1)
    assert pace.begin_trial(0.0)
    pace.end_trial(1.0)
    assert pace.begin_trial(1.0)


def test_a_silent_draft_is_overdue_before_it_is_lost() -> None:
    deadline = seen(0.01)
    proposal = asked(deadline)
    overdue_s = OVERDUE * deadline.patience_s(4)
    assert overdue_s < MAX_S
    assert not deadline.is_overdue(proposal, 0.99 * overdue_s)
    assert deadline.is_overdue(proposal, overdue_s)
    assert not deadline.is_lost(proposal, overdue_s)
    assert deadline.is_lost(proposal, MAX_S)
