"""The two-sample test: its tail against scipy, its p uniform where the sets are alike and small where they differ."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from services.cli.bench.homogeneity import LEAST_P, chi_square_tail, compare, homogeneity


@given(st.floats(0, 400), st.integers(1, 200))
def test_tail_is_that_of_scipy(statistic, degrees):
    assert chi_square_tail(statistic, degrees) == pytest.approx(stats.chi2.sf(statistic, degrees), rel=1e-9, abs=1e-15)


def test_statistic_is_that_of_scipy_where_nothing_is_pooled():
    first, second = Counter({(0,): 40, (1,): 60, (2,): 30}), Counter({(0,): 70, (1,): 55, (2,): 20})
    expected = stats.chi2_contingency([[40, 60, 30], [70, 55, 20]], correction=False)
    result = homogeneity(first, second)
    assert (result.chi_square, result.p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))


def draw(source: np.random.Generator, probs: np.ndarray, count: int) -> Counter:
    return Counter((int(token),) for token in source.choice(len(probs), size=count, p=probs))


def test_p_is_uniform_for_equal_distributions_with_many_rare_tokens():
    source, probs = np.random.default_rng(5), 1 / np.arange(1, 1001)
    probs /= probs.sum()
    values = [homogeneity(draw(source, probs, 400), draw(source, probs, 600)).p for _ in range(300)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_a_shift_of_a_tenth_is_found():
    source = np.random.default_rng(6)
    plain, other = np.full(20, 0.05), np.full(20, 0.05)
    other[:2] += 0.05
    other[2:4] -= 0.05
    first = [(int(t), 0) for t in source.choice(20, size=2000, p=plain)]
    second = [(int(t), 0) for t in source.choice(20, size=2000, p=other)]
    report = compare(first, second)
    assert not report.equal
    assert report.p < LEAST_P


def test_equal_margins_with_another_dependence_are_found():
    source = np.random.default_rng(7)
    independent = [(int(a), int(b)) for a, b in source.integers(0, 4, size=(1000, 2))]
    repeated = [(int(a), int(a)) for a in source.integers(0, 4, size=1000)]
    report = compare(independent, repeated)
    assert {test.name: test.p > LEAST_P for test in report.tests} == {
        "token 1": True,
        "token 2": True,
        "tokens 1-2": False,
    }
    assert not report.equal


def test_an_early_end_is_an_outcome_of_its_own():
    report = compare([(1, 2)] * 50 + [(1,)] * 50, [(1, 2)] * 100)
    assert report.tests[1].num_outcomes == 2
    assert not report.equal


def test_nothing_to_tell_apart_is_equal():
    report = compare([(1, 1)] * 30, [(1, 1)] * 30)
    assert (report.p, report.equal) == (1.0, True)
    assert compare([], []).equal
