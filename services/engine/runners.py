"""Chooses, once, what computes a model's steps on its device.

Owns: that choice and what a device must have for it. Must not know: steps.

    cpu     ModelRunner: gathers the step's blocks, then torch's own attention
    cuda    cuda.runner.TileRunner: kernels that read blocks in place, and CUDA graphs
"""

from __future__ import annotations

from typing import Protocol

import torch

from services.common.errors import ConfigError, ModelUnsupported
from services.engine.kv_pool import KvPool, LayerShape
from services.engine.model_runner import ModelRunner
from services.engine.models import CausalModel
from services.engine.progress import Reporter
from services.engine.step import Work

MAX_HEAD_DIM = 256


class Runner(Protocol):
    """One forward a step, whatever the number of sequences. Called by one thread."""

    @property
    def model(self) -> CausalModel: ...

    @property
    def pool(self) -> KvPool: ...

    def forward(self, works: list[Work]) -> torch.Tensor:
        """Writes keys and values of all computed tokens; float32 logits (sum of num_rows, vocab_size), in order.

        The logits are valid until the next call.
        """
        ...


def make_runner(
    model: CausalModel, num_blocks: int, block_size: int, max_graph_tokens: int = 0, reporter: Reporter | None = None
) -> Runner:
    """The runner for the model's device. On CUDA short steps of up to `max_graph_tokens` tokens come from graphs.

    With a `reporter` these are recorded now, so that no later step waits or finds no memory for it; else at first use.
    Raises ConfigError where the device's path lacks something, ModelUnsupported for heads that it does not take.
    """
    if model.device.type != "cuda":
        return ModelRunner(model, num_blocks, block_size)
    check_tiles(model.layer_shapes, block_size)
    try:
        from services.engine.cuda.attention import TritonKernels
    except ModuleNotFoundError as error:
        raise ConfigError(f"device: cuda needs Triton, which PyTorch's CUDA build brings along ({error})") from error
    from services.engine.cuda.graphs import CudaGraphs
    from services.engine.cuda.runner import TileRunner

    kernels = TritonKernels(torch.cuda.get_device_properties(model.device).multi_processor_count)
    runner = TileRunner(model, num_blocks, block_size, kernels, CudaGraphs(model.device), max_graph_tokens)
    if reporter is not None:
        runner.capture_graphs(reporter)
    return runner


def check_tiles(shapes: tuple[LayerShape, ...], block_size: int) -> None:
    """Raises ConfigError for a block size, ModelUnsupported for a head that the kernels do not take."""
    if block_size & (block_size - 1):
        raise ConfigError(f"block_size: {block_size} is not a power of two, which device cuda needs")
    if (largest := max(max(shape.key_dim, shape.value_dim) for shape in shapes)) > MAX_HEAD_DIM:
        raise ModelUnsupported(f"its heads have {largest} dimensions; on device cuda at most {MAX_HEAD_DIM} are taken")
