"""The speed-up that the formula predicts for the acceptance that a run realised, beside what was measured.

Owns: the formula. Must not know: how samples were taken. Pure.

Tokens a round (Leviathan et al. 2023, equation 1), by one alpha, and by the alpha_i of each position:

    E(K) = (1 - alpha^(K+1)) / (1 - alpha)        E_i(K) = 1 + sum over k <= K of prod over j <= k of alpha_j

Their theorem 3.8 divides by 1 + K c, the draft's cost, c being a draft token's time over a plain decode step's. Without
it stands what acceptance alone would give. A drafter that proposes fewer than K tokens, or none, is taken as it was:
E_i and the cost are averaged over the draft lengths of the run's rounds, while E takes every round at K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from services.client import Round


@dataclass(frozen=True, slots=True)
class FormulaCheck:
    """The decode speed-up, by the formula and measured. Errors are of the measured to the predicted with draft cost.

    `cost_ratio` is the given one of a simulated cluster (`cost_ratio_given`), else measured.
    """

    alpha: float
    num_draft_tokens: int
    mean_draft_len: float | None
    cost_ratio: float
    cost_ratio_given: bool
    predicted_speedup: float
    predicted_without_cost: float
    by_position: float | None
    by_position_without_cost: float | None
    measured_speedup: float
    relative_error: float
    relative_error_by_position: float | None


def expected_length(alpha: float, num_draft_tokens: int) -> float:
    """Tokens a round at one conditional acceptance."""
    if alpha == 1:
        return num_draft_tokens + 1.0
    return (1 - alpha ** (num_draft_tokens + 1)) / (1 - alpha)


def expected_length_by_position(alphas: Sequence[float], num_draft_tokens: int) -> float:
    """Tokens a round at a conditional acceptance for each position; positions beyond are taken as never accepted."""
    return 1.0 + sum(accumulate(alphas[:num_draft_tokens], mul), 0.0)


def check_formula(
    alpha: float,
    alphas: Sequence[float],
    num_draft_tokens: int,
    measured_speedup: float,
    rounds: Sequence[Round],
    cost_ratio: float,
    *,
    cost_ratio_given: bool,
) -> FormulaCheck:
    """`alpha` and `alphas` are the realised conditional acceptance, pooled and by position."""
    length = expected_length(alpha, num_draft_tokens)
    predicted = length / (1 + num_draft_tokens * cost_ratio)
    mean_draft_len = by_position = without_cost = None
    if rounds:
        mean_draft_len = sum(r.num_draft_tokens for r in rounds) / len(rounds)
        without_cost = sum(expected_length_by_position(alphas, r.num_draft_tokens) for r in rounds) / len(rounds)
        by_position = without_cost / (1 + mean_draft_len * cost_ratio)
    return FormulaCheck(
        alpha=alpha,
        num_draft_tokens=num_draft_tokens,
        mean_draft_len=_rounded(mean_draft_len),
        cost_ratio=round(cost_ratio, 4),
        cost_ratio_given=cost_ratio_given,
        predicted_speedup=round(predicted, 4),
        predicted_without_cost=round(length, 4),
        by_position=_rounded(by_position),
        by_position_without_cost=_rounded(without_cost),
        measured_speedup=measured_speedup,
        relative_error=round(measured_speedup / predicted - 1, 4),
        relative_error_by_position=_rounded(measured_speedup / by_position - 1) if by_position else None,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
