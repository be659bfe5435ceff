"""The draft worker's composition root: configuration in, a serving worker out.

Owns: which drafter stands behind the core. Must not know: how proposals come about. torch is loaded for models only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from outrider.v1 import draft_pb2

from services.common.errors import ConfigError
from services.common.failure import Failure
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
from services.engine.drafters.base import Drafter
from services.engine.drafters.model import ModelDrafter
from services.engine.drafters.ngram import NgramDrafter
from services.engine.drafters.simulated import simulated_drafter
from services.engine.drafters.translated import TranslatedDrafter
from services.engine.engine_thread import EngineThread
from services.engine.prefix_cache import model_key
from services.engine.simulated import SIMULATED_MAX_SEQUENCE_LEN, SIMULATED_NUM_BLOCKS, simulated_info

MAX_LOOKUP_LEN = 1 << 20
"""Most tokens of a sequence for a drafter without a model."""


async def serve(config: DraftConfig) -> None:
    """Serves until SIGTERM or SIGINT."""
    await serve_worker(config, _recipe(config))


def running_draft(config: DraftConfig) -> AbstractAsyncContextManager[RunningWorker]:
    """A draft worker inside this process, from enter to exit."""
    return running_worker(config, _recipe(config))


def _recipe(config: DraftConfig) -> Recipe:
    service = draft_pb2.DESCRIPTOR.services_by_name["DraftService"]
    return Recipe(service, DraftServicer, lambda: build(config))


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
    core = DraftCore(
        drafter,
        max_sequences=config.max_sequences,
        max_sequence_len=max_sequence_len,
        max_draft_tokens=config.max_draft_tokens,
    )
    info = WorkerInfo(
        instance_id=new_instance_id(),
        role="draft",
        model=drafter.info,
        drafter=drafter.kind,
        max_draft_tokens=config.max_draft_tokens,
        max_sequences=config.max_sequences,
        max_sequence_len=max_sequence_len,
    )
    engine = EngineThread(core, "draft engine", config.max_queued_items, failure)
    return BuiltWorker(engine, info, close)


def _drafter(config: DraftConfig, failure: Failure) -> _Drafter:
    match config.drafter:
        case "ngram":
            if not 1 <= config.ngram_min <= config.ngram_max:
                raise ConfigError(f"ngram_min: {config.ngram_min} is not between 1 and ngram_max, {config.ngram_max}")
            return _Drafter(NgramDrafter(config.ngram_max, config.ngram_min), MAX_LOOKUP_LEN)
        case "simulated":
            blocks = BlockManager(
                config.num_blocks or SIMULATED_NUM_BLOCKS, config.block_size, model_key(simulated_info())
            )
            drafter = simulated_drafter(
                blocks,
                token_ms=config.simulated_token_ms,
                acceptance=config.simulated_acceptance,
                seed=config.simulated_seed,
            )
            return _Drafter(drafter, SIMULATED_MAX_SEQUENCE_LEN)
    return _model_drafter(config, failure)


def _model_drafter(config: DraftConfig, failure: Failure) -> _Drafter:
    from services.engine.composition import engine_of, vocabulary_pair_of
    from services.engine.paged_model import PagedDraftModel
    from services.engine.sampler import Sampler
    from services.engine.translated_sampler import TranslatingSampler

    pair = vocabulary_pair_of(config.model, config.target_tokenizer, config.min_vocab_overlap)
    engine = engine_of(config, failure)
    blocks = BlockManager(engine.num_blocks, engine.block_size, model_key(engine.info))
    max_len = min(engine.max_sequence_len, engine.num_blocks * engine.block_size)
    sampler = TranslatingSampler(Sampler(), pair) if pair else Sampler()
    drafter = ModelDrafter(PagedDraftModel(engine, sampler), blocks, prefill_budget=config.prefill_budget)
    if pair is None:
        return _Drafter(drafter, max_len, engine.close)
    by_text = config.greedy_matching == "text"
    translated = TranslatedDrafter(drafter, pair, max_own_len=max_len, greedy_by_text=by_text)
    return _Drafter(translated, max_len, engine.close)
