"""The accept rules, the residual, the checks of rows and the end of a verdict, each against plain Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.values import MAX_DRAFT_ROW_LEN, SparseRow
from services.engine import acceptance

torch.set_num_threads(1)

probs = st.floats(0.0, 1.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 4)), min_size=1, max_size=5))
def test_accepted_is_the_unbroken_prefix_within_the_length(lines):
    accepted, lens = torch.tensor([a for a, _ in lines]), torch.tensor([n for _, n in lines])
    expected = [[*a[:n], False].index(False) for a, n in lines]
    assert acceptance.count_accepted(accepted, lens).tolist() == expected


def test_nothing_drafted_accepts_nothing():
    assert acceptance.count_accepted(torch.empty(2, 0, dtype=torch.bool), torch.tensor([0, 0])).tolist() == [0, 0]


@settings(deadline=None, max_examples=100)
@given(probs, st.floats(1e-6, 1.0), st.floats(1e-9, 1.0, exclude_max=True))
def test_rejection_accepts_below_the_ratio(target, draft, u):
    as_tensor = [torch.tensor([[x]], dtype=torch.float64) for x in (target, draft, u)]
    assert acceptance.rejection(*as_tensor).item() is (u * draft < target)


def test_rejection_never_accepts_what_the_target_excludes():
    zero, tiny = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0**-33, dtype=torch.float64)
    assert not acceptance.rejection(zero, tiny, tiny).item()


def test_threshold_accepts_above_a_tenth():
    assert acceptance.threshold(torch.tensor([[0.1, 0.1001, 0.0]])).tolist() == [[False, True, False]]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8), st.integers(0, 2**32 - 1))
def test_residual_is_the_positive_part_of_the_difference(weights, seed):
    target = np.array(weights) / sum(weights)
    draft = np.random.default_rng(seed).dirichlet(np.ones(len(weights)))
    scores = acceptance.residual(
        torch.tensor(np.log(target)[None], dtype=torch.float32),
        torch.arange(len(weights))[None],
        torch.tensor(draft[None], dtype=torch.float32),
    )
    expected = [max(0.0, t - d) for t, d in zip(target, draft, strict=True)]
    assert scores.exp()[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_residual_of_a_point_mass_is_the_target_without_it():
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()
    left = acceptance.residual(scores, torch.tensor([[1, 0]]), torch.tensor([[1.0, 0.0]]))
    assert left.exp()[0].tolist() == pytest.approx([0.5, 0.0, 0.2])


def test_residual_with_nothing_left_is_the_target():
    scores = torch.tensor([[0.75, 0.25, 0.0]]).log()
    left = acceptance.residual(scores, torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]))
    assert torch.equal(left, scores)


GOOD = SparseRow((3, 0, 5), (0.5, 0.25, 0.25))


def checked(token, row, vocab_size=8):
    return acceptance.check_rows(np.array([token]), [row], vocab_size)


def as_dict(rows, line=0):
    return {int(i): float(p) for i, p in zip(rows.token_ids[line], rows.probs[line], strict=True) if p}


def test_a_valid_row_is_kept():
    rows = checked(0, GOOD)
    assert as_dict(rows) == {3: 0.5, 0: 0.25, 5: 0.25}
    assert rows.drafted_probs.tolist() == [0.25]
    assert rows.replaced.tolist() == [False]


@pytest.mark.parametrize(
    ("token", "row"),
    [
        (0, SparseRow((0, 8), (0.5, 0.5))),
        (0, SparseRow((0, -1), (0.5, 0.5))),
        (0, SparseRow((0, 3, 0), (0.25, 0.5, 0.25))),
        (0, SparseRow((0, 3), (0.5, math.nan))),
        (0, SparseRow((0, 3), (0.5, math.inf))),
        (0, SparseRow((0, 3), (0.5, 1e39))),
        (0, SparseRow((0, 3, 4), (1.0, 0.5, -0.5))),
        (0, SparseRow((0, 3), (0.5, 0.5002))),
        (0, SparseRow((0, 3), (0.5, 0.4998))),
        (1, SparseRow((0, 3), (0.5, 0.5))),
        (0, SparseRow((0, 3), (0.0, 1.0))),
        (0, SparseRow((0, 3), (1.0,))),
        (0, SparseRow((), ())),
    ],
)
def test_an_invalid_row_becomes_a_point_mass_and_is_flagged(token, row):
    rows = checked(token, row)
    assert as_dict(rows) == {token: 1.0}
    assert rows.drafted_probs.tolist() == [1.0]
    assert rows.replaced.tolist() == [True]


def test_a_row_longer_than_a_draft_may_send_is_invalid():
    num = MAX_DRAFT_ROW_LEN + 1
    assert checked(0, SparseRow(tuple(range(num)), (1 / num,) * num), vocab_size=100).replaced.tolist() == [True]


def test_a_sum_within_the_tolerance_is_valid():
    assert checked(0, SparseRow((0, 3), (0.5, 0.50009))).replaced.tolist() == [False]


def test_a_token_chosen_without_chance_is_a_point_mass_unflagged():
    rows = checked(2, None)
    assert as_dict(rows) == {2: 1.0}
    assert rows.replaced.tolist() == [False]


def test_rows_of_different_lengths_are_checked_each_by_itself():
    rows = acceptance.check_rows(np.array([0, 4, 6]), [GOOD, SparseRow((4,), (0.3,)), None], 8)
    assert [as_dict(rows, line) for line in range(3)] == [{3: 0.5, 0: 0.25, 5: 0.25}, {4: 1.0}, {6: 1.0}]
    assert rows.replaced.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("tokens", "num_accepted", "eos", "remaining", "expected"),
    [
        ((1, 2, 3), 2, {9}, 10, ((1, 2, 3), 2)),
        ((1, 9, 3), 2, {9}, 10, ((1, 9), 2)),
        ((1, 2, 9), 2, {9}, 10, ((1, 2, 9), 2)),
        ((9, 2, 9), 2, {9}, 10, ((9,), 1)),
        ((1, 2, 3), 2, {9}, 2, ((1, 2), 2)),
        ((1, 2, 3), 2, {9}, 1, ((1,), 1)),
        ((1, 2, 3), 2, {9}, 0, ((), 0)),
        ((1, 9, 3), 2, {9}, 1, ((1,), 1)),
    ],
)
def test_a_verdict_ends_at_eos_and_at_the_budget(tokens, num_accepted, eos, remaining, expected):
    assert acceptance.end(tokens, num_accepted, frozenset(eos), remaining) == expected
