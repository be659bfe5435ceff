"""From a worker's settings to a loaded engine.

Owns: which setting goes where. Must not know: draft and target, the wire.
"""

from __future__ import annotations

import torch

from services.common.config import cache_dir
from services.common.failure import Failure
from services.common.worker_config import WorkerConfig
from services.engine.mtp_draft import MtpDraftModel, MtpOptions, load_mtp
from services.engine.paged_model import EngineOptions, LogitsSampler, PagedEngine, load_engine
from services.engine.prepare import resolve_model, resolve_tokenizer
from services.engine.progress import Reporter
from services.engine.vocabulary import load_vocabulary
from services.engine.vocabulary_pair import VocabularyPair, match_vocabularies


def engine_of(config: WorkerConfig, failure: Failure, draft_target: str = "") -> PagedEngine:
    """Loads and checks the configured model; `failure` is told of a lost rank. Raises as load_engine does."""
    options = EngineOptions(
        model=config.model,
        cache_dir=cache_dir(),
        name=config.model_name,
        dtype=config.dtype,
        device=config.device,
        num_blocks=config.num_blocks,
        kv_memory_bytes=config.kv_memory_mb << 20,
        kv_memory_share=config.kv_memory_share,
        block_size=config.block_size,
        num_threads=config.num_threads,
        cuda_graph_rows=config.cuda_graph_rows,
        compile=config.compile,
        draft_target=draft_target,
        num_ranks=config.tensor_parallel_size,
        max_prefill_tokens=config.prefill_budget,
        max_sequences=config.max_sequences,
        max_rows=config.max_draft_tokens + 1,
    )
    return load_engine(options, Reporter(), failure)


def mtp_heads_of(config: WorkerConfig, draft_target: str, sampler: LogitsSampler) -> MtpDraftModel:
    """Loads the configured heads. Raises as load_mtp does."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    options = MtpOptions(
        config.model, cache_dir(), draft_target, name=config.model_name, dtype=config.dtype, device=config.device
    )
    return load_mtp(options, sampler, Reporter())


def vocabulary_pair_of(model: str, target_tokenizer: str, min_overlap: float) -> VocabularyPair | None:
    """How a draft's vocabulary matches that of the tokenizer named; None where none is named, or they are the same.

    Raises ConfigError for a name that cannot be had or too small an overlap, ModelUnsupported for a tokenizer whose
    tokens have no text of their own.
    """
    if not target_tokenizer:
        return None
    reporter = Reporter()
    draft = load_vocabulary(resolve_model(model, cache_dir(), reporter))
    target = load_vocabulary(resolve_tokenizer(target_tokenizer, cache_dir(), reporter))
    if draft.digest == target.digest:
        return None
    pair = match_vocabularies(draft, target, min_overlap)
    reporter.note(f"Vocabularies: {pair.summary}")
    return pair
