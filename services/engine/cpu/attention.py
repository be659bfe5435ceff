"""The attention of a step's rows on a CPU, over the blocks where they lie.

Owns: the arithmetic of it, and how threads share it. Must not know: torch, models, steps. Addresses and sizes are
integers, arrays contiguous; nothing here checks them.

The paging is that of Kwon et al. 2023 (PagedAttention), the pass over the keys that of Dao et al. 2022
(FlashAttention): a few at a time, under a running maximum. The rows of a sequence and the query heads of a key head
stand side by side in the lanes of vectors, so that a key is read and converted once for all of them, and neither
products nor maxima are ever summed across lanes:

    scores (keys, lanes)  = keys (keys, dim) @ queries (dim, lanes)
    mixed  (dim, lanes)  += values (keys, dim)^T @ weights (keys, lanes)

Its threads are torch's own (services.engine.cpu.team): others would have to share the cores with those that wait for
torch's next product. A unit is a key head of a sequence, with as many of its queries as there are lanes. What it sees
is cut into chunks at fixed positions; each thread takes its share of all chunks, and those of a unit are joined by
their maxima and sums, in their order (Dao et al. 2023, Flash-Decoding). So what comes out for a row depends on nothing
but the row and what it sees: not on the number of threads, the rows beside it, or other sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from services.engine.cpu.arithmetic import (
    DIMS_AT_ONCE,
    KEYS_AT_ONCE,
    LANES,
    SUMS,
    add_rows,
    add_values,
    exp,
    exponentiate,
    find_maxima,
    get,
    multiply_keys,
    pointer,
    prefetch,
    put,
    scale_rows,
)
from services.engine.cpu.team import Team

_TILE = 32
"""Keys that are taken at a time: with their values, scores and queries they fit into the nearest cache."""
_CHUNK = 256
"""Positions that one thread attends to, in one go."""
_LOWEST = np.float32(-3e38)

_CALL = np.dtype(
    [
        *((name, np.int64) for name in ("thread_num", "num_threads", "num_parts")),
        *((name, np.int64) for name in ("heads", "out", "cos", "signed_sin", "positions", "starts", "tables")),
        *((name, np.int64) for name in ("num_tokens", "num_sequences", "num_blocks", "block_size")),
        *((name, np.int64) for name in ("keys", "values", "num_kv_heads", "dim", "num_heads", "window")),
        *((name, np.int64) for name in ("maxima", "sums", "mixed", "num_rows")),
        *((name, np.float32) for name in ("scale", "softcap")),
    ]
)
"""What the threads get to know."""


@intrinsic
def _fork(context, fork, worker, data, num_threads):
    """Calls `worker` with `data` in so many threads, of which the caller's is one, and waits for them."""

    def generate(context, builder, signature, arguments):
        place, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place, place, word, word])
        fork, worker, data, num_threads = arguments
        builder.call(
            builder.inttoptr(fork, kind.as_pointer()),
            [
                builder.inttoptr(worker, place),
                builder.inttoptr(data, place),
                builder.trunc(num_threads, word),
                ir.Constant(word, 0),
            ],
        )
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def _ask(context, function):
    """What a function without arguments returns."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return types.int32(types.intp), generate


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def _turn(head, cos, signed_sin, scale, out):
    """Rotates (Su et al. 2021, RoFormer) and scales; without a rotation `cos` is empty."""
    dim = len(head)
    half = dim // 2
    if len(cos) == 0:
        for i in range(dim):
            put(out, i, get(head, i) * scale)
        return
    for i in range(half):
        turned = get(head, i) * get(cos, i) + get(head, i + half) * get(signed_sin, i)
        put(out, i, turned * scale)
    for i in range(half, dim):
        turned = get(head, i) * get(cos, i) + get(head, i - half) * get(signed_sin, i)
        put(out, i, turned * scale)


@njit(nogil=True, error_model="numpy")
def _store(heads, num_heads, cos, signed_sin, slots, keys, values):
    num_kv_heads, dim = keys.shape[1:]
    for t in range(len(slots)):
        for head in range(num_kv_heads):
            _turn(heads[t, num_heads + head], cos[t], signed_sin[t], np.float32(1.0), keys[slots[t], head])
            value = heads[t, num_heads + num_kv_heads + head]
            for i in range(dim):
                values[slots[t], head, i] = value[i]


@njit(nogil=True, error_model="numpy")
def _extent(positions, starts, s, fold, window):
    """Of sequence s: the first chunk that its rows see, the end of the last, and its units a key head."""
    first = max(0, positions[starts[s]] + 1 - window) if window else 0
    num_queries = (starts[s + 1] - starts[s]) * fold
    return first // _CHUNK, positions[starts[s + 1] - 1] + 1, (num_queries + LANES - 1) // LANES


@njit(nogil=True, error_model="numpy")
def _totals(positions, starts, num_kv_heads, fold, window):
    """Of a step: the chunks of all units, and their positions."""
    num_chunks = num_positions = 0
    for s in range(len(starts) - 1):
        first, end, num_groups = _extent(positions, starts, s, fold, window)
        num_chunks += ((end + _CHUNK - 1) // _CHUNK - first) * num_groups * num_kv_heads
        num_positions += (end - first * _CHUNK) * num_groups * num_kv_heads
    return num_chunks, num_positions


@njit(nogil=True, error_model="numpy")
def _attend_part(
    part,
    num_parts,
    heads,
    cos,
    signed_sin,
    positions,
    starts,
    tables,
    block_size,
    keys,
    values,
    num_heads,
    maxima,
    sums,
    mixed,
    scale,
    softcap,
    window,
):
    """The chunks that begin in one of as many equal parts of all their positions; what is found of a chunk comes into
    its row of `maxima`, `sums` and `mixed`."""
    num_kv_heads, dim = keys.shape[1:]
    fold, row, offset = num_heads // num_kv_heads, 0, 0
    _, total = _totals(positions, starts, num_kv_heads, fold, window)
    start, stop = total * part // num_parts, total * (part + 1) // num_parts
    queries, turned, lasts = np.zeros((dim, LANES), np.float32), np.empty(dim, np.float32), np.zeros(LANES, np.int64)
    scores, tile = np.empty((_TILE, LANES), np.float32), np.zeros((_TILE, mixed.shape[1]), np.float32)
    for s in range(len(starts) - 1):
        first_chunk, end, num_groups = _extent(positions, starts, s, fold, window)
        for head in range(num_kv_heads):
            for group in range(num_groups):
                num_lanes = 0
                for first in range(first_chunk * _CHUNK, end, _CHUNK):
                    chunk_end = min(first + _CHUNK, end)
                    if start <= offset < stop:
                        if not num_lanes:
                            begin = group * LANES
                            for n in range(begin, min(begin + LANES, (starts[s + 1] - starts[s]) * fold)):
                                t = starts[s] + n // fold
                                _turn(heads[t, head * fold + n % fold], cos[t], signed_sin[t], scale, turned)
                                for i in range(dim):
                                    queries[i, n - begin] = turned[i]
                                lasts[n - begin] = positions[t]
                                num_lanes += 1
                        _attend_chunk(
                            queries,
                            lasts,
                            num_lanes,
                            tables[s],
                            block_size,
                            keys,
                            values,
                            head,
                            first,
                            chunk_end,
                            maxima[row],
                            sums[row],
                            mixed[row],
                            scores,
                            tile,
                            softcap,
                            window,
                        )
                    offset += chunk_end - first
                    row += 1


@njit(nogil=True, error_model="numpy")
def _attend_chunk(
    queries,
    lasts,
    num_lanes,
    table,
    block_size,
    keys,
    values,
    head,
    first,
    end,
    maxima,
    sums,
    mixed,
    scores,
    tile,
    softcap,
    window,
):
    """Of the positions from `first` to `end`; `lasts` are the positions of the lanes' own tokens."""
    dim, width, before = queries.shape[0], tile.shape[1], np.empty(LANES, np.float32)
    maxima[:], sums[:], mixed[:] = _LOWEST, np.float32(0.0), np.float32(0.0)
    for begin in range(first, end, _TILE):
        stop = min(begin + _TILE, end)
        num_keys = stop - begin
        _prefetch(values, head, table, block_size, begin, stop)
        _convert(keys, head, table, block_size, begin, stop, tile)
        for k in range(0, num_keys, KEYS_AT_ONCE):
            multiply_keys(
                tile.ctypes.data + 4 * k * width, width, queries.ctypes.data, scores.ctypes.data + 4 * k * LANES, dim
            )
        if softcap:
            _soft_cap(scores, num_keys, softcap)
        # The lanes' tokens follow each other: the first sees the fewest, the last has the latest window.
        is_masked = begin + num_keys - 1 > lasts[0] or (window and begin <= lasts[num_lanes - 1] - window)
        if is_masked:
            _mask(scores, begin, num_keys, lasts, num_lanes, window, _LOWEST)
        _weigh(scores, num_keys, maxima, sums, mixed, before)
        if is_masked:
            _unweigh(scores, begin, num_keys, lasts, num_lanes, window, sums)
        _prefetch(keys, head, table, block_size, stop, min(stop + _TILE, end))
        _convert(values, head, table, block_size, begin, stop, tile)
        for i in range(0, dim, DIMS_AT_ONCE):
            add_values(tile.ctypes.data + 4 * i, width, scores.ctypes.data, mixed.ctypes.data + 4 * i * LANES, num_keys)


@njit(nogil=True, error_model="numpy")
def _convert(stored, head, table, block_size, begin, end, tile):
    """tile[j] = what is stored at position begin + j, up to `end`."""
    block, offset = begin // block_size, begin % block_size
    for j in range(end - begin):
        source = stored[table[block] * block_size + offset, head]
        for i in range(stored.shape[2]):
            tile[j, i] = get(source, i)
        offset += 1
        if offset == block_size:
            block, offset = block + 1, 0


@njit(nogil=True, error_model="numpy")
def _prefetch(stored, head, table, block_size, begin, end):
    """What is read next: the processor does not guess it, as the heads of a position lie side by side."""
    line = 64 // stored.itemsize
    block, offset = begin // block_size, begin % block_size
    for _ in range(begin, end):
        source = stored[table[block] * block_size + offset, head]
        for i in range(0, stored.shape[2], line):
            prefetch(source[i:].ctypes.data)
        offset += 1
        if offset == block_size:
            block, offset = block + 1, 0


@njit(nogil=True, error_model="numpy")
def _soft_cap(scores, num_keys, softcap):
    for j in range(num_keys):
        for lane in range(LANES):
            scores[j, lane] = softcap * np.float32(math.tanh(scores[j, lane] / softcap))


@njit(nogil=True, error_model="numpy")
def _sees(last, position, window):
    return position <= last and (not window or position > last - window)


@njit(nogil=True, error_model="numpy")
def _mask(scores, begin, num_keys, lasts, num_lanes, window, score):
    for j in range(num_keys):
        for lane in range(num_lanes):
            if not _sees(lasts[lane], begin + j, window):
                scores[j, lane] = score


@njit(nogil=True, error_model="numpy")
def _weigh(scores, num_keys, maxima, sums, mixed, before):
    """Scores become weights under the new maxima; what was summed up under the old ones is scaled."""
    for lane in range(LANES):
        before[lane] = maxima[lane]
    find_maxima(scores.ctypes.data, maxima.ctypes.data, num_keys)
    is_higher = False
    for lane in range(LANES):
        is_higher |= maxima[lane] > before[lane]
    if is_higher:
        for lane in range(LANES):
            before[lane] = exp(before[lane] - maxima[lane])
        scale_rows(sums.ctypes.data, before.ctypes.data, 1)
        scale_rows(mixed.ctypes.data, before.ctypes.data, mixed.shape[0])
    exponentiate(scores.ctypes.data, maxima.ctypes.data, sums.ctypes.data, num_keys)


@njit(nogil=True, error_model="numpy")
def _unweigh(weights, begin, num_keys, lasts, num_lanes, window, sums):
    """Takes out the weights of what a lane does not see."""
    for j in range(num_keys):
        for lane in range(num_lanes):
            if not _sees(lasts[lane], begin + j, window):
                sums[lane] -= weights[j, lane]
                weights[j, lane] = np.float32(0.0)


@njit(nogil=True, error_model="numpy")
def _join(positions, starts, num_kv_heads, window, maxima, sums, mixed, out):
    """Adds up each unit's chunks, one after the other."""
    fold, row, factors = out.shape[1] // num_kv_heads, 0, np.empty((2, LANES), np.float32)
    for s in range(len(starts) - 1):
        first_chunk, end, num_groups = _extent(positions, starts, s, fold, window)
        num_chunks = (end + _CHUNK - 1) // _CHUNK - first_chunk
        for head in range(num_kv_heads):
            for group in range(num_groups):
                for chunk in range(1, num_chunks):
                    _add(row + chunk, row, maxima, sums, mixed, factors)
                begin = group * LANES
                for n in range(begin, min(begin + LANES, (starts[s + 1] - starts[s]) * fold)):
                    target, lane = out[starts[s] + n // fold, head * fold + n % fold], n - begin
                    share = np.float32(1.0) / sums[row, lane]
                    for i in range(out.shape[2]):
                        put(target, i, mixed[row, i, lane] * share)
                row += num_chunks


@njit(nogil=True, error_model="numpy")
def _add(other, row, maxima, sums, mixed, factors):
    for lane in range(LANES):
        highest = maxima[other, lane] if maxima[other, lane] > maxima[row, lane] else maxima[row, lane]
        factors[0, lane], factors[1, lane] = exp(maxima[row, lane] - highest), exp(maxima[other, lane] - highest)
        maxima[row, lane] = highest
    one, another = factors[0].ctypes.data, factors[1].ctypes.data
    add_rows(sums[row].ctypes.data, one, sums[other].ctypes.data, another, 1)
    add_rows(mixed[row].ctypes.data, one, mixed[other].ctypes.data, another, mixed.shape[1])


def compile_attention(stored: type[np.generic], is_cached: bool, team: Team) -> Callable[..., None]:
    """The `attend` of services.engine.cpu.kernels."""
    size, real = types.intp, types.float32

    @njit(nogil=True, error_model="numpy")
    def attend_parts(call, first_part, step):
        """Every `step`th part of a call from `first_part` on."""
        num_heads, dim, width = call.num_heads, call.dim, _padded(call.dim)
        shape = (call.num_tokens, dim if call.cos else 0)
        for part in range(first_part, call.num_parts, step):
            _attend_part(
                part,
                call.num_parts,
                carray(pointer(call.heads), (call.num_tokens, num_heads + 2 * call.num_kv_heads, dim), stored),
                carray(pointer(call.cos), shape, stored),
                carray(pointer(call.signed_sin), shape, stored),
                carray(pointer(call.positions), (call.num_tokens,), np.int64),
                carray(pointer(call.starts), (call.num_sequences + 1,), np.int64),
                carray(pointer(call.tables), (call.num_sequences, call.num_blocks), np.int64),
                call.block_size,
                carray(pointer(call.keys), (1, call.num_kv_heads, dim), stored),
                carray(pointer(call.values), (1, call.num_kv_heads, dim), stored),
                num_heads,
                carray(pointer(call.maxima), (call.num_rows, LANES), np.float32),
                carray(pointer(call.sums), (call.num_rows, LANES), np.float32),
                carray(pointer(call.mixed), (call.num_rows, width, LANES), np.float32),
                call.scale,
                call.softcap,
                call.window,
            )

    @cfunc(types.void(types.voidptr), nopython=True, cache=is_cached)
    def attend_parts_of_thread(data):
        call = carray(data, (1,), _CALL)[0]
        attend_parts(call, _ask(call.thread_num), _ask(call.num_threads))

    @njit(types.void(*[size] * 23, real, real), nogil=True, cache=is_cached)
    def attend(
        worker,
        fork,
        thread_num,
        num_threads,
        num_parts,
        heads,
        out,
        cos,
        signed_sin,
        slots,
        positions,
        starts,
        tables,
        num_tokens,
        num_sequences,
        num_blocks,
        block_size,
        keys,
        values,
        num_kv_heads,
        dim,
        num_heads,
        window,
        scale,
        softcap,
    ):
        all_positions = carray(pointer(positions), (num_tokens,), np.int64)
        all_starts = carray(pointer(starts), (num_sequences + 1,), np.int64)
        num_rows, _ = _totals(all_positions, all_starts, num_kv_heads, num_heads // num_kv_heads, window)
        num_parts, shape = num_parts if fork else 1, (num_tokens, dim if cos else 0)
        maxima, sums = np.empty((num_rows, LANES), np.float32), np.empty((num_rows, LANES), np.float32)
        mixed = np.empty((num_rows, _padded(dim), LANES), np.float32)
        _store(
            carray(pointer(heads), (num_tokens, num_heads + 2 * num_kv_heads, dim), stored),
            num_heads,
            carray(pointer(cos), shape, stored),
            carray(pointer(signed_sin), shape, stored),
            carray(pointer(slots), (num_tokens,), np.int64),
            carray(pointer(keys), (1, num_kv_heads, dim), stored),
            carray(pointer(values), (1, num_kv_heads, dim), stored),
        )
        calls = np.empty(1, _CALL)
        call = calls[0]
        call.thread_num, call.num_threads, call.num_parts = thread_num, num_threads, num_parts
        call.heads, call.cos, call.signed_sin = heads, cos, signed_sin
        call.positions, call.starts, call.tables = positions, starts, tables
        call.num_tokens, call.num_sequences, call.num_blocks = num_tokens, num_sequences, num_blocks
        call.block_size, call.keys, call.values, call.num_kv_heads = block_size, keys, values, num_kv_heads
        call.dim, call.num_heads, call.window, call.scale, call.softcap = dim, num_heads, window, scale, softcap
        call.maxima, call.sums, call.mixed = maxima.ctypes.data, sums.ctypes.data, mixed.ctypes.data
        call.num_rows = num_rows
        if num_parts > 1:
            _fork(fork, worker, calls.ctypes.data, num_parts)
        else:
            attend_parts(call, 0, 1)
        _join(
            all_positions,
            all_starts,
            num_kv_heads,
            window,
            maxima,
            sums,
            mixed,
            carray(pointer(out), (num_tokens, num_heads, dim), stored),
        )

    return partial(attend, attend_parts_of_thread.address, *team)


@njit(nogil=True, error_model="numpy")
def _padded(dim):
    return (dim + DIMS_AT_ONCE - 1) // DIMS_AT_ONCE * DIMS_AT_ONCE
