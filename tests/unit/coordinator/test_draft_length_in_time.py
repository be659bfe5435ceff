"""The adaptive draft length against fixed ones, on a virtual clock: real generations and cores, simulated models."""

from __future__ import annotations

import pytest

from tests.fakes.virtual_cluster import Times, tokens_per_s

GOOD = Times(row_ms=0.05, token_ms=1.0, acceptance=0.85)
POOR = Times(row_ms=0.05, token_ms=1.0, acceptance=0.35)
USELESS = Times(row_ms=0.05, token_ms=2.0, acceptance=0.02)
FIXED = {"good": (4, 8, 12), "poor": (1, 2), "useless": ()}
MEASURED = {1: 400, 4: 120, 16: 60}
"""Tokens of each sequence, at each number of sequences."""


@pytest.mark.parametrize("num_sequences", [1, 4, 16])
@pytest.mark.parametrize(("drafter", "times"), [("good", GOOD), ("poor", POOR), ("useless", USELESS)])
def test_adaptive_is_never_slower_than_plain_and_near_the_best_fixed_length(
    drafter: str, times: Times, num_sequences: int
) -> None:
    measured = MEASURED[num_sequences]

    def rate(num_draft_tokens: int | None) -> float:
        return tokens_per_s(times, num_sequences, num_draft_tokens, skipped=32, measured=measured)

    fixed = {k: rate(k) for k in (0, *FIXED[drafter])}
    adaptive = rate(None)
    assert adaptive >= 0.97 * fixed[0]
    assert adaptive >= 0.95 * max(fixed.values())


def test_drafts_too_slow_to_pay_are_not_waited_for() -> None:
    times = Times(token_ms=30.0, acceptance=0.6)
    assert tokens_per_s(times, 4, None, skipped=48) >= 0.97 * tokens_per_s(times, 4, 0)
