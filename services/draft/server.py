"""The draft worker's composition root: configuration in, a serving worker out.

Owns: which drafter stands behind the core. Must not know: how proposals come about. torch is loaded for models only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import replace
from typing import NamedTuple

from outrider.v1 import draft_pb2

from services.common.errors import ConfigError
from services.common.failure import Failure
from services.common.tally import Watched, WorkerTally
from services.common.telemetry_settings import METRICS_OFF
from services.common.tracing import NO_TRACER, Tracer
from services.common.values import WorkerInfo
from services.common.worker_server import (
    BuiltWorker,
    Recipe,
    RunningWorker,
    new_instance_id,
    nothing_to_close,
    running_worker,
    serve_worker,
)
from services.draft.config import DraftConfig
from services.draft.core import DraftCore
from services.draft.servicer import DraftServicer
from services.engine.block_manager import BlockManager
from services.engine.device_usage import device_usage_of, utilisation_of
from services.engine.drafters.base import Drafter
from services.engine.drafters.fallback import FallbackDrafter
from services.engine.drafters.features import FEATURES, FeatureDrafter
from services.engine.drafters.model import ModelDrafter
from services.engine.drafters.mtp import MTP, MtpDrafter
from services.engine.drafters.ngram import NgramDrafter
from services.engine.drafters.output_memory import NODE_BYTES, OutputMemory
from services.engine.drafters.simulated import simulated_drafter
from services.engine.drafters.staged import StagedDrafter
from services.engine.drafters.suffix import MAX_DEPTH, SuffixDrafter, SuffixPolicy
from services.engine.drafters.translated import TranslatedDrafter
from services.engine.engine_thread import EngineThread
from services.engine.prefix_cache import model_key
from services.engine.simulated import (
    SIMULATED,
    SIMULATED_MAX_SEQUENCE_LEN,
    SIMULATED_NUM_BLOCKS,
    SimulatedTarget,
    simulated_info,
)
from services.engine.step import TargetModel

MAX_LOOKUP_LEN = 1 << 20
"""Most tokens of a sequence for a drafter without a model."""


async def serve(config: DraftConfig) -> None:
    """Serves until SIGTERM or SIGINT."""
    await serve_worker(config, _recipe(config))


def running_draft(
    config: DraftConfig, metrics_port: int = METRICS_OFF, tracer: Tracer = NO_TRACER
) -> AbstractAsyncContextManager[RunningWorker]:
    """A draft worker inside this process, from enter to exit."""
    return running_worker(config, _recipe(config), metrics_port, tracer)


def _recipe(config: DraftConfig) -> Recipe:
    service = draft_pb2.DESCRIPTOR.services_by_name["DraftService"]
    return Recipe("draft", service, DraftServicer, lambda: build(config))


class _Drafter(NamedTuple):
    """What stands behind the core, and how it ends."""

    drafter: Drafter
    max_sequence_len: int
    close: Callable[[], None] = nothing_to_close


def build(config: DraftConfig) -> BuiltWorker:
    """Makes the drafter, with its model if it has one. Raises ConfigError or ModelUnsupported."""
    failure = Failure()
    drafter, drafter_len, close = _drafter(config, failure)
    max_sequence_len = min(config.max_sequence_len or drafter_len, drafter_len)
    tally = WorkerTally()
    core = DraftCore(
        drafter,
        max_sequences=config.max_sequences,
        max_sequence_len=max_sequence_len,
        max_draft_tokens=config.max_draft_tokens,
        tally=tally,
    )
    info = WorkerInfo(
        instance_id=new_instance_id(),
        role="draft",
        model=drafter.info,
        drafter=drafter.kind,
        max_draft_tokens=config.max_draft_tokens,
        max_sequences=config.max_sequences,
        max_sequence_len=max_sequence_len,
        wants_features=bool({FEATURES, MTP} & set(config.chain)),
    )
    engine = EngineThread(core, "draft engine", config.max_queued_items, failure)
    device = config.device
    watched = Watched(tally, lambda: core.prefix_cache_stats, device_usage_of(device), utilisation_of(device))
    return BuiltWorker(engine, info, watched, close)


def _drafter(config: DraftConfig, failure: Failure) -> _Drafter:
    *lookups, last = config.chain
    parts = [_single(config, name, failure, min_match=config.chain_min_match).drafter for name in lookups]
    end = _single(config, last, failure)
    return end._replace(drafter=FallbackDrafter(parts, end.drafter)) if parts else end


def _single(config: DraftConfig, name: str, failure: Failure, min_match: int = 1) -> _Drafter:
    match name:
        case "ngram":
            return _Drafter(NgramDrafter(config.ngram_max, max(min_match, config.ngram_min)), MAX_LOOKUP_LEN)
        case "suffix":
            return _Drafter(_suffix_drafter(config, min_match), MAX_LOOKUP_LEN)
        case "simulated":
            blocks = _simulated_blocks(config)
            drafter = simulated_drafter(
                blocks,
                token_ms=config.simulated_token_ms,
                acceptance=config.simulated_acceptance,
                seed=config.simulated_seed,
            )
            return _Drafter(drafter, SIMULATED_MAX_SEQUENCE_LEN)
        case "staged":
            return _staged_drafter(config, failure)
        case "features":
            return _feature_drafter(config, failure)
        case "mtp":
            return _mtp_drafter(config)
    return _model_drafter(config, failure)


def _simulated_blocks(config: DraftConfig) -> BlockManager:
    return BlockManager(config.num_blocks or SIMULATED_NUM_BLOCKS, config.block_size, model_key(simulated_info()))


def _suffix_drafter(config: DraftConfig, min_match: int) -> SuffixDrafter:
    policy = SuffixPolicy(
        min_match=max(min_match, config.suffix_min_match),
        max_len_factor=config.suffix_max_len_factor,
        min_prob=config.suffix_min_prob,
    )
    max_nodes = (config.suffix_memory_mb << 20) // NODE_BYTES
    return SuffixDrafter(policy, OutputMemory(max_nodes, MAX_DEPTH) if config.suffix_shared else None)


def _model_drafter(config: DraftConfig, failure: Failure) -> _Drafter:
    from services.engine.composition import engine_of, vocabulary_pair_of
    from services.engine.feature_draft import takes_features
    from services.engine.paged_model import PagedDraftModel
    from services.engine.sampler import Sampler
    from services.engine.translated_sampler import TranslatingSampler

    pair = vocabulary_pair_of(config.model, config.target_tokenizer, config.min_vocab_overlap)
    engine = engine_of(config, failure, config.draft_target)
    if takes_features(engine):
        engine.close()
        raise ConfigError(f"drafter: {engine.info.name} was trained for the drafter features, not model")
    blocks = BlockManager(engine.num_blocks, engine.block_size, model_key(engine.info))
    max_len = min(engine.max_sequence_len, engine.num_blocks * engine.block_size)
    sampler = TranslatingSampler(Sampler(), pair) if pair else Sampler(config.min_draft_prob)
    drafter = ModelDrafter(PagedDraftModel(engine, sampler), blocks, prefill_budget=config.prefill_budget)
    if pair is None:
        return _Drafter(drafter, max_len, engine.close)
    by_text = config.greedy_matching == "text"
    translated = TranslatedDrafter(drafter, pair, max_own_len=max_len, greedy_by_text=by_text)
    return _Drafter(translated, max_len, engine.close)


def _feature_drafter(config: DraftConfig, failure: Failure) -> _Drafter:
    from services.engine.composition import engine_of
    from services.engine.feature_draft import FeatureDraftModel
    from services.engine.sampler import Sampler

    engine = engine_of(config, failure, config.draft_target)
    try:
        model = FeatureDraftModel(engine, Sampler(config.min_draft_prob))
    except BaseException:
        engine.close()
        raise
    blocks = BlockManager(engine.num_blocks, engine.block_size, model_key(engine.info))
    drafter = FeatureDrafter(model, blocks, prefill_budget=config.prefill_budget)
    return _Drafter(drafter, min(engine.max_sequence_len, engine.num_blocks * engine.block_size), engine.close)


def _mtp_drafter(config: DraftConfig) -> _Drafter:
    from services.engine.composition import mtp_heads_of
    from services.engine.sampler import Sampler

    model = mtp_heads_of(config, config.draft_target, Sampler(config.min_draft_prob))
    return _Drafter(MtpDrafter(model), MAX_LOOKUP_LEN)


def _staged_drafter(config: DraftConfig, failure: Failure) -> _Drafter:
    smaller_config = replace(config, model=config.staged_model, model_name="") if config.staged_model else config
    smaller = _single(smaller_config, config.staged_drafter, failure)
    try:
        model, blocks, model_len, close = _verifying_model(config, failure)
    except BaseException:
        smaller.close()
        raise
    drafter = StagedDrafter(
        smaller.drafter,
        model,
        blocks,
        num_draft_tokens=config.staged_draft_tokens,
        prefill_budget=config.prefill_budget,
    )
    closing = ExitStack()
    closing.callback(smaller.close)
    closing.callback(close)
    staged = _Drafter(drafter, min(model_len, smaller.max_sequence_len), closing.close)
    info = smaller.drafter.info
    if info is not None and info.vocab_digest != model.info.vocab_digest:
        staged.close()
        raise ConfigError(f"staged_drafter: {info.name} and {model.info.name} differ in vocabulary")
    return staged


class _VerifyingModel(NamedTuple):
    """The model that a smaller drafter drafts for."""

    model: TargetModel
    blocks: BlockManager
    max_sequence_len: int
    close: Callable[[], None] = nothing_to_close


def _verifying_model(config: DraftConfig, failure: Failure) -> _VerifyingModel:
    if config.model == SIMULATED:
        blocks = _simulated_blocks(config)
        model = SimulatedTarget(blocks, step_ms=config.simulated_token_ms)
        return _VerifyingModel(model, blocks, SIMULATED_MAX_SEQUENCE_LEN)
    from services.engine.composition import engine_of
    from services.engine.draft_verifier import DraftVerifier
    from services.engine.paged_model import PagedTargetModel

    engine = engine_of(config, failure, config.draft_target)
    blocks = BlockManager(engine.num_blocks, engine.block_size, model_key(engine.info))
    max_len = min(engine.max_sequence_len, engine.num_blocks * engine.block_size)
    return _VerifyingModel(PagedTargetModel(engine, DraftVerifier()), blocks, max_len, engine.close)
