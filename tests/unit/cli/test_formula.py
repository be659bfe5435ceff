"""The formula against simulation of what it describes, and the account of a round's time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli.bench.formula import check_formula, expected_length, expected_length_by_position
from services.cli.bench.limits import limits_of
from tests.unit.cli.bench_samples import a_round, plain, speculative


@given(st.floats(0, 1), st.integers(0, 16))
def test_one_alpha_is_the_same_alpha_at_every_position(alpha, length):
    assert expected_length(alpha, length) == pytest.approx(expected_length_by_position([alpha] * length, length))


def test_expected_length_is_what_drawing_gives():
    source, alphas, total, count = random.Random(1), (0.8, 0.5, 0.9), 0, 20_000
    for _ in range(count):
        total += 1
        for alpha in alphas:
            if source.random() >= alpha:
                break
            total += 1
    assert total / count == pytest.approx(expected_length_by_position(alphas, 3), rel=0.02)


def test_by_position_takes_draft_lengths_as_they_were():
    rounds = [a_round(1, 2, 1), a_round(3, 0, 0)]
    check = check_formula(0.5, (0.5, 0.5), 2, 1.2, rounds, 0.1, cost_ratio_given=False)
    assert check.predicted_without_cost == pytest.approx(1.75)
    assert check.predicted_speedup == pytest.approx(1.75 / 1.2, abs=1e-4)
    assert check.mean_draft_len == 1.0
    assert check.by_position_without_cost == pytest.approx((1.75 + 1) / 2)
    assert check.by_position == pytest.approx((1.75 + 1) / 2 / 1.1, abs=1e-4)
    assert check.relative_error_by_position == pytest.approx(1.2 / 1.25 - 1, abs=1e-4)


def test_limits_account_for_a_rounds_time():
    sample = speculative(0, [a_round(1, 4, 3), a_round(5, 4, 1)])
    limits = limits_of([sample], 10.0)
    assert limits is not None
    assert (limits.tokens_per_round, limits.mean_draft_len, limits.round_ms) == (3.0, 4.0, 15.0)
    assert limits.shares == {"draft": 0.1333, "verify": 0.8, "overhead": 0.0667}
    assert limits.speedup == 2.0
    assert limits.speedup_if_draft_free == pytest.approx(30 / 13, abs=1e-4)
    assert limits.speedup_if_extra_rows_free == pytest.approx(30 / 13, abs=1e-4)
    assert limits.speedup_if_overhead_free == pytest.approx(30 / 14, abs=1e-4)
    assert limits.speedup_if_all_free == 3.0
    assert limits.speedup_if_all_accepted == pytest.approx(50 / 15, abs=1e-4)


def test_a_last_round_that_was_trimmed_counts_the_tokens_that_were_left():
    sample = speculative(0, [a_round(1, 4, 3)], token_ids=(1, 2, 3, 4))
    limits = limits_of([sample], 10.0)
    assert limits is not None
    assert limits.tokens_per_round == 3.0


def test_without_rounds_or_plain_decoding_there_is_no_account():
    assert limits_of([plain(0, 4)], 10.0) is None
    assert limits_of([speculative(0, [a_round(1, 4, 3)])], None) is None
