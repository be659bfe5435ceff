"""Verification between two drafts: whose tokens come out, and with which rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.common.errors import Internal
from services.common.values import SamplingParams, SparseRow, VerificationMethod
from services.engine.draft_verifier import DraftVerifier
from services.engine.sampler import Sampler
from services.engine.verifier import Verifier
from tests.unit.engine.sampling_builders import TableModel, sequence, work

REJECTION = VerificationMethod.REJECTION
MODEL = TableModel(16, seed=1)
SAMPLING = SamplingParams(temperature=1.3, top_p=0.95, seed=3)


def sampled_row(tokens: list[int], seed: int = 3) -> SparseRow:
    """What the larger draft would send if it drafted alone."""
    drafting = work(sequence(list(tokens), SamplingParams(temperature=1.3, top_p=0.95, seed=seed), REJECTION))
    [sampled] = Sampler().sample([drafting], MODEL.logits([drafting]))
    assert sampled is not None
    return sampled.row


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SAMPLING], ids=["greedy", "coupled"])
def test_greedy_and_coupled_verdicts_are_the_targets(sampling) -> None:
    works = [work(sequence([1, start], sampling), (start, 3, 4)) for start in range(16)]
    logits = MODEL.logits(works)
    assert DraftVerifier().verify(works, logits) == Verifier().verify(works, logits)


def test_every_token_comes_with_the_row_that_the_draft_would_have_sampled_it_from() -> None:
    lens = set()
    first = int(MODEL.table[2].argmax())
    second = int(MODEL.table[first].argmax())
    for seed in range(40):
        sampling = SamplingParams(temperature=1.3, top_p=0.95, seed=seed)
        verifying = work(
            sequence([1, 2], sampling, REJECTION), (first, second), (SparseRow((first, 9), (0.5, 0.5)), None)
        )
        [verdict] = DraftVerifier().verify([verifying], MODEL.logits([verifying]))
        lens.add(len(verdict.token_ids))
        assert len(verdict.rows) == len(verdict.token_ids) == verdict.num_accepted_tokens + 1
        for place, (token, row) in enumerate(zip(verdict.token_ids, verdict.rows, strict=True)):
            expected = sampled_row([1, 2, *verdict.token_ids[:place]])
            assert dict(zip(*row, strict=True)) == pytest.approx(dict(zip(*expected, strict=True)))
            assert token in row.token_ids
    assert len(lens) > 1, "some proposals were cut, some not"


def test_no_token_is_outside_a_row_shorter_than_the_vocabulary(monkeypatch) -> None:
    monkeypatch.setattr("services.engine.draft_verifier.MAX_DRAFT_ROW_LEN", 2)
    for seed in range(60):
        flat = SamplingParams(temperature=5.0, seed=seed)
        verifying = work(sequence([1, 2], flat, REJECTION), (4,))
        [verdict] = DraftVerifier().verify([verifying], MODEL.logits([verifying]))
        for token, row in zip(verdict.token_ids, verdict.rows, strict=True):
            assert len(row.token_ids) == 2
            assert token in row.token_ids
            assert np.sum(row.probs) == pytest.approx(1.0, abs=1e-6)


def test_rows_go_with_their_sequences_whatever_the_batch() -> None:
    def works() -> list:
        return [
            work(sequence([1, 5], SAMPLING, REJECTION), (3,)),
            work(sequence([1, 6], SamplingParams(temperature=0.0), REJECTION), (3, 4)),
            work(sequence([1, 7], SAMPLING, VerificationMethod.THRESHOLD), (3, 4)),
            work(sequence([1, 8], SAMPLING)),
            work(sequence([1, 9], SAMPLING, REJECTION), (3, 4, 5)),
        ]

    together = DraftVerifier().verify(works(), MODEL.logits(works()))
    alone = [DraftVerifier().verify([one], MODEL.logits([one]))[0] for one in works()]
    assert together == alone
    assert [bool(verdict.rows) for verdict in together] == [True, False, False, False, True]


def test_a_verdict_ends_at_end_of_sequence() -> None:
    best = int(MODEL.table[2].argmax())
    ending = sequence([1, 2], SamplingParams(temperature=0.0), eos=frozenset({best}))
    [verdict] = DraftVerifier().verify([work(ending, (best, 3))], MODEL.logits([work(ending, (best, 3))]))
    assert (verdict.token_ids, verdict.num_accepted_tokens) == ((best,), 1)


@pytest.mark.parametrize("method", VerificationMethod)
def test_logits_that_are_not_finite_are_an_error_of_their_sequence_alone(method: VerificationMethod) -> None:
    asking = [work(sequence([1, start], SAMPLING, method), (3, 4)) for start in range(3)]
    logits = MODEL.logits(asking)
    expected = DraftVerifier().verify(asking, logits)
    logits[4, 5] = torch.nan
    first, error, last = DraftVerifier().verify(asking, logits)
    assert [first, last] == [expected[0], expected[2]]
    assert isinstance(error, Internal)
    assert DraftVerifier().verify([], torch.empty(0, 16)) == []
