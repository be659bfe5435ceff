"""The paged KV pool: for every layer, keys and values of `num_blocks` blocks of `block_size` tokens.

Owns: the tensors and how they are written and gathered. Must not know: sequences, which block belongs to whom (the
BlockManager does), models. A slot is block * block_size + offset. A layer's tensors are (num_blocks, block_size, heads,
dim), so that one block is one contiguous piece and a gather of blocks copies long runs.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterable
from typing import NamedTuple

import torch


class LayerShape(NamedTuple):
    """What one layer keeps for a token. Layers of one model may differ."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_values(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


def block_bytes(shapes: tuple[LayerShape, ...], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block, all layers together."""
    return sum(shape.num_values for shape in shapes) * block_size * dtype.itemsize


class KvPool:
    """Zeroed at the start: slots never written are gathered as padding and must be finite.

    Raises MemoryError, or on a GPU what torch raises, where there is no room.
    """

    def __init__(
        self,
        shapes: tuple[LayerShape, ...],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes = shapes
        self.num_blocks = num_blocks
        self.block_size = block_size
        layout = (num_blocks, block_size)
        self._keys = [_zeros((*layout, s.num_kv_heads, s.key_dim), dtype, device) for s in shapes]
        self._values = [_zeros((*layout, s.num_kv_heads, s.value_dim), dtype, device) for s in shapes]
        # The same memory as (blocks, values of a block), as (slots, heads, dim) and as (1, heads, slots, dim).
        self._key_blocks = [pool.flatten(1) for pool in self._keys]
        self._value_blocks = [pool.flatten(1) for pool in self._values]
        self._key_slots, self._value_slots = _slots_of(self._keys), _slots_of(self._values)
        self.places = [
            (key.data_ptr(), value.data_ptr(), shape.num_kv_heads, shape.key_dim)
            for key, value, shape in zip(self._keys, self._values, shapes, strict=True)
        ]
        """Of each layer: the addresses of its keys and values, their heads and the keys' size."""
        self._key_runs, self._value_runs = _runs_of(self._key_slots), _runs_of(self._value_slots)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values themselves, (num_blocks, block_size, heads, dim) each."""
        return self._keys[layer], self._values[layer]

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores (tokens, heads, dim) at `slots` (tokens,), whatever stood there before."""
        self._key_slots[layer].index_copy_(0, slots, keys)
        self._value_slots[layer].index_copy_(0, slots, values)

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `blocks` (batch, blocks each), as (batch, heads, blocks each * block_size, dim)."""
        keys = self._key_blocks[layer].index_select(0, blocks.flatten())
        values = self._value_blocks[layer].index_select(0, blocks.flatten())
        batch, shape = blocks.shape[0], self.shapes[layer]
        return (
            keys.view(batch, -1, shape.num_kv_heads, shape.key_dim).transpose(1, 2),
            values.view(batch, -1, shape.num_kv_heads, shape.value_dim).transpose(1, 2),
        )

    def run(self, layer: int, first_block: int, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `gather`, of one sequence whose blocks follow each other: the pool's own memory, no copy."""
        start, num_slots = first_block * self.block_size, num_blocks * self.block_size
        return self._key_runs[layer].narrow(2, start, num_slots), self._value_runs[layer].narrow(2, start, num_slots)

    def clear(self, blocks: Iterable[int]) -> None:
        """Zeroes whole blocks in all layers."""
        indices = torch.tensor(list(blocks), dtype=torch.int64, device=self._keys[0].device)
        for pool in (*self._keys, *self._values):
            pool.index_fill_(0, indices, 0.0)

    def is_finite(self, blocks: Iterable[int], first_layer: int = 0) -> bool:
        """Whether whole blocks hold nothing but numbers, in all layers from `first_layer` on; -1 is the last."""
        indices = torch.tensor(list(blocks), dtype=torch.int64, device=self._keys[0].device)
        pools = (*self._keys[first_layer:], *self._values[first_layer:])
        return all(_is_finite(pool.index_select(0, indices)) for pool in pools)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """In main memory, pages that the kernel zeroes when they are first written: writing all of a pool takes seconds."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"not enough memory: {error.strerror}") from error
    with contextlib.suppress(AttributeError, OSError):  # a system or kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _is_finite(values: torch.Tensor) -> bool:
    """A finite sum has finite terms, and is cheaper than a look at each; numbers may yet add up to infinity."""
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def _slots_of(pools: list[torch.Tensor]) -> list[torch.Tensor]:
    return [pool.flatten(0, 1) for pool in pools]


def _runs_of(pools: list[torch.Tensor]) -> list[torch.Tensor]:
    return [pool.transpose(0, 1).unsqueeze(0) for pool in pools]
