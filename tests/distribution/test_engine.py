"""Tokens through cores, block managers and paged models have the target model's distribution: 10^4 tokens each."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PreTrainedModel

from services.common.values import SamplingParams, VerificationMethod
from services.engine.drafters.base import Drafter
from services.engine.drafters.fallback import FallbackDrafter
from services.engine.drafters.ngram import NgramDrafter
from services.engine.drafters.suffix import SuffixDrafter, SuffixPolicy
from services.engine.processing import Row
from services.engine.sampler import Sampler
from services.engine.step import Sampled, Work
from services.engine.verifier import Verifier
from services.engine.vocabulary_pair import match_vocabularies
from tests.distribution.chains import NUM_TOKENS, count_cells, tell_lies
from tests.distribution.chi_square import LEAST_P, p_value
from tests.distribution.engine import (
    draft_core,
    feature_drafter,
    generate,
    model_drafter,
    staged_drafter,
    target_core,
    translated_drafter,
)
from tests.tiny_models import build_model
from tests.unit.engine.processing_reference import reference
from tests.unit.engine.sampling_builders import sequence
from tests.vocabularies import characters, twin, vocabulary

VOCAB_SIZE = 8
NUM_DRAWS = 10_000
NUM_AT_ONCE = 256
PROMPT = [1, 2, 5, 1, 2]
TOKENS = list("abcdefgh")
OTHER_TOKENS = ["x", "f", "c", "a", "<0x63>", "y", "b", "g", "d", "h"]
"""A draft's: in another order, two unknown to the target, one of the target's missing, one twice."""
SAMPLING = {
    "top_k": {"top_k": 4, "temperature": 1.2},
    "penalties": {"top_p": 0.95, "presence_penalty": 0.8, "repetition_penalty": 1.3},
}


class LyingSampler:
    """Samples as any draft, and lies about it."""

    def sample(self, works: list[Work], logits: torch.Tensor) -> list[Sampled | None]:
        return [token and tell_lies(token) for token in Sampler().sample(works, logits)]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return build_model("llama", vocab_size=VOCAB_SIZE, seed=1, peakedness=2.0)


def drafter_of(kind: str, target: PreTrainedModel) -> Drafter:
    near = copy.deepcopy(target)
    with torch.no_grad():
        head = near.get_output_embeddings().weight
        head += 0.15 * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(3))
    stranger = build_model("llama", vocab_size=VOCAB_SIZE, seed=2, peakedness=2.0)
    match kind:
        case "good":
            return model_drafter(near, Sampler())
        case "bad":
            return model_drafter(stranger, Sampler())
        case "identical":
            return model_drafter(target, Sampler())
        case "uncertain":
            return model_drafter(near, Sampler(min_prob=0.4))
        case "features":
            return feature_drafter(near)
        case "lying":
            return model_drafter(near, LyingSampler())
        case "translated":
            pair = match_vocabularies(vocabulary(characters(OTHER_TOKENS)), vocabulary(characters(TOKENS)))
            return translated_drafter(twin(near, pair, len(OTHER_TOKENS)), pair)
        case "staged":
            return staged_drafter(model_drafter(stranger, Sampler()), near)
        case "staged-deterministic":
            return staged_drafter(NgramDrafter(), near)
        case "chain":
            return FallbackDrafter([SuffixDrafter(SuffixPolicy(min_match=2))], model_drafter(near, Sampler()))
    return NgramDrafter()


@torch.inference_mode()
def exact(target: PreTrainedModel, sampling: SamplingParams) -> npt.NDArray[np.float64]:
    """The probability of each cell under the model's own forward and the slow reference of processing."""
    row_sequence = sequence(list(PROMPT), sampling)
    probs: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NUM_TOKENS):
        logits = target(torch.tensor([[*PROMPT, *tokens] for tokens in probs])).logits[:, -1].tolist()
        probs = {
            (*tokens, token): prob * math.exp(score)
            for (tokens, prob), row in zip(probs.items(), logits, strict=True)
            for token, score in enumerate(reference(row, Row(row_sequence, tokens)))
        }
    return np.array([probs[tokens] for tokens in itertools.product(range(VOCAB_SIZE), repeat=NUM_TOKENS)])


@pytest.mark.parametrize("method", [VerificationMethod.REJECTION, VerificationMethod.COUPLED], ids=lambda m: m.value)
@pytest.mark.parametrize(
    ("kind", "processing"),
    [
        ("good", "penalties"),
        ("bad", "top_k"),
        ("identical", "top_k"),
        ("deterministic", "penalties"),
        ("uncertain", "top_k"),
        ("features", "penalties"),
        ("features", "top_k"),
        ("lying", "penalties"),
        ("translated", "penalties"),
        ("translated", "top_k"),
        ("staged", "penalties"),
        ("staged-deterministic", "top_k"),
        ("chain", "top_k"),
    ],
)
def test_generated_tokens_have_the_targets_joint_distribution(target, method, kind, processing):
    num_sessions = -(-NUM_DRAWS // NUM_TOKENS)
    verifier = Verifier(untrusted_drafts=kind == "lying")
    cores = target_core(target, verifier, NUM_AT_ONCE), draft_core(drafter_of(kind, target), NUM_AT_ONCE)
    counts = np.zeros(VOCAB_SIZE**NUM_TOKENS, dtype=np.int64)
    for number, start in enumerate(range(0, num_sessions, NUM_AT_ONCE)):
        seeds = range(start, min(start + NUM_AT_ONCE, num_sessions))
        samplings = [SamplingParams(**SAMPLING[processing], seed=seed) for seed in seeds]
        counts += count_cells(generate(*cores, PROMPT, samplings, method, NUM_TOKENS, attempt=number), VOCAB_SIZE)
    assert p_value(counts, exact(target, SamplingParams(**SAMPLING[processing]))) >= LEAST_P
