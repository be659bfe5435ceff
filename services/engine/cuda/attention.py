"""Launches the kernels: which shapes a program takes, how many splits, and the two operators torch knows them by.

Owns: launch parameters, and `outrider::write_kv` and `outrider::attend_tiles`, custom operators with declared mutation,
so that neither compilation nor a graph can reorder or drop a write. Must not know: steps, models, sequences.
Importing this module needs triton; nothing else outside `kernels` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.cuda import kernels
from services.engine.cuda.tile_step import AttendArguments

MAX_SPLITS = 32
MIN_SPLIT_LEN = 128
"""Tokens: below this a split costs more to join than it wins."""

PROGRAMS_PER_MULTIPROCESSOR = 2
"""Programs wanted at once, so that loads of one overlap the products of another."""

_QUERY_BYTES = 32 << 10
_KEY_BYTES = 16 << 10
"""Shared memory that a program's queries, and one stage of its keys, may take."""

_INTERPRETED = bool(triton.knobs.runtime.interpret)
_DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class TileConfig(NamedTuple):
    """What one program of the attention takes."""

    fold_tile: int
    """Query heads of one key head."""
    m: int
    """Lines of its products: rows times heads, padded."""
    n: int
    """Keys of one step of its loop."""
    num_warps: int
    num_stages: int


def tile_config(tile_rows: int, fold: int, dim: int, itemsize: int) -> TileConfig:
    """For tiles of `tile_rows` rows, `fold` query heads a key head, and the larger of key and value dim, padded."""
    max_lines = max(tile_rows, _QUERY_BYTES // (dim * itemsize))
    fold_tile = min(triton.next_power_of_2(fold), max_lines // tile_rows)
    m = max(16, tile_rows * fold_tile)
    n = min(128, max(16, _KEY_BYTES // (dim * itemsize)))
    wide = m > 64 or (itemsize == 4 and dim >= 128)  # float32 is multiplied without tensor cores, from registers
    return TileConfig(fold_tile, m, n, num_warps=8 if wide else 4, num_stages=3 if m <= 32 else 2)


def choose_num_splits(num_programs: int, num_multiprocessors: int) -> int:
    """A power of two, at most MAX_SPLITS, by which `num_programs` programs fill the device."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // max(1, num_programs)
    return min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1))


@torch.library.custom_op("outrider::write_kv", mutates_args=("keys", "values"))
def write_kv(keys: Tensor, values: Tensor, slots: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    """Stores (tokens, heads, dim) at `slots` (tokens,) of one layer's pool (blocks, block size, heads, dim)."""
    new_keys, new_values = _with_unit_stride(new_keys), _with_unit_stride(new_values)
    num_heads, key_dim, value_dim = keys.shape[2], keys.shape[3], values.shape[3]
    kernels.write_kernel[(len(slots),)](
        keys,
        values,
        slots,
        new_keys,
        new_values,
        *new_keys.stride()[:2],
        *new_values.stride()[:2],
        NUM_HEADS=num_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        HEADS_PAD=triton.next_power_of_2(num_heads),
        KEY_PAD=_padded(key_dim),
        VALUE_PAD=_padded(value_dim),
    )


@write_kv.register_fake
def _(keys: Tensor, values: Tensor, slots: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    return None


@torch.library.custom_op("outrider::attend_tiles", mutates_args=())
def attend_tiles(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Sequence[Tensor],
    tables: Tensor,
    tile_rows: Sequence[int],
    num_splits: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Attention of (tokens, heads, dim) over one layer's pool, every token being in one tile; see TileStep.

    `window` and `softcap` 0: none. The pool's tensors are (blocks, block size, kv heads, dim), contiguous.
    """
    query = _with_unit_stride(query)
    num_tokens, num_heads, key_dim = query.shape
    block_size, num_kv_heads, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    fold, dim = num_heads // num_kv_heads, max(_padded(key_dim), _padded(value_dim))
    output = query.new_empty(num_tokens, num_heads, value_dim)
    parts = (num_tokens, num_heads, num_splits) if num_splits > 1 else (0, 0, 0)
    weights = query.new_empty(parts, dtype=torch.float32)
    partials = query.new_empty((*parts, value_dim), dtype=torch.float32)
    for part, rows in zip(tiles, tile_rows, strict=True):
        config = tile_config(rows, fold, dim, query.element_size())
        grid = (len(part), num_kv_heads * triton.cdiv(fold, config.fold_tile), num_splits)
        kernels.attend_kernel[grid](
            query,
            keys,
            values,
            part,
            tables,
            output,
            partials,
            weights,
            scale,
            softcap,
            *query.stride()[:2],
            num_splits,
            NUM_KV_HEADS=num_kv_heads,
            FOLD=fold,
            FOLD_TILE=config.fold_tile,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            KEY_PAD=_padded(key_dim),
            VALUE_PAD=_padded(value_dim),
            BLOCK_SIZE=block_size,
            M=config.m,
            N=config.n,
            MIN_SPLIT_LEN=MIN_SPLIT_LEN,
            WINDOW=window,
            HAS_SOFTCAP=softcap > 0,
            SPLIT=num_splits > 1,
            DOT=tl.float32 if _INTERPRETED else _DOT_TYPES[query.dtype],
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if num_splits > 1:
        kernels.join_kernel[(num_tokens, num_heads)](
            partials,
            weights,
            output,
            NUM_HEADS=num_heads,
            NUM_SPLITS=num_splits,
            VALUE_DIM=value_dim,
            VALUE_PAD=_padded(value_dim),
        )
    return output


@attend_tiles.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Sequence[Tensor],
    tables: Tensor,
    tile_rows: Sequence[int],
    num_splits: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[3])


class TritonKernels:
    """TileKernels by Triton, on a device of `num_multiprocessors`."""

    def __init__(self, num_multiprocessors: int) -> None:
        self._num_multiprocessors = num_multiprocessors

    def write(self, keys: Tensor, values: Tensor, slots: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        write_kv(keys, values, slots, new_keys, new_values)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, arguments: AttendArguments) -> Tensor:
        num_kv_heads, dim = keys.shape[2], max(_padded(keys.shape[3]), _padded(values.shape[3]))
        fold, num_programs = query.shape[1] // num_kv_heads, 0
        for group in arguments.shape.groups:
            # A graph has room for a tile a token; most of them are empty where tiles hold several rows.
            num_tiles = min(group.num_tiles, triton.cdiv(arguments.shape.num_tokens, group.tile_rows))
            config = tile_config(group.tile_rows, fold, dim, query.element_size())
            num_programs += num_tiles * num_kv_heads * triton.cdiv(fold, config.fold_tile)
        attended: Tensor = attend_tiles(
            query,
            keys,
            values,
            arguments.tiles,
            arguments.tables,
            [group.tile_rows for group in arguments.shape.groups],
            choose_num_splits(num_programs, self._num_multiprocessors),
            query.shape[2] ** -0.5 if arguments.scaling is None else arguments.scaling,
            arguments.window or 0,
            arguments.softcap or 0.0,
        )
        return attended


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
