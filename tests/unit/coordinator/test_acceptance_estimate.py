"""Conditional acceptance from censored rounds."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.values import MAX_DRAFT_TOKENS
from services.coordinator.acceptance_estimate import PRIOR, PoolAcceptance, SequenceAcceptance

TRUE_ALPHAS = (0.9, 0.6, 0.8, 0.3)


def run(sequence: SequenceAcceptance, random: Random, num_rounds: int, alphas: tuple[float, ...] = TRUE_ALPHAS) -> None:
    """Rounds of random lengths, accepted with the given probabilities."""
    for _ in range(num_rounds):
        asked = random.randint(1, len(alphas))
        accepted = next((i for i in range(asked) if random.random() >= alphas[i]), asked)
        sequence.observe(accepted, min(accepted + 1, asked))


def test_estimates_are_those_of_reached_positions_whatever_the_lengths() -> None:
    pool = PoolAcceptance()
    run(SequenceAcceptance(pool), Random(1), 4000)
    assert pool.alphas[:4] == pytest.approx(TRUE_ALPHAS, abs=0.06)


def test_without_evidence_a_position_is_as_the_one_before_it() -> None:
    pool = PoolAcceptance()
    assert set(pool.alphas) == {PRIOR}
    run(SequenceAcceptance(pool), Random(1), 500, (0.9,))
    assert pool.alphas[1:] == [pool.alphas[0]] * (MAX_DRAFT_TOKENS - 1)


def test_a_new_sequence_is_as_its_pool_and_comes_to_be_itself() -> None:
    pool = PoolAcceptance()
    run(SequenceAcceptance(pool), Random(1), 2000, (0.3,) * 4)
    newcomer = SequenceAcceptance(pool)
    assert newcomer.alphas == pytest.approx(pool.alphas)
    run(newcomer, Random(2), 80, (0.95,) * 2)
    assert newcomer.alphas[0] > 0.8
    assert newcomer.alphas[3] > 1.3 * pool.alphas[3]
    newcomer.fade(0.0)
    assert newcomer.alphas == pytest.approx(pool.alphas)


def test_news_outweighs_evidence_that_was_discounted() -> None:
    pool = PoolAcceptance()
    run(SequenceAcceptance(pool), Random(1), 2000, (0.02,))
    pool.discount(8.0)
    assert pool.num_reached == pytest.approx(8.0)
    for _ in range(24):
        pool.observe(1, 1)
    assert pool.alphas[0] > 0.6


@given(rounds=st.lists(st.tuples(st.integers(0, 16), st.booleans()), max_size=200))
def test_survivals_are_probabilities_that_fall(rounds: list[tuple[int, bool]]) -> None:
    sequence = SequenceAcceptance(PoolAcceptance())
    for accepted, rejected in rounds:
        sequence.observe(accepted, min(16, accepted + rejected))
    survivals = [1.0, *sequence.survivals]
    assert all(0.0 <= later <= earlier for earlier, later in pairwise(survivals))
