"""The attention of one step in tiles: what a model's layers call on a CUDA device.

Owns: which tensors a layer's kernels get. Must not know: how tiles came about, what the kernels are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from services.engine.cuda.tiles import StepShape, StepTensors
from services.engine.kv_pool import KvPool
from services.engine.paged_attention import AttentionStep, LayerCall


@dataclass(frozen=True, slots=True)
class AttendArguments:
    """What attention needs besides queries and the pool. See services.engine.cuda.tiles."""

    shape: StepShape
    tiles: tuple[Tensor, ...]
    tables: Tensor
    scaling: float | None
    window: int | None
    softcap: float | None


class TileKernels(Protocol):
    """The device's part. A layer's pool is two tensors (blocks, block size, kv heads, dim).

    Neither call waits for the device or depends on the contents of a tensor on the host, so that both can be recorded.
    """

    def write(self, keys: Tensor, values: Tensor, slots: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """Stores (tokens, kv heads, dim) at `slots` (tokens,)."""
        ...

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, arguments: AttendArguments) -> Tensor:
        """(tokens, heads, dim) to (tokens, heads, value dim): causal over each row's own sequence."""
        ...


class TileStep(AttentionStep):
    """The attention of one step of the shape given."""

    def __init__(self, pool: KvPool, kernels: TileKernels, tensors: StepTensors, shape: StepShape) -> None:
        self._pool = pool
        self._kernels = kernels
        self._tensors = tensors
        self._shape = shape

    def attend(self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self._pool.layer(call.layer)
        self._kernels.write(keys, values, self._tensors.slots, key, value)
        arguments = AttendArguments(
            self._shape, self._tensors.tiles, self._tensors.tables, call.scaling, call.window, call.softcap
        )
        return self._kernels.attend(query, keys, values, arguments)
