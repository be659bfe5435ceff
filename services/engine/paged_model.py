"""The engine's models: a forward over the paged pool, then verification (target) or sampling (draft) of its rows.

Owns: the composition, and loading it all from a model's name. Must not know: scheduling, sessions, the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from services.common.values import ModelInfo
from services.engine import digest
from services.engine.compiled import compile_blocks
from services.engine.kv_pool import num_blocks_within
from services.engine.models import load_model, torch_device, torch_dtype
from services.engine.prepare import display_name, resolve_model
from services.engine.progress import Reporter
from services.engine.runners import Runner, make_runner
from services.engine.self_check import self_check
from services.engine.step import DraftModel, Sampled, TargetModel, Verdict, Work


class LogitsVerifier(Protocol):
    """services.engine.verifier.Verifier."""

    def verify(self, works: list[Work], logits: torch.Tensor) -> list[Verdict | None]: ...


class LogitsSampler(Protocol):
    """services.engine.sampler.Sampler."""

    def sample(self, works: list[Work], logits: torch.Tensor) -> list[Sampled | None]: ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What to load and where. `num_blocks` 0: as many as `kv_memory_bytes` hold. `num_threads` 0: as torch has them."""

    model: str
    cache_dir: Path
    name: str = ""
    """Name to be listed under; empty derives it from `model`."""
    dtype: str = "float32"
    device: str = "cpu"
    num_blocks: int = 0
    kv_memory_bytes: int = 1 << 30
    block_size: int = 16
    num_threads: int = 0
    cuda_graph_rows: int = 512
    """On CUDA: the largest step that is replayed from a graph, in tokens; 0 records none."""
    compile: bool = False
    """Compile norms and MLPs."""


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


def load_engine(options: EngineOptions, reporter: Reporter) -> PagedEngine:
    """Resolves, loads and checks a model. Sets torch's thread count for the process where `num_threads` is given.

    Raises ConfigError for a name, dtype, device or size that cannot be had, ModelUnsupported for a model that cannot be
    run exactly.
    """
    dtype, device = torch_dtype(options.dtype), torch_device(options.device)
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    directory = resolve_model(options.model, options.cache_dir, reporter)
    model = load_model(directory, dtype, device, reporter)
    with reporter.task("Checking the paged attention against the model's own"):
        difference = self_check(model, options.block_size)
    if options.compile:
        compile_blocks(model.module)
    num_blocks = options.num_blocks or num_blocks_within(
        options.kv_memory_bytes, model.layer_shapes, options.block_size, dtype
    )
    runner = make_runner(model, num_blocks, options.block_size, options.cuda_graph_rows, reporter)
    info = ModelInfo(
        name=options.name or display_name(options.model),
        digest=digest.model_digest(directory),
        vocab_digest=digest.directory_vocab_digest(directory),
        vocab_size=model.vocab_size,
        dtype=options.dtype,
        device=options.device,
    )
    return PagedEngine(
        runner=runner,
        info=info,
        eos_token_ids=model.eos_token_ids,
        max_sequence_len=model.max_sequence_len,
        num_blocks=num_blocks,
        block_size=options.block_size,
        self_check_difference=difference,
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
    def step(self, works: list[Work]) -> list[Verdict | None]:
        return self._verifier.verify(works, self._engine.runner.forward(works))


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
        return self._sampler.sample(works, self._engine.runner.forward(works))
