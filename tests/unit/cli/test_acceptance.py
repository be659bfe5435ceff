"""Acceptance from rounds, and where an output begins to repeat itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cli.bench.acceptance import acceptance_before_repetition, acceptance_of, repetition_end
from tests.unit.cli.bench_samples import a_round, speculative

ROUNDS = st.lists(
    st.integers(0, 5).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k))), min_size=1, max_size=12
)


def brute_force_end(tokens: list[int], length: int) -> int | None:
    for end in range(length, len(tokens) + 1):
        run = tokens[end - length : end]
        if any(tokens[start : start + length] == run for start in range(end - length)):
            return end
    return None


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 6))
def test_repetition_end_is_that_of_the_brute_force(tokens, length):
    assert repetition_end(tokens, length) == brute_force_end(tokens, length)


def test_a_loop_of_one_token_repeats_once_its_run_can_overlap_itself():
    assert repetition_end([7] * 16) is None
    assert repetition_end([1, 2, *[7] * 17]) == 19


@settings(deadline=None)
@given(ROUNDS)
def test_without_repetition_the_rounds_say_what_the_counts_say(drafts):
    rounds, offset = [], 1
    for drafted, accepted in drafts:
        rounds.append(a_round(offset, drafted, accepted))
        offset += accepted + 1
    sample = speculative(0, rounds)
    assert acceptance_before_repetition([sample]) == acceptance_of([sample])


def test_rounds_behind_the_repetition_are_left_out():
    loop = tuple(range(17)) + tuple(range(17))  # tokens 0 to 15 again: the repeated run ends behind token 32
    rounds = [a_round(1, 4, 0), a_round(2, 4, 2), a_round(32, 4, 4), a_round(33, 4, 4), a_round(37, 4, 4)]
    acceptance = acceptance_before_repetition([speculative(0, rounds, token_ids=loop)])
    assert repetition_end(loop) == 33
    assert (acceptance.num_drafts, acceptance.num_accepted_tokens) == (3, 6)
    assert acceptance.mean_acceptance_length == 3.0
    assert acceptance.conditional_acceptance_per_position == (pytest.approx(2 / 3, abs=1e-4), 1.0, 0.5, 1.0)
