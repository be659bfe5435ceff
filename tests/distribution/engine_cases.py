"""Which combinations are drawn through the whole engine, and the drawing: sessions through cores and paged models.

Owns: the drafters over tiny models, the processing, the exact distribution under the model's own forward. Must not
know: how results are judged.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
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
from tests.distribution.chains import DRAFTERS, NUM_TOKENS, count_cells, tell_lies
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

NUM_AT_ONCE = 256
PROMPT = [1, 2, 5, 1, 2]
TOKENS = list("abcdefgh")
OTHER_TOKENS = ["x", "f", "c", "a", "<0x63>", "y", "b", "g", "d", "h"]
"""A draft's: in another order, two unknown to the target, one of the target's missing, one twice."""
SAMPLING = {
    "top_k": SamplingParams(top_k=4, temperature=1.2),
    "top_p": SamplingParams(top_p=0.85, temperature=1.5),
    "min_p": SamplingParams(min_p=0.05, temperature=1.5),
    "penalties": SamplingParams(top_p=0.95, presence_penalty=0.8, repetition_penalty=1.3),
}


@dataclass(frozen=True, slots=True)
class EngineCase:
    """One combination to draw from."""

    drafter: str
    processing: str
    vocab_size: int
    method: VerificationMethod

    def __str__(self) -> str:
        return f"engine-{self.drafter}-{self.processing}-{self.vocab_size}-{self.method.value}"

    @property
    def sampling(self) -> SamplingParams:
        return SAMPLING[self.processing]

    @property
    def target(self) -> PreTrainedModel:
        return build_model("llama", vocab_size=self.vocab_size, seed=1, peakedness=2.0)


_METHODS = (VerificationMethod.REJECTION, VerificationMethod.COUPLED)
_OTHER_DRAFTERS = (
    ("uncertain", "top_k"),
    ("features", "penalties"),
    ("features", "top_k"),
    ("translated", "penalties"),
    ("translated", "top_k"),
    ("staged", "penalties"),
    ("staged-deterministic", "top_k"),
    ("chain", "min_p"),
)
_OTHERS = [EngineCase(*pair, 8, method) for pair in _OTHER_DRAFTERS for method in _METHODS]
ALL = [*(EngineCase(*part) for part in itertools.product(DRAFTERS, SAMPLING, (8, 16), _METHODS)), *_OTHERS]
PAIRWISE = [
    # Every drafter with two kinds of processing, every kind with two drafters or more.
    *(
        EngineCase(drafter, list(SAMPLING)[(i + shift) % len(SAMPLING)], 8, method)
        for i, drafter in enumerate(DRAFTERS)
        for shift, method in enumerate(_METHODS)
    ),
    EngineCase("lying", "min_p", 16, VerificationMethod.REJECTION),
    EngineCase("identical", "top_k", 8, VerificationMethod.REJECTION),
    *_OTHERS,
]


class LyingSampler:
    """Samples as any draft, and lies about it."""

    def sample(self, works: list[Work], logits: torch.Tensor) -> list[Sampled | None]:
        sampled = Sampler().sample(works, logits)
        return [token and tell_lies(token, logits.shape[1]) for token in sampled]


def drafter_of(case: EngineCase) -> Drafter:
    target = case.target
    near = copy.deepcopy(target)
    with torch.no_grad():
        head = near.get_output_embeddings().weight
        head += 0.15 * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(3))
    stranger = build_model("llama", vocab_size=case.vocab_size, seed=2, peakedness=2.0)
    match case.drafter:
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
def exact(case: EngineCase) -> npt.NDArray[np.float64]:
    """The probability of each cell under the model's own forward and the slow reference of processing."""
    target, row_sequence = case.target, sequence(list(PROMPT), case.sampling)
    probs: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NUM_TOKENS):
        logits = target(torch.tensor([[*PROMPT, *tokens] for tokens in probs])).logits[:, -1].tolist()
        probs = {
            (*tokens, token): prob * math.exp(score)
            for (tokens, prob), row in zip(probs.items(), logits, strict=True)
            for token, score in enumerate(reference(row, Row(row_sequence, tokens)))
        }
    return np.array([probs[tokens] for tokens in itertools.product(range(case.vocab_size), repeat=NUM_TOKENS)])


def draw(case: EngineCase, num_draws: int) -> npt.NDArray[np.int64]:
    """How often each sequence of NUM_TOKENS tokens came, `num_draws` tokens in all: [vocab_size ** NUM_TOKENS]."""
    num_sessions = -(-num_draws // NUM_TOKENS)
    verifier = Verifier(untrusted_drafts=case.drafter == "lying")
    cores = target_core(case.target, verifier, NUM_AT_ONCE), draft_core(drafter_of(case), NUM_AT_ONCE)
    counts = np.zeros(case.vocab_size**NUM_TOKENS, dtype=np.int64)
    for attempt, start in enumerate(range(0, num_sessions, NUM_AT_ONCE)):
        seeds = range(start, min(start + NUM_AT_ONCE, num_sessions))
        samplings = [replace(case.sampling, seed=seed) for seed in seeds]
        tokens = generate(*cores, PROMPT, samplings, case.method, NUM_TOKENS, attempt)
        counts += count_cells(tokens, case.vocab_size)
    return counts
