"""The attention of a short step on a CPU: one kernel a layer, from the product of all three projections to its output.

Owns: which steps are short, and the indices that the kernel reads. Must not know: models, the scheduler, arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from services.engine.kv_pool import KvPool
from services.engine.paged_attention import LayerCall, PagedStep, Rotation
from services.engine.step import Work
from services.engine.step_layout import StepLayout

if TYPE_CHECKING:
    from services.engine.cpu.kernels import Kernels

MAX_PAIRS = 1200
"""Torch's attention is the faster of the two from about here on (bench/engine)."""
MIN_SHARED_PAIRS = 64
"""Fewer are done before other threads would have begun."""


def count_pairs(works: list[Work]) -> int:
    """Query rows times tokens that they see, about."""
    return sum(work.num_computed_tokens * (work.sequence.num_cached + work.num_computed_tokens) for work in works)


def is_small(works: list[Work]) -> bool:
    """Whether the kernel is the better choice for a step."""
    return count_pairs(works) <= MAX_PAIRS


def takes(pool: KvPool) -> bool:
    """Whether the kernel takes such heads."""
    return all(shape.key_dim == shape.value_dim for shape in pool.shapes)


class SmallStep(PagedStep):
    """As PagedStep, for a step whose layout needs no groups."""

    def __init__(self, kernels: Kernels, pool: KvPool, layout: StepLayout, works: list[Work]) -> None:
        super().__init__(pool, layout)
        self._kernel = kernels.attend
        counts = [-(-(work.sequence.num_cached + work.num_computed_tokens) // pool.block_size) for work in works]
        self._tables = np.zeros((len(works), max(counts)), dtype=np.int64)
        for row, work, count in zip(self._tables, works, counts, strict=True):
            row[:count] = work.sequence.block_table[:count]
        self._sequences = np.repeat(np.arange(len(works)), [work.num_computed_tokens for work in works])
        self._indices = (
            layout.slots.data_ptr(),
            layout.positions.data_ptr(),
            self._sequences.ctypes.data,
            self._tables.ctypes.data,
            len(self._sequences),
            self._tables.shape[1],
            pool.block_size,
        )
        self._num_parts = torch.get_num_threads() if count_pairs(works) >= MIN_SHARED_PAIRS else 1
        self._turn: tuple[Rotation | None, int, int] = None, 0, 0

    def rotation(self, embeddings: tuple[torch.Tensor, torch.Tensor]) -> Rotation:
        cos, signed_sin = super().rotation(embeddings)
        return Rotation(cos.contiguous(), signed_sin.contiguous())

    def attend(self, call: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.attend_heads(call, torch.cat((query, key, value), 1), query.shape[1], None)

    def attend_heads(
        self, call: LayerCall, heads: torch.Tensor, num_heads: int, rotation: Rotation | None
    ) -> torch.Tensor:
        num_tokens, _, dim = heads.shape
        out = heads.new_empty(num_tokens, num_heads, dim)
        if rotation is not self._turn[0]:
            self._turn = _turn_of(rotation)
        self._kernel(
            self._num_parts,
            heads.data_ptr(),
            out.data_ptr(),
            *self._turn[1:],
            *self._indices,
            *self._pool.places[call.layer],
            num_heads,
            call.window or 0,
            dim**-0.5 if call.scaling is None else call.scaling,
            call.softcap or 0.0,
        )
        return out


def _turn_of(rotation: Rotation | None) -> tuple[Rotation | None, int, int]:
    """A rotation and the addresses of its tables."""
    if rotation is None:
        return None, 0, 0
    return rotation, rotation.cos.data_ptr(), rotation.signed_sin.data_ptr()
