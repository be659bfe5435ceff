"""Tokens through cores, block managers and paged models have the target's distribution: pairwise, 10^4 tokens each."""

from __future__ import annotations

import pytest

from tests.distribution.chi_square import LEAST_P, p_value
from tests.distribution.engine_cases import PAIRWISE, draw, exact

NUM_DRAWS = 10_000


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_generated_tokens_have_the_targets_joint_distribution(case):
    assert p_value(draw(case, NUM_DRAWS), exact(case)) >= LEAST_P
