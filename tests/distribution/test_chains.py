"""Tokens through sampler and verifier have exactly the target's distribution: pairwise cases, 10^5 tokens each."""

import numpy as np
import pytest

from services.common.values import Proposal, VerificationMethod
from services.engine.verifier import Verifier
from tests.distribution.cases import PAIRWISE
from tests.distribution.chains import DRAFTERS, Case, Drafting, draw, exact, open_sequence
from tests.distribution.chi_square import LEAST_P, p_value

TRUSTING = Verifier()
NUM_DRAWS = 100_000


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_first_tokens_have_the_targets_joint_distribution(case):
    assert p_value(draw(case, NUM_DRAWS), exact(case)) >= LEAST_P


def test_a_coupled_chain_is_the_same_whatever_drafts():
    drawn = [draw(Case(drafter, "all", 8, VerificationMethod.COUPLED), 1_500) for drafter in DRAFTERS]
    assert all(np.array_equal(counts, drawn[0]) for counts in drawn)


@pytest.mark.parametrize("method", VerificationMethod)
def test_the_lying_drafter_proposes_otherwise_than_the_good_one(method):
    def proposals(drafter: str) -> list[Proposal]:
        case = Case(drafter, "all", 8, method)
        return Drafting(case).propose([open_sequence(case, seed) for seed in range(8)], [3] * 8)

    assert all(lie != truth for lie, truth in zip(proposals("lying"), proposals("good"), strict=True))


def test_the_lying_drafter_would_be_found_out_if_it_were_trusted(monkeypatch):
    case = Case("lying", "top_k", 8, VerificationMethod.REJECTION)
    monkeypatch.setattr("tests.distribution.chains.Verifier", lambda untrusted_drafts: TRUSTING)
    assert p_value(draw(case, 15_000), exact(case)) < LEAST_P


def test_rows_shorter_than_the_vocabulary_keep_the_distribution(monkeypatch):
    monkeypatch.setattr("services.engine.sampler.MAX_DRAFT_ROW_LEN", 3)
    case = Case("good", "min_p", 8, VerificationMethod.REJECTION)
    assert p_value(draw(case, NUM_DRAWS), exact(case)) >= LEAST_P


def test_threshold_verification_is_seen_to_be_lossy():
    case = Case("bad", "top_p", 8, VerificationMethod.THRESHOLD)
    assert p_value(draw(case, 15_000), exact(case)) < LEAST_P
