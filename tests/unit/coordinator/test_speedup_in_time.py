"""The speed-up of real generations and cores against the formula, on a virtual clock."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import pytest

from services.cli.bench.formula import expected_length
from tests.fakes.virtual_cluster import Times, VirtualCluster, tokens_per_s

TIMES = Times(step_ms=100.0, token_ms=10.0, acceptance=0.7, delay_ms=0.3, overhead_ms=1.0)
NUM_TOKENS = 1000


def pooled(alphas: tuple[float, ...]) -> float:
    """Accepted over checked of all positions: one is checked where the one before it was accepted."""
    checked = list(accumulate(alphas[:-1], mul, initial=1.0))
    return sum(c * alpha for c, alpha in zip(checked, alphas, strict=True)) / sum(checked)


@pytest.mark.parametrize("num_draft_tokens", [4, 8])
def test_the_speedup_is_the_formulas_within_three_percent(num_draft_tokens: int) -> None:
    realised: list[float] = []

    def note(cluster: VirtualCluster) -> None:
        realised.append(pooled(cluster.alphas))

    drafted = tokens_per_s(TIMES, 1, num_draft_tokens, measured=NUM_TOKENS, on_end=note)
    plain = tokens_per_s(TIMES, 1, 0, measured=200)
    (alpha,) = realised
    assert alpha == pytest.approx(0.7, abs=0.03)
    predicted = expected_length(alpha, num_draft_tokens) / (1 + num_draft_tokens * TIMES.token_ms / TIMES.step_ms)
    assert drafted / plain == pytest.approx(predicted, rel=0.03)
