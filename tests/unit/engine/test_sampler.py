"""What a draft samples, and that its rows are what it sampled from."""

import math

import numpy as np
import pytest
import torch

from services.common.values import MAX_DRAFT_ROW_LEN, SamplingParams, SparseRow, VerificationMethod
from services.engine.noise import Purpose, gumbel_row
from services.engine.sampler import Sampler
from services.engine.step import Work
from services.engine.verifier import Verifier
from tests.unit.engine.sampling_builders import TableModel, sequence, work

COUPLED, REJECTION, THRESHOLD = VerificationMethod
MODEL = TableModel(8, seed=2)


def sample(seqs, logits=None):
    works = [work(seq) for seq in seqs]
    return Sampler().sample(works, MODEL.logits(works) if logits is None else logits)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_greedy_and_coupled_drafts_of_the_same_model_choose_what_the_target_chooses(temperature):
    seqs = [
        sequence([t], SamplingParams(temperature=temperature, seed=s, top_k=4)) for t in range(8) for s in range(20)
    ]
    works = [work(seq) for seq in seqs]
    verdicts = Verifier().verify(works, MODEL.logits(works))
    sampled = sample(seqs)
    assert [s.token_id for s in sampled] == [v.token_ids[0] for v in verdicts]
    assert all(s.row is None for s in sampled)


@pytest.mark.parametrize("method", VerificationMethod)
def test_greedy_gives_the_best_token_and_no_row(method):
    assert sample([sequence([3], SamplingParams(temperature=0.0), method)]) == [(int(MODEL.table[3].argmax()), None)]


def test_a_rejection_row_is_the_processed_distribution():
    seq = sequence([3], SamplingParams(temperature=0.5, top_k=5), REJECTION)
    row = sample([seq])[0].row
    scaled = MODEL.table[3] / 0.5
    top = scaled.topk(5)
    assert dict(zip(row.token_ids, row.probs, strict=True)) == pytest.approx(
        dict(zip(top.indices.tolist(), torch.softmax(top.values, dim=0).tolist(), strict=True)), abs=1e-6
    )


def test_a_rejection_row_is_cut_to_the_most_likely_and_sums_to_one_in_float32():
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    token, row = sample([sequence([1], verification=REJECTION)], logits)[0]
    assert set(row.token_ids) == set(logits[0].topk(MAX_DRAFT_ROW_LEN).indices.tolist())
    assert sum(row.probs) == pytest.approx(1.0, abs=1e-6)
    assert all(float(np.float32(prob)) == prob for prob in row.probs)
    assert token in row.token_ids


def test_a_rejection_token_is_always_one_of_its_own_row():
    logits = torch.zeros(200, 3 * MAX_DRAFT_ROW_LEN)
    sampled = sample([sequence([1], SamplingParams(seed=s), REJECTION) for s in range(200)], logits)
    assert all(token in row.token_ids for token, row in sampled)


def test_a_rejection_token_is_the_argmax_over_its_own_row_under_draft_noise():
    for seed in range(30):
        token, row = sample([sequence([2, 5], SamplingParams(seed=seed), REJECTION)])[0]
        noise = gumbel_row(seed, 2, Purpose.DRAFT, row.token_ids)
        assert token == row.token_ids[int((np.log(np.float32(row.probs)) + noise).argmax())]


def test_threshold_draws_as_rejection_does_without_rows():
    seqs = [[sequence([t], SamplingParams(seed=9), method) for t in range(8)] for method in (REJECTION, THRESHOLD)]
    rejection, threshold = (sample(group) for group in seqs)
    assert [s.token_id for s in threshold] == [s.token_id for s in rejection]
    assert [s.row for s in threshold] == [None] * 8


def test_a_token_does_not_depend_on_the_batch():
    methods = [REJECTION, COUPLED, THRESHOLD, REJECTION, COUPLED]
    params = [SamplingParams(temperature=t, seed=4, top_p=0.9) for t in (1.0, 0.6, 1.0, 0.0, 0.0)]
    seqs = [sequence([i], p, m) for i, (p, m) in enumerate(zip(params, methods, strict=True))]
    assert sample(seqs) == [sample([seq])[0] for seq in seqs]


def test_works_without_rows_have_no_token():
    prefill, decode = Work(sequence([1, 2]), num_new_tokens=2), work(sequence([3]))
    sampled = Sampler().sample([prefill, decode], MODEL.logits([prefill, decode]))
    assert [s is None for s in sampled] == [True, False]
    assert Sampler().sample([prefill], torch.empty(0, 8)) == [None]


def test_the_only_token_left_is_certain():
    seq = sequence([1], SamplingParams(top_k=1), REJECTION)
    best = int(MODEL.table[1].argmax())
    assert sample([seq]) == [(best, SparseRow((best,), (1.0,)))]


def test_unlikely_tokens_are_sampled_as_often_as_their_row_says():
    logits = torch.tensor([[0.9, 0.07, 0.03]]).log().repeat(20_000, 1)
    sampled = sample([sequence([0], SamplingParams(seed=s), REJECTION) for s in range(20_000)], logits)
    counts = np.bincount([s.token_id for s in sampled], minlength=3)
    assert counts / 20_000 == pytest.approx([0.9, 0.07, 0.03], abs=0.008)


@pytest.mark.parametrize("method", VerificationMethod)
def test_whether_a_row_ends_the_proposal_depends_on_the_row_alone(method):
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.45, 0.35, 0.2]]).log().repeat(200, 1)
    seqs = [sequence([0], SamplingParams(seed=s // 2), method) for s in range(400)]
    every, some = (Sampler(least).sample([work(s) for s in seqs], logits) for least in (0.0, 0.48))
    assert some[::2] == every[::2]
    assert some[1::2] == [None] * 200
    assert {s.token_id for s in every[1::2]} == {0, 1, 2}


def test_the_probability_that_ends_a_proposal_is_that_after_processing():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    (sharp,) = Sampler(0.6).sample([work(sequence([0], SamplingParams(temperature=0.5)))], logits)
    assert sharp is not None
    assert Sampler(0.6).sample([work(sequence([0], SamplingParams(temperature=1.0)))], logits) == [None]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", VerificationMethod)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_end_their_own_proposal_alone(value, method, temperature):
    params = SamplingParams(temperature=temperature, top_p=0.9, seed=3)
    seqs = [sequence([n], params, method) for n in range(3)]
    logits = MODEL.logits([work(seq) for seq in seqs])
    expected = sample(seqs, logits)
    logits[1, 5] = value
    assert sample(seqs, logits) == [expected[0], None, expected[2]]
