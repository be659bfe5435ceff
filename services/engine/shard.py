"""One rank's part of an engine: a checked model, or its shard, over a KV pool that fits beside it.

Owns: the order of loading, checking and sizing, which every rank goes through alike. Must not know: names of models,
how ranks are started, verification and sampling.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from services.engine import quantisation
from services.engine.compiled import compile_blocks
from services.engine.cuda.graphs import padded_num_tokens
from services.engine.feature_tap import FeatureTap
from services.engine.kv_pool import block_bytes
from services.engine.memory import MIB, PoolBudget, PoolSize, does_not_fit, free_memory, module_bytes, size_pool
from services.engine.models import CausalModel, load_model, torch_dtype
from services.engine.packing import pack
from services.engine.progress import Reporter
from services.engine.runners import Runner, make_runner
from services.engine.self_check import reference_of, self_check
from services.engine.tensor_parallel import group
from services.engine.workspace import StepLimits, measure_workspace


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """All that a rank must be told; strings and numbers only."""

    directory: str
    dtype: str
    device: str
    """`cpu`, `cuda` or `cuda:N`; of several ranks on CUDA, each takes the device of its own number."""
    block_size: int
    num_blocks: int
    kv_memory_bytes: int
    kv_memory_share: float
    max_prefill_tokens: int
    max_sequences: int
    max_rows: int
    num_threads: int
    cuda_graph_rows: int
    compile: bool
    target_directory: str = ""
    """Of the target whose embedding a trained draft borrows."""
    rank: int = 0
    size: int = 1

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> ShardSpec:
        return cls(**json.loads(data))

    @property
    def rank_device(self) -> torch.device:
        return torch.device("cuda", self.rank) if self.size > 1 and self.device == "cuda" else torch.device(self.device)

    @property
    def max_graph_tokens(self) -> int:
        """Collective calls stay out of graphs."""
        return self.cuda_graph_rows if self.size == 1 else 0

    @property
    def packs(self) -> bool:
        """Sharded weights are no plain tensors, and compiled modules see no packed ones."""
        return self.size == 1 and not self.compile

    @property
    def budget(self) -> PoolBudget:
        return PoolBudget(self.num_blocks, self.kv_memory_share, self.kv_memory_bytes)

    @property
    def step_limits(self) -> StepLimits:
        return StepLimits(self.max_prefill_tokens, self.max_sequences, self.max_rows)


class Shard(NamedTuple):
    """A part that is ready to compute steps."""

    runner: Runner
    num_blocks: int
    self_check_difference: float
    """Largest relative difference to the model's own attention."""
    memory: str
    """What it takes of the device's memory, in one line."""


def load_shard(spec: ShardSpec, reporter: Reporter) -> Shard:
    """Loads one rank's part. With several ranks all call it, and the process group exists.

    Raises ConfigError for a pool that does not fit, ModelUnsupported for a model that cannot be run exactly.
    """
    device = spec.rank_device
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    quantised = spec.dtype == quantisation.INT8
    dtype = quantisation.COMPUTE_DTYPE if quantised else torch_dtype(spec.dtype)
    target = Path(spec.target_directory) if spec.target_directory else None
    model = load_model(
        Path(spec.directory), dtype, device, reporter, num_ranks=spec.size, quantised=quantised, target=target
    )
    with reporter.task("Asking the model's own attention"):
        reference = reference_of(model)
    if spec.packs and not quantised:
        with reporter.task("Packing the weights"):
            model = pack(model)
    with reporter.task("Checking the paged attention against the model's own"):
        difference = self_check(model, spec.block_size, reference)
    if spec.compile:
        compile_blocks(model.module)
    if spec.size == 1 and model.keeps_logits and model.module.get_output_embeddings() is not None:
        num_buffered = padded_num_tokens(spec.max_graph_tokens) if device.type == "cuda" else 0
        model = replace(model, tap=FeatureTap(model.module, num_buffered))
    size = _size_pool(model, spec)
    num_blocks = size.num_blocks if spec.size == 1 else group.least(size.num_blocks, device)
    try:
        runner = make_runner(model, num_blocks, spec.block_size, spec.max_graph_tokens, reporter)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        raise does_not_fit(spec.budget, size.num_bytes, device, str(error).splitlines()[0]) from error
    return Shard(runner, num_blocks, difference, _describe(model, spec, num_blocks, size))


def _size_pool(model: CausalModel, spec: ShardSpec) -> PoolSize:
    device = model.device
    one = block_bytes(model.layer_shapes, spec.block_size, model.dtype)
    if device.type == "cuda":
        workspace = measure_workspace(model, spec.step_limits, spec.block_size)
        if spec.max_graph_tokens:  # graphs hold a workspace of their own
            workspace *= 2
        return size_pool(spec.budget, one, len(model.layer_shapes), free_memory(device) - workspace, device)
    # Ranks on CPU share the memory of one machine.
    return size_pool(spec.budget, one, len(model.layer_shapes), free_memory(device) // spec.size, device)


def _describe(model: CausalModel, spec: ShardSpec, num_blocks: int, size: PoolSize) -> str:
    pool_bytes = num_blocks * block_bytes(model.layer_shapes, spec.block_size, model.dtype)
    where = str(model.device) if spec.size == 1 else f"{model.device}, rank {spec.rank} of {spec.size}"
    return (
        f"Memory on {where}: weights {module_bytes(model.module) / MIB:.1f} MiB, KV pool {pool_bytes / MIB:.1f} of "
        f"{size.free_bytes / MIB:.0f} MiB free ({spec.budget.setting}), {num_blocks} blocks, "
        f"{num_blocks * spec.block_size} tokens"
    )
