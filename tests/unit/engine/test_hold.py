"""When a step is held, one rule a test. Steps last 20 ms."""

from __future__ import annotations

from services.engine.hold import HoldPolicy, Ready, Rhythm
from services.engine.step_times import StepTimes

MS = 1_000_000


def policy(step_ms: float = 20.0, max_hold_ms: int = 100) -> HoldPolicy:
    times = StepTimes()
    times.observe(5, 0, round(step_ms * MS))
    return HoldPolicy(times, max_hold_ms * MS)


def away(gap_ms: float, since_ms: float = 0.0, *, deviation_ms: float = 0.0) -> Rhythm:
    return Rhythm(5, 2.5, round(since_ms * MS), gap_ms * MS, deviation_ms * MS)


READY = Ready(num_sequences=1, num_rows=5, num_tokens=2.5)


def test_step_is_held_for_who_is_due_within_it() -> None:
    assert policy().hold_ns(MS, READY, [away(4)]) == 3.5 * MS


def test_step_is_held_until_the_last_is_back() -> None:
    assert policy().hold_ns(MS, READY, [away(4), away(8)]) == 8 * MS


def test_nobody_away_means_no_hold() -> None:
    assert policy().hold_ns(MS, READY, []) == 0


def test_nobody_is_waited_for_who_stays_away_longer_than_a_step() -> None:
    assert policy().hold_ns(MS, READY, [away(25)]) == 0
    assert policy().hold_ns(24 * MS, READY, [away(25)]) == 0


def test_groups_are_gathered_until_they_fit_into_a_gap() -> None:
    """A gap of 30 ms and a step of 20 ms have room for two steps a cycle: a step of 3 among 8 waits for a fourth."""
    three = Ready(num_sequences=3, num_rows=15, num_tokens=7.5)
    others = [away(30, since_ms=left_ms) for left_ms in (-18, -14, 2, 6, 8)]
    assert policy().hold_ns(0, three, others) == 15.75 * MS
    four = Ready(num_sequences=4, num_rows=20, num_tokens=10)
    assert policy().hold_ns(0, four, others[1:]) == 0


def test_who_cannot_be_back_within_a_step_is_not_waited_for() -> None:
    three = Ready(num_sequences=3, num_rows=15, num_tokens=7.5)
    assert policy().hold_ns(0, three, [away(30, since_ms=left_ms) for left_ms in (-8, -4, 2, 6, 8)]) == 0


def test_plain_decoding_is_not_held_for_groups_to_gather() -> None:
    mixed = Ready(num_sequences=3, num_rows=15, num_tokens=7.5, num_plain=1)
    assert policy().hold_ns(0, mixed, [away(30, since_ms=left_ms) for left_ms in (-18, -14, 2, 6, 8)]) == 0


def test_nobody_is_waited_for_who_was_never_seen_to_come_back() -> None:
    assert policy().hold_ns(MS, READY, [away(0)]) == 0


def test_nobody_is_waited_for_who_is_overdue() -> None:
    assert policy().hold_ns(6 * MS, READY, [away(4)]) == 0
    assert policy().hold_ns(6 * MS, READY, [away(4, deviation_ms=1)]) == 2 * MS


def test_who_stays_away_for_long_does_not_spoil_the_hold_for_the_others() -> None:
    assert policy().hold_ns(MS, READY, [away(4), away(25)]) == 3.5 * MS


def test_who_is_overdue_does_not_count_for_a_hold() -> None:
    overdue, due = [away(4) for _ in range(16)], away(4, since_ms=5)
    assert policy().hold_ns(6 * MS, Ready(num_plain=16), [*overdue, due]) == 0


def test_hold_ends_at_its_bound_whoever_leaves_meanwhile() -> None:
    held = policy(max_hold_ms=3)
    assert held.hold_ns(0, READY, [away(2.5)]) == 2.8125 * MS
    assert held.hold_ns(2 * MS, READY, [away(0.9, since_ms=2)]) == 1 * MS
    assert held.hold_ns(3 * MS, READY, [away(2.5, since_ms=3)]) == 0
    held.stepped()
    assert held.hold_ns(4 * MS, READY, [away(2.5, since_ms=4)]) > 0


def test_plain_decoding_is_not_held_for_few_who_draft() -> None:
    plain = Ready(num_plain=16)
    assert policy().hold_ns(0, plain, [away(4)]) == 0
    assert policy().hold_ns(0, plain, [away(4) for _ in range(16)]) > 0


def test_rows_that_cost_more_than_the_step_itself_are_not_worth_waiting_for() -> None:
    times = StepTimes()
    for num_rows in (5, 10):
        times.observe(num_rows, 0, num_rows * 4 * MS)
    assert HoldPolicy(times).hold_ns(0, READY, [away(4)]) == 0


def test_gap_is_averaged_and_its_deviation_too() -> None:
    rhythm = Rhythm()
    for round_number in range(60):
        rhythm.leave(round_number * 100 * MS, 5, 3)
        rhythm.come_back(round_number * 100 * MS + (4 if round_number % 2 else 6) * MS)
    assert 4.5 * MS < rhythm.gap_ns < 5.5 * MS
    assert 0.8 * MS < rhythm.deviation_ns < 1.2 * MS
    assert rhythm.left_ns is None
    assert rhythm.num_tokens == 3.0


def test_sequence_away_for_long_is_no_longer_expected() -> None:
    rhythm = away(4)
    assert rhythm.is_expected(10 * MS)
    assert not rhythm.is_expected(30 * MS)
    assert not Rhythm().is_expected(0)
