"""Pearson's chi-square test of drawn counts against exact probabilities.

Owns: pooling and the p-value. Must not know: what was drawn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

MIN_EXPECTED = 5.0
LEAST_P = 1e-4
NEVER = 1e-9
"""Outcomes below this probability may not occur at all."""


def p_value(counts: npt.NDArray[np.int64], probs: npt.NDArray[np.float64]) -> float:
    """Of `counts` under `probs`, both [cells]; 0 where an outcome occurred that cannot.

    Cells are pooled in order of their probability until each expects at least MIN_EXPECTED.
    """
    if counts[probs < NEVER].any():
        return 0.0
    order = np.argsort(probs, kind="stable")
    expected, observed = probs[order] * counts.sum(), counts[order]
    starts, mass = [0], 0.0
    for cell, value in enumerate(expected):
        if mass >= MIN_EXPECTED:
            starts.append(cell)
            mass = 0.0
        mass += value
    if mass < MIN_EXPECTED and len(starts) > 1:
        starts.pop()
    pooled_expected, pooled_observed = np.add.reduceat(expected, starts), np.add.reduceat(observed, starts)
    statistic = ((pooled_observed - pooled_expected) ** 2 / pooled_expected).sum()
    return float(stats.chi2.sf(statistic, len(starts) - 1))
