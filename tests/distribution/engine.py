"""Generations through the whole engine: draft core, target core, block managers and models, without a wire.

Owns: playing the coordinator for many sessions at once. Must not know: how results are judged, which models there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from services.common.items import Close, Decode, Identity, Open, Propose, Proposed, Refused, Tokens, Verify
from services.common.values import ModelInfo, SamplingParams, VerificationMethod, derive_draft_seed
from services.draft.core import DraftCore
from services.engine.block_manager import BlockManager
from services.engine.draft_verifier import DraftVerifier
from services.engine.drafters.base import Drafter
from services.engine.drafters.features import FeatureDrafter
from services.engine.drafters.model import ModelDrafter
from services.engine.drafters.staged import StagedDrafter
from services.engine.drafters.translated import TranslatedDrafter
from services.engine.feature_draft import FeatureDraftModel
from services.engine.feature_input import FeatureInput
from services.engine.feature_tap import FeatureTap
from services.engine.model_runner import ModelRunner
from services.engine.models import probe_model
from services.engine.paged_attention import IMPLEMENTATION, register
from services.engine.paged_model import LogitsSampler, PagedDraftModel, PagedEngine, PagedTargetModel
from services.engine.sampler import Sampler
from services.engine.translated_sampler import TranslatingSampler
from services.engine.verifier import Verifier
from services.engine.vocabulary_pair import VocabularyPair
from services.target.core import TargetCore

CONNECTION = 1
BLOCK_SIZE = 4


def paged_engine(module: PreTrainedModel, num_blocks: int = 2048) -> PagedEngine:
    """A paged engine over a copy of a model in memory."""
    register()
    module = copy.deepcopy(module)
    module.set_attn_implementation(IMPLEMENTATION)
    model = probe_model(module, torch.float32, torch.device("cpu"))
    model = replace(model, tap=FeatureTap(module))
    info = ModelInfo("tiny", "", "", model.vocab_size, "float32", "cpu")
    runner = ModelRunner(model, num_blocks, BLOCK_SIZE)
    return PagedEngine(runner, info, frozenset(), model.max_sequence_len, num_blocks, BLOCK_SIZE, 0.0)


def target_core(
    module: PreTrainedModel, verifier: Verifier, max_sequences: int, max_sequence_len: int = 64
) -> TargetCore:
    engine = paged_engine(module)
    blocks = BlockManager(engine.num_blocks, engine.block_size)
    model = PagedTargetModel(engine, verifier)
    return TargetCore(model, blocks, max_sequences=max_sequences, max_sequence_len=max_sequence_len, max_draft_tokens=4)


def draft_core(drafter: Drafter, max_sequences: int, max_sequence_len: int = 64) -> DraftCore:
    return DraftCore(drafter, max_sequences=max_sequences, max_sequence_len=max_sequence_len, max_draft_tokens=4)


def model_drafter(module: PreTrainedModel, sampler: LogitsSampler) -> ModelDrafter:
    engine = paged_engine(module)
    return ModelDrafter(PagedDraftModel(engine, sampler), BlockManager(engine.num_blocks, engine.block_size))


def feature_drafter(module: PreTrainedModel) -> FeatureDrafter:
    """The model fed with features; those are added to its embeddings as they are."""
    module = copy.deepcopy(module)
    table = module.get_input_embeddings().weight.detach()
    module.set_input_embeddings(FeatureInput(table, 0.3 * torch.eye(table.shape[1])))
    engine = paged_engine(module)
    model = FeatureDraftModel(engine, Sampler())
    return FeatureDrafter(model, BlockManager(engine.num_blocks, engine.block_size))


def translated_drafter(module: PreTrainedModel, pair: VocabularyPair, greedy_by_text: bool = True) -> TranslatedDrafter:
    inner = model_drafter(module, TranslatingSampler(Sampler(), pair))
    return TranslatedDrafter(
        inner, pair, max_own_len=module.config.max_position_embeddings, greedy_by_text=greedy_by_text
    )


def staged_drafter(smaller: Drafter, module: PreTrainedModel) -> StagedDrafter:
    """Proposals of 3 tokens come of up to 3 inner rounds."""
    engine = paged_engine(module)
    model, blocks = PagedTargetModel(engine, DraftVerifier()), BlockManager(engine.num_blocks, engine.block_size)
    return StagedDrafter(smaller, model, blocks, num_draft_tokens=2)


def generate(
    target: TargetCore,
    draft: DraftCore,
    prompt: list[int],
    samplings: list[SamplingParams],
    method: VerificationMethod,
    num_tokens: int,
    attempt: int,
    on_verified: Callable[[Tokens], None] = lambda result: None,
) -> npt.NDArray[np.int64]:
    """The first `num_tokens` tokens of a session for each of `samplings`, all running at once: [sessions, num_tokens].

    The first token is decoded, the others come in rounds of 1 to 3 drafted tokens. Both cores are empty afterwards;
    `attempt` grows from one call to the next; `on_verified` hears every verdict.
    """
    tokens = {str(number): list(prompt) for number in range(len(samplings))}
    sampling_of = dict(zip(tokens, samplings, strict=True))
    budget = num_tokens + 8
    openings = [_open(session, attempt, prompt, sampling, method, budget) for session, sampling in sampling_of.items()]
    _run(draft, [_for_draft(item) for item in openings])
    answers = _run(target, [*openings, *(Decode(item.identity, 1) for item in openings)])
    committed = _commit(tokens, answers)
    round_number = 0
    while running := [session for session in tokens if len(tokens[session]) < len(prompt) + num_tokens]:
        round_number += 1
        features = {result.identity.session_id: result.features for result in answers}
        identities = {session: Identity(session, 1, attempt, round_number, len(tokens[session])) for session in running}
        asked = [
            Propose(
                identity,
                tuple(committed[session]),
                1 + sampling_of[session].seed % 3,
                round_number,
                features=features[session],
            )
            for session, identity in identities.items()
        ]
        proposals = [r for r in _run(draft, asked) if isinstance(r, Proposed)]
        verifies = [Verify(identities[r.identity.session_id], r.proposal) for r in proposals]
        answers = _run(target, verifies)
        for result in answers:
            on_verified(result)
        committed = _commit(tokens, answers)
    closes = [Close(item.identity) for item in openings]
    for core in (draft, target):
        _run(core, closes)
        core.check_integrity()
    return np.array([line[len(prompt) :][:num_tokens] for line in tokens.values()])


def _open(
    session: str,
    attempt: int,
    prompt: list[int],
    sampling: SamplingParams,
    method: VerificationMethod,
    max_new_tokens: int,
) -> Open:
    return Open(
        identity=Identity(session, 1, attempt, 0, len(prompt)),
        prefix=tuple(prompt),
        prompt_len=len(prompt),
        eos_token_ids=frozenset(),
        sampling=sampling,
        verification=method,
        max_new_tokens=max_new_tokens,
        features=True,
    )


def _for_draft(item: Open) -> Open:
    """As the coordinator opens it on the draft: with a derived seed where the draft may not know the target's noise."""
    if item.verification is not VerificationMethod.REJECTION:
        return item
    return replace(item, sampling=replace(item.sampling, seed=derive_draft_seed(item.sampling.seed)))


def _run(core: DraftCore | TargetCore, items: list[Any]) -> list[Any]:
    """Hands items to a core and steps it until it has nothing left to do; raises the error of a refusal."""
    answers = core.handle(CONNECTION, items)
    while core.has_work:
        answers = [*answers, *core.step()]
    results = [result for _, result in answers]
    for result in results:
        if isinstance(result, Refused):
            raise result.error
    return results


def _commit(tokens: dict[str, list[int]], results: list[Tokens]) -> dict[str, list[int]]:
    """Appends what came to each session's tokens; returns it by session."""
    committed: dict[str, list[int]] = {}
    for result in results:
        session = result.identity.session_id
        tokens[session] += result.token_ids
        committed.setdefault(session, []).extend(result.token_ids)
    return committed
