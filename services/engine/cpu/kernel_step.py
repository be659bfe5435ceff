"""The attention of a step on a CPU: one kernel a layer for rows, torch's products for what is longer.

Owns: which works the kernel attends for, and the indices that it reads. Must not know: models, the scheduler,
arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from services.engine.kv_pool import KvPool
from services.engine.paged_attention import LayerCall, PagedStep, Rotation
from services.engine.step import Work
from services.engine.step_layout import StepLayout, build_layout

if TYPE_CHECKING:
    from services.engine.cpu.kernels import Kernels

# What torch's attention of a layer costs, in what the kernel takes for one position and as many query heads of each key
# head as there are lanes (bench/engine). The kernel computes slower, but needs no calls, gathers and pads nothing.
_GROUP = 1000
"""The calls for works of like size."""
_POSITION = 0.75
"""A position that is gathered."""
_QUERY = 0.034
"""A query head of a key head that sees a position."""
_BOTH = 200
"""What is to be joined where the kernel attends for some works and torch for others."""
_MIN_SHARED_PAIRS = 64
"""Of rows and what they see: fewer are done before other threads would have begun."""


def num_for_kernel(works: list[Work], fold: int, lanes: int) -> int:
    """For how many works, from the first on, the kernel had better attend, and torch for the others.

    `fold` query heads share a key head; the kernel computes `lanes` of them at once.
    """
    sizes = [work.num_computed_tokens for work in works]
    seen = [work.sequence.num_cached + size for work, size in zip(works, sizes, strict=True)]
    by_kernel = [context * -(-size * fold // lanes) for size, context in zip(sizes, seen, strict=True)]
    best, kernel, torchs, kinds = len(works), sum(by_kernel), 0.0, set[int]()
    least = float(kernel)
    for n in range(len(works) - 1, -1, -1):
        if sizes[n] not in kinds:
            kinds.add(sizes[n])
            torchs += _GROUP
        torchs += seen[n] * (_POSITION + _QUERY * sizes[n] * fold)
        kernel -= by_kernel[n]
        cost = kernel + torchs + (_BOTH if n else 0)
        if cost < least:
            best, least = n, cost
    return best


def takes(pool: KvPool) -> bool:
    """Whether the kernel takes such heads."""
    return all(shape.key_dim == shape.value_dim for shape in pool.shapes)


class KernelStep(PagedStep):
    """As PagedStep; the kernel attends for the first `num_works` works, at least one. `layout` needs no groups."""

    def __init__(self, kernels: Kernels, pool: KvPool, layout: StepLayout, works: list[Work], num_works: int) -> None:
        super().__init__(pool, layout)
        self._kernel = kernels.attend
        self._rest: PagedStep | None = None
        if num_works < len(works):
            rest = build_layout(works[num_works:], pool.block_size, layout.token_ids.device)
            self._rest = PagedStep(pool, rest)
        works = works[:num_works]
        lens = [work.num_computed_tokens for work in works]
        counts = [-(-(work.sequence.num_cached + n) // pool.block_size) for work, n in zip(works, lens, strict=True)]
        self._tables = np.zeros((len(works), max(counts)), dtype=np.int64)
        for row, work, count in zip(self._tables, works, counts, strict=True):
            row[:count] = work.sequence.block_table[:count]
        self._starts = np.cumsum([0, *lens])
        self._num_tokens = sum(lens)
        num_pairs = sum(n * (work.sequence.num_cached + n) for work, n in zip(works, lens, strict=True))
        self._is_shared = num_pairs >= _MIN_SHARED_PAIRS
        self._indices = (
            layout.slots.data_ptr(),
            layout.positions.data_ptr(),
            self._starts.ctypes.data,
            self._tables.ctypes.data,
            self._num_tokens,
            len(works),
            self._tables.shape[1],
            pool.block_size,
        )
        self._rotation: Rotation | None = None
        self._turn = 0, 0
        self._rest_rotation: Rotation | None = None

    def rotation(self, embeddings: tuple[torch.Tensor, torch.Tensor]) -> Rotation:
        cos, signed_sin = super().rotation(embeddings)
        return Rotation(cos.contiguous(), signed_sin.contiguous())

    def attend(self, call: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.attend_heads(call, torch.cat((query, key, value), 1), query.shape[1], None)

    def attend_heads(
        self, call: LayerCall, heads: torch.Tensor, num_heads: int, rotation: Rotation | None
    ) -> torch.Tensor:
        out = heads.new_empty(heads.shape[0], num_heads, heads.shape[2])
        if rotation is not self._rotation:
            self._set_rotation(rotation)
        self._kernel(
            torch.get_num_threads() if self._is_shared else 1,
            heads.data_ptr(),
            out.data_ptr(),
            *self._turn,
            *self._indices,
            *self._pool.places[call.layer],
            num_heads,
            call.window or 0,
            heads.shape[2] ** -0.5 if call.scaling is None else call.scaling,
            call.softcap or 0.0,
        )
        if self._rest is not None:
            rest = heads[self._num_tokens :]
            out[self._num_tokens :] = self._rest.attend_heads(call, rest, num_heads, self._rest_rotation)
        return out

    def _set_rotation(self, rotation: Rotation | None) -> None:
        self._rotation = rotation
        self._turn = (rotation.cos.data_ptr(), rotation.signed_sin.data_ptr()) if rotation else (0, 0)
        self._rest_rotation = Rotation(*(table[self._num_tokens :] for table in rotation)) if rotation else None
