"""The engine's models: a forward over the paged pool, then verification (target) or sampling (draft) of its rows.

Owns: the composition, and loading it all from a model's name. Must not know: scheduling, sessions, the wire.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from services.common.errors import ConfigError, ModelUnsupported, OutriderError, WorkerFailed
from services.common.failure import Failure
from services.common.values import ModelInfo
from services.engine import digest, quantisation
from services.engine.chunk_check import chunk_errors
from services.engine.logits_check import nonfinite_errors, nonfinite_rows
from services.engine.models import load_config, torch_device, torch_dtype
from services.engine.prepare import display_name, resolve_model
from services.engine.progress import Reporter
from services.engine.runners import Runner
from services.engine.shard import Shard, ShardSpec, load_shard
from services.engine.step import DraftModel, Sampled, TargetModel, Verdict, Work
from services.engine.tensor_parallel import plan
from services.engine.tensor_parallel.leading_runner import LeadingRunner
from services.engine.tensor_parallel.message import pack
from services.engine.tensor_parallel.ranks import Ranks
from services.engine.trained_draft import read_manifest
from services.engine.transfer import to_device, to_host

log = logging.getLogger(__name__)

_MAX_HALF = 65504.0
"""The largest float16."""


class LogitsVerifier(Protocol):
    """services.engine.verifier.Verifier."""

    def verify(self, works: list[Work], logits: torch.Tensor) -> list[Verdict | OutriderError | None]: ...


class LogitsSampler(Protocol):
    """services.engine.sampler.Sampler."""

    def sample(self, works: list[Work], logits: torch.Tensor) -> list[Sampled | None]: ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What to load and where.

    The pool has `num_blocks`, or as many as `kv_memory_share` of the free memory holds, or `kv_memory_bytes`: the first
    that is not 0. With several ranks the pool's memory is each rank's, and so are the `num_threads` (0: as torch has
    them). The `max_` fields describe the largest step, which the workspace on CUDA is measured with.
    """

    model: str
    cache_dir: Path
    name: str = ""
    """Name to be listed under; empty derives it from `model`."""
    dtype: str = "float32"
    device: str = "cpu"
    num_blocks: int = 0
    kv_memory_bytes: int = 1 << 30
    kv_memory_share: float = 0.0
    block_size: int = 16
    num_threads: int = 0
    cuda_graph_rows: int = 512
    """On CUDA: the largest step that is replayed from a graph, in tokens; 0 records none. Shards record none."""
    compile: bool = False
    """Compile norms and MLPs."""
    num_ranks: int = 1
    draft_target: str = ""
    """For a trained draft, the target that it was trained for; empty: as its directory names it."""
    max_prefill_tokens: int = 512
    max_sequences: int = 1
    max_rows: int = 1


@dataclass(frozen=True, slots=True)
class PagedEngine:
    """A loaded, checked model over its pool, and what its worker must know of it."""

    runner: Runner
    info: ModelInfo
    eos_token_ids: frozenset[int]
    max_sequence_len: int
    """By the model's positions; the pool may hold less."""
    num_blocks: int
    block_size: int
    self_check_difference: float
    """Largest relative difference to the model's own attention at load."""
    ranks: Ranks | None = None
    """The processes of the other ranks, if there are any."""

    def clear(self) -> None:
        """Zeroes the whole pool, spare blocks included, on every rank."""
        if self.ranks is not None:
            self.ranks.send(pack([]))
        pool = self.runner.pool
        pool.clear(range(pool.num_blocks))

    def close(self) -> None:
        """Ends the other ranks. The engine is not to be used afterwards."""
        if self.ranks is not None:
            self.ranks.close()


def load_engine(options: EngineOptions, reporter: Reporter, failure: Failure | None = None) -> PagedEngine:
    """Resolves, loads and checks a model. Sets torch's thread count for the process where `num_threads` is given.

    With several ranks, starts the others, and reports a rank that ends later to `failure`. Raises ConfigError for a
    name, dtype, device or size that cannot be had, ModelUnsupported for a model that cannot be run exactly or not in so
    many shards, WorkerFailed where a rank ends while it loads.
    """
    _check_options(options)
    directory = resolve_model(options.model, options.cache_dir, reporter)
    target = _target_of(options, directory, reporter)
    spec = spec_of(options, directory, target)
    ranks = None
    if spec.size > 1:
        plan.check_model(load_config(directory), spec.size)
        ranks = Ranks(spec, failure or Failure())
    try:
        shard = load_shard(spec, reporter)
        reporter.note(shard.memory)
        return _engine_of(options, directory, target or directory, shard, ranks)
    except BaseException as error:
        if ranks is None:
            raise
        ranks.close()
        if isinstance(error, RuntimeError):
            raise WorkerFailed(f"the ranks could not load their shards: {error}") from error
        raise


def _check_options(options: EngineOptions) -> None:
    device = torch_device(options.device)
    if options.dtype == quantisation.INT8:
        quantisation.check_available()
        if options.num_ranks > 1:
            raise ConfigError("dtype: int8 weights cannot be cut into shards; use tensor_parallel_size 1")
    else:
        torch_dtype(options.dtype)
    if options.num_ranks > 1:
        plan.check_device(device, options.num_ranks)
        if options.compile:
            raise ConfigError("compile: shards are not compiled; use tensor_parallel_size 1")


def _target_of(options: EngineOptions, directory: Path, reporter: Reporter) -> Path | None:
    """Where the target lies that a trained draft borrows from; None for any other model."""
    manifest = read_manifest(load_config(directory))
    if manifest is None:
        return None
    if options.num_ranks > 1:
        raise ConfigError("tensor_parallel_size: a trained draft is not cut into shards; use 1")
    target = resolve_model(options.draft_target or manifest.target, options.cache_dir, reporter)
    if digest.directory_vocab_digest(target) != manifest.vocab_digest:
        raise ModelUnsupported(f"{directory.name} was trained for another vocabulary than that of {target.name}")
    return target


def spec_of(options: EngineOptions, directory: Path, target: Path | None = None) -> ShardSpec:
    """What rank 0 is told; the other ranks differ in their number alone."""
    return ShardSpec(
        directory=str(directory),
        dtype=options.dtype,
        device=options.device,
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        kv_memory_bytes=options.kv_memory_bytes,
        kv_memory_share=options.kv_memory_share,
        max_prefill_tokens=options.max_prefill_tokens,
        max_sequences=options.max_sequences,
        max_rows=options.max_rows,
        num_threads=options.num_threads,
        cuda_graph_rows=options.cuda_graph_rows,
        compile=options.compile,
        target_directory=str(target) if target else "",
        size=options.num_ranks,
    )


def _engine_of(
    options: EngineOptions, directory: Path, vocabulary: Path, shard: Shard, ranks: Ranks | None
) -> PagedEngine:
    model = shard.runner.model
    info = ModelInfo(
        name=options.name or display_name(options.model),
        digest=digest.model_digest(directory),
        vocab_digest=digest.directory_vocab_digest(vocabulary),
        vocab_size=model.vocab_size,
        dtype=options.dtype,
        device=options.device,
    )
    return PagedEngine(
        runner=shard.runner if ranks is None else LeadingRunner(shard.runner, ranks),
        info=info,
        eos_token_ids=model.eos_token_ids,
        max_sequence_len=model.max_sequence_len,
        num_blocks=shard.num_blocks,
        block_size=options.block_size,
        self_check_difference=shard.self_check_difference,
        ranks=ranks,
    )


class PagedTargetModel(TargetModel):
    """The target: verifies in the forward that computes the rows."""

    def __init__(self, engine: PagedEngine, verifier: LogitsVerifier) -> None:
        self._engine = engine
        self._verifier = verifier

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @torch.inference_mode()
    def step(self, works: list[Work]) -> list[Verdict | OutriderError | None]:
        """Raises the error of a sequence whose blocks cannot be cleared without others noticing."""
        logits = self._engine.runner.forward(works)
        verdicts = self._verifier.verify(works, logits)
        for index, error in chunk_errors(works, self._engine.runner.pool).items():
            verdicts[index] = error
        for work, verdict in zip(works, verdicts, strict=True):
            if isinstance(verdict, OutriderError):
                self._clear(work, verdict)
        return self._with_features(works, verdicts, len(logits))

    def _with_features(
        self, works: list[Work], verdicts: list[Verdict | OutriderError | None], num_rows: int
    ) -> list[Verdict | OutriderError | None]:
        """Adds the hidden states that tokens were chosen from, for the sequences that ask: row r gave token r."""
        tap = self._engine.runner.model.tap
        if tap is None or not any(work.num_rows and work.sequence.features for work in works):
            return verdicts
        starts = np.cumsum([0, *(work.num_rows for work in works)])
        asking = [
            (i, len(verdict.token_ids))
            for i, (work, verdict) in enumerate(zip(works, verdicts, strict=True))
            if isinstance(verdict, Verdict) and work.sequence.features
        ]
        taken = np.concatenate([np.zeros(0, np.int64), *(np.arange(starts[i], starts[i] + n) for i, n in asking)])
        rows = tap.rows(num_rows).index_select(0, to_device(taken, self._engine.runner.model.device))
        (host,) = to_host([rows.clamp(-_MAX_HALF, _MAX_HALF)])
        features = iter(np.split(host.astype("<f2"), np.cumsum([n for _, n in asking])[:-1]) if asking else [])
        told = dict(zip([i for i, _ in asking], features, strict=True))
        return [
            verdict._replace(features=told[i].tobytes()) if i in told and isinstance(verdict, Verdict) else verdict
            for i, verdict in enumerate(verdicts)
        ]

    def _clear(self, work: Work, error: OutriderError) -> None:
        """Zeroes what only this sequence wrote: masked slots of a block that is used again must hold numbers.

        Where the fault may lie in blocks that others read, or in the memory of other ranks, all sequences must end.
        """
        pool, sequence = self._engine.runner.pool, work.sequence
        shared = sequence.block_table[: sequence.num_shared_blocks]
        if self._engine.ranks is not None or not pool.is_finite(shared):
            self._engine.clear()
            raise error
        pool.clear(sequence.block_table[sequence.num_shared_blocks :])


class PagedDraftModel(DraftModel):
    """The draft: one sampled token for every work with a row."""

    def __init__(self, engine: PagedEngine, sampler: LogitsSampler) -> None:
        self._engine = engine
        self._sampler = sampler

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @torch.inference_mode()
    def step(self, works: list[Work]) -> list[Sampled | None]:
        logits = self._engine.runner.forward(works)
        sampled = self._sampler.sample(works, logits)
        clear_faults(self._engine, works, logits, sampled)
        return sampled


def clear_faults(engine: PagedEngine, works: list[Work], logits: torch.Tensor, sampled: list[Sampled | None]) -> None:
    """Zeroes what is not finite in the blocks of sequences whose logits or prefill chunks are not.

    Masked slots of a block that is used again must hold numbers; what else becomes of these sequences' cache, and of
    whose they share it with, costs acceptance alone. With several ranks all sequences must end: raises the error.
    """
    pool = engine.runner.pool
    errors = chunk_errors(works, pool)
    asking = [index for index, work in enumerate(works) if work.num_rows]
    rows = [row for row, index in enumerate(asking) if sampled[index] is None]
    if rows:
        (flags,) = to_host([nonfinite_rows(logits[to_device(np.array(rows), logits.device)])])
        found = nonfinite_errors([works[asking[row]] for row in rows], flags)
        errors |= {asking[rows[number]]: error for number, error in found.items()}
    for index, error in errors.items():
        if engine.ranks is not None:
            engine.clear()
            raise error
        log.warning("%s; its proposals will be poor or empty", error)
        pool.clear(block for block in works[index].sequence.block_table if not pool.is_finite([block]))
