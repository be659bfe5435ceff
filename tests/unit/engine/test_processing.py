"""Processing against a slow, readable reference, and its promises one by one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.values import SamplingParams
from services.engine.processing import Row, process, rows_of
from tests.unit.engine.processing_reference import reference
from tests.unit.engine.sampling_builders import sequence, work

DEFAULTS = SamplingParams()


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.5]),
    top_k=st.sampled_from([0, 0, 1, 3, 7, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.7, 0.97]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.7, 0.6]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.4]),
    logit_bias=st.sampled_from([(), (), ((2, 3.0), (5, -100.0)), ((99, 1.0), (0, 1.5))]),
    min_tokens=st.sampled_from([0, 0, 2, 5]),
)
works = st.builds(
    lambda tokens, prompt_len, sampling, drafted: work(
        sequence(tokens, sampling, prompt_len=min(prompt_len, len(tokens)), eos=frozenset({1})), tuple(drafted)
    ),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 4),
    params,
    st.lists(st.integers(0, 9), max_size=3),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(works, min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_scores_are_those_of_the_slow_reference(batch, seed):
    rows = rows_of(batch)
    logits = np.random.default_rng(seed).normal(size=(len(rows), 10)).astype(np.float32) * 3
    scores = process(torch.from_numpy(logits), rows)
    expected = np.array([reference(line.tolist(), row) for line, row in zip(logits, rows, strict=True)])
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.lists(works, min_size=2, max_size=4), st.integers(0, 2**32 - 1))
def test_a_row_does_not_depend_on_the_rows_beside_it(batch, seed):
    rows = rows_of(batch)
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(rows), 10)).astype(np.float32))
    together = process(logits, rows)
    for r, row in enumerate(rows):
        assert torch.equal(process(logits[r : r + 1], [row])[0], together[r])


def test_rows_of_a_work_advance_over_the_drafted_prefix():
    rows = rows_of([work(sequence([4, 5]), (7, 8))])
    assert [(row.index, row.drafted) for row in rows] == [(2, ()), (3, (7,)), (4, (7, 8))]


def test_greedy_rows_without_wishes_get_the_very_logits():
    logits = torch.randn(3, 8)
    rows = rows_of([work(sequence([1], SamplingParams(temperature=0.0)), (2, 3))])
    assert process(logits, rows) is logits


def test_logits_are_left_as_they_were():
    logits = torch.randn(1, 8)
    before = logits.clone()
    process(logits, [Row(sequence([1], SamplingParams(repetition_penalty=2.0, logit_bias=((3, 1.0),), top_k=2)))])
    assert torch.equal(logits, before)


def test_penalties_count_each_drafted_token_from_its_own_row_on():
    seq = sequence([1], SamplingParams(temperature=0.0, frequency_penalty=1.0))
    scores = process(torch.zeros(3, 4), rows_of([work(seq, (2, 2))]))
    assert scores.tolist() == [[0, 0, 0, 0], [0, 0, -1, 0], [0, 0, -2, 0]]


def test_presence_counts_from_the_prompt_on_and_repetition_counts_all():
    seq = sequence([1, 2], SamplingParams(temperature=0.0, presence_penalty=1.0, repetition_penalty=2.0), prompt_len=1)
    assert process(torch.ones(1, 4), [Row(seq)]).tolist() == [[1, 0.5, -0.5, 1]]


@pytest.mark.parametrize(("drafted", "masked"), [((), True), ((3,), True), ((3, 3), False)])
def test_eos_is_masked_by_absolute_index(drafted, masked):
    seq = sequence([1, 2, 3], SamplingParams(min_tokens=3), prompt_len=2, eos=frozenset({0}))
    assert (process(torch.zeros(1, 4), [Row(seq, drafted)])[0, 0].item() == -math.inf) is masked


def test_ties_at_the_top_k_boundary_keep_the_lowest_ids():
    seq = sequence([0], SamplingParams(top_k=3))
    scores = process(torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 2.0]]), [Row(seq)])
    assert torch.isfinite(scores)[0].tolist() == [True, False, True, False, False, True]


def test_top_p_keeps_the_token_that_reaches_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    scores = process(logits, [Row(sequence([0], SamplingParams(top_p=0.6)))])
    assert scores.exp()[0].tolist() == pytest.approx([0.625, 0.375, 0.0, 0.0])


def test_top_p_is_taken_of_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    scores = process(logits, [Row(sequence([0], SamplingParams(top_k=2, top_p=0.55)))])
    assert scores.exp()[0].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])


def test_top_p_over_a_flat_large_vocabulary_reaches_beyond_the_first_sort():
    logits = torch.zeros(2, 3000)
    rows = [Row(sequence([0], SamplingParams(top_p=0.5))), Row(sequence([0], SamplingParams(top_k=600)))]
    assert torch.isfinite(process(logits, rows)).sum(dim=1).tolist() == [1500, 600]


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_a_row_without_numbers_leaves_the_others_as_they_are(limits):
    """A device does not look at its rows before it works on them."""
    rows = [Row(sequence([0], SamplingParams(**limits))) for _ in range(3)]
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    expected = process(logits, rows)
    logits[1, 5] = torch.nan
    scores = process(logits, rows)
    assert torch.equal(scores[[0, 2]], expected[[0, 2]])


def test_a_tiny_temperature_leaves_the_best_token():
    scores = process(torch.tensor([[40.0, 50.0, -3.0]]), [Row(sequence([0], SamplingParams(temperature=1e-40)))])
    assert scores.exp().tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0])
@pytest.mark.parametrize("limits", [{}, {"top_k": 3, "top_p": 0.5, "min_p": 0.5}])
def test_the_smallest_repetition_penalty_leaves_a_distribution(temperature, limits):
    sampling = SamplingParams(temperature=temperature, repetition_penalty=1e-45, **limits)
    scores = process(
        10 * torch.randn(1, 8, generator=torch.Generator().manual_seed(1)), [Row(sequence([1, 2], sampling))]
    )
    assert not scores.isnan().any()
    assert torch.isfinite(scores.amax())


def test_ids_that_the_model_does_not_have_are_skipped():
    sampling = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias=((9, 1.0),), min_tokens=5)
    seq = sequence([8, 1], sampling, eos=frozenset({7, 2}))
    assert process(torch.ones(1, 4), [Row(seq)]).tolist() == [[1.0, 0.5, -math.inf, 1.0]]
