"""Whether two sets of continuations come from one distribution: chi-square tests of homogeneity on their tokens.

Owns: the tests and the verdict. Must not know: how continuations were had. Pure.

For each position, and for the first two and the last two tokens as pairs, the two sets' counts form a 2 x cells table:

    X^2 = sum of (observed - expected)^2 / expected,  expected = row total * column total / all,  cells - 1 degrees

Outcomes too rare for the approximation are pooled. p of the whole is Bonferroni's: tests * the least p, at most 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Outcome = tuple[int, ...]

MIN_EXPECTED = 5.0
LEAST_P = 1e-4
"""Below this the sets are taken to differ."""


@dataclass(frozen=True, slots=True)
class TokenTest:
    """One test. `name` says which tokens; `num_outcomes` different ones were seen, in `num_cells` after pooling."""

    name: str
    num_outcomes: int
    num_cells: int
    chi_square: float
    p: float


@dataclass(frozen=True, slots=True)
class DistributionReport:
    """`p` is of all tests together."""

    num_plain: int
    num_speculative: int
    tests: tuple[TokenTest, ...]
    p: float

    @property
    def equal(self) -> bool:
        return self.p >= LEAST_P


def compare(plain: Sequence[Sequence[int]], speculative: Sequence[Sequence[int]]) -> DistributionReport:
    """Of the continuations' token ids; an ended one counts as an outcome of its own at the positions it lacks."""
    length = max((len(ids) for ids in (*plain, *speculative)), default=0)
    spans = {f"token {i + 1}": slice(i, i + 1) for i in range(length)}
    if length >= 2:
        spans["tokens 1-2"] = slice(0, 2)
    if length > 2:
        spans[f"tokens {length - 1}-{length}"] = slice(length - 2, length)
    tests = []
    for name, span in spans.items():
        result = homogeneity(*(Counter(tuple(ids[span]) for ids in of) for of in (plain, speculative)))
        tests.append(TokenTest(name, result.num_outcomes, result.num_cells, round(result.chi_square, 4), result.p))
    p = min((len(tests) * test.p for test in tests), default=1.0)
    return DistributionReport(len(plain), len(speculative), tuple(tests), min(1.0, p))


class Homogeneity(NamedTuple):
    """Of one table."""

    num_outcomes: int
    num_cells: int
    chi_square: float
    p: float


def homogeneity(first: Counter[Outcome], second: Counter[Outcome]) -> Homogeneity:
    """Tests that both were drawn from one distribution. p is 1 where nothing can be told apart."""
    outcomes = first.keys() | second.keys()
    in_order = sorted(outcomes, key=lambda outcome: (first[outcome] + second[outcome], outcome))
    cells = _pooled([(first[o], second[o]) for o in in_order], first.total(), second.total())
    total = first.total() + second.total()
    if len(cells) < 2:
        return Homogeneity(len(outcomes), len(cells), 0.0, 1.0)
    statistic = 0.0
    for cell in cells:
        for observed, row_total in zip(cell, (first.total(), second.total()), strict=True):
            expected = row_total * sum(cell) / total
            statistic += (observed - expected) ** 2 / expected
    return Homogeneity(len(outcomes), len(cells), statistic, chi_square_tail(statistic, len(cells) - 1))


def _pooled(counts: list[tuple[int, int]], first_total: int, second_total: int) -> list[tuple[int, int]]:
    """Cells that expect at least MIN_EXPECTED in both rows: neighbours are put together until they do.

    The order must depend on the cells' sums and names alone: sorted by one row's counts, equal rows would seem unequal.
    """
    least, total = min(first_total, second_total), first_total + second_total
    if not least:
        return []
    cells: list[tuple[int, int]] = []
    pool = (0, 0)
    for cell in counts:
        pool = (pool[0] + cell[0], pool[1] + cell[1])
        if sum(pool) * least / total >= MIN_EXPECTED:
            cells.append(pool)
            pool = (0, 0)
    if cells and sum(pool):
        cells[-1] = (cells[-1][0] + pool[0], cells[-1][1] + pool[1])
    return cells


def chi_square_tail(statistic: float, degrees: int) -> float:
    """Probability of at least `statistic` with that many degrees of freedom.

    The regularised upper incomplete gamma function Q(degrees / 2, statistic / 2) by its recurrence
    Q(a + 1, x) = Q(a, x) + x^a e^-x / Gamma(a + 1) (NIST DLMF 8.8.6), from Q(1, x) = e^-x and Q(1/2, x) = erfc(sqrt x).
    """
    x = statistic / 2
    if x <= 0:
        return 1.0
    a, tail = (0.5, math.erfc(math.sqrt(x))) if degrees % 2 else (1.0, math.exp(-x))
    while a < degrees / 2:
        tail += math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        a += 1
    return min(1.0, tail)
