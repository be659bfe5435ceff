"""Kernels for steps of few rows on a CPU, where an operation of torch costs more to call than to compute.

Owns: their arithmetic. Must not know: torch, models, steps. Compiled by Numba for the processor at hand, for one type
of stored values: float32, or bfloat16 as the uint16 it is kept in. Everything is computed in float32, without Python's
lock, rounded once when it is stored, and NaN stays NaN. Arrays come as addresses, contiguous; nothing here checks them.

The attention is that of Kwon et al. 2023 (PagedAttention), section 4.3: it reads the blocks where they lie. Its threads
are torch's own (services.engine.cpu.team), as others would have to share the cores with those that wait for torch's
next product. All that the tokens of a step may see is laid end to end and cut into equal parts, one a thread; where a
cut falls within a token, the parts are joined by their maxima and sums (Dao et al. 2023, Flash-Decoding).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic, overload

from services.engine.cpu.team import Team

_SUMS = {"reassoc", "contract", "nsz"}
"""What sums of many terms may be rearranged by; never on the assumption that there are no NaN or infinities."""

_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_ROUNDER = np.float32(12582912.0)
"""1.5 * 2^23: what is added to it is rounded to an integer, which stands in its last bits."""
_LEAST_EXPONENT, _HIGHEST_EXPONENT = np.float32(-87.0), np.float32(88.0)
_TERM_3, _TERM_4, _TERM_5, _TERM_6, _TERM_7 = (np.float32(1.0 / math.factorial(n)) for n in range(3, 8))
"""Of the exponential series."""

_CALL = np.dtype(
    [
        *((name, np.int64) for name in ("thread_num", "num_threads", "num_parts")),
        *((name, np.int64) for name in ("heads", "cos", "signed_sin", "positions", "sequences", "tables")),
        *((name, np.int64) for name in ("num_tokens", "num_blocks", "block_size", "keys", "values", "num_kv_heads")),
        *((name, np.int64) for name in ("dim", "num_heads", "window", "maxima", "sums", "mixed")),
        *((name, np.float32) for name in ("scale", "softcap")),
    ]
)
"""What the threads of an attention get to know."""


class Kernels(NamedTuple):
    """For one type of stored values. Addresses and sizes are integers."""

    add_rms_norm: Callable[..., None]
    """(hidden, delta, weight, out, rows, width, floor): hidden += delta, unless that is 0; out = hidden * weight / the
    root of its square sum and `floor` (Zhang and Sennrich 2019), `weight` being float32."""
    silu_and_mul: Callable[..., None]
    """(gate_up, out, rows, width): out = silu(gate) * up, of rows (gate, up) of `width` each (Shazeer 2020)."""
    attend: Callable[..., None]
    """(num_parts, heads, out, cos, signed_sin, slots, positions, sequences, tables, num_tokens, num_blocks,
    block_size, keys, values, num_kv_heads, dim, num_heads, window, scale, softcap): stores the keys and values of a step's tokens,
    then attends over all that each may see. `heads` are query, key and value heads (tokens, heads + 2 kv heads, dim),
    `cos` and `signed_sin` (tokens, dim) or 0 where they are rotated already, `out` (tokens, heads, dim); int64 are
    `slots`, `positions` and `sequences` (tokens,), the last of them rows of `tables` (sequences, num_blocks); `keys`
    and `values` (slots, kv heads, dim). `window` and `softcap` are 0 where there is none. It is computed in
    `num_parts` threads, where there is a team."""


@intrinsic
def _pointer(context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


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


@intrinsic
def _as_float(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(context, number):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _get(array, i):
    """The value at `i` as float32."""


@overload(_get)
def _get_of(array, i):
    if array.dtype == types.float32:
        return lambda array, i: array[i]
    return lambda array, i: _as_float(np.uint32(array[i]) << np.uint32(16))


def _put(array, i, value):
    """Stores a float32, in bfloat16 the nearest, of two the even one."""


@overload(_put)
def _put_in(array, i, value):
    if array.dtype == types.float32:

        def put(array, i, value):
            array[i] = value
    else:

        def put(array, i, value):
            bits = _as_bits(np.float32(value))
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            array[i] = np.uint16(rounded) if value == value else np.uint16(0x7FC0)

    return put


@njit(nogil=True, error_model="numpy")
def _exp(x):
    """e^x within a few units in the last place; below -87 and above 88 as there."""
    x = _LEAST_EXPONENT if x < _LEAST_EXPONENT else x
    x = _HIGHEST_EXPONENT if x > _HIGHEST_EXPONENT else x
    shifted = x * _LOG2_E + _ROUNDER
    rest = (x * _LOG2_E - (shifted - _ROUNDER)) * _LN_2
    power = rest * _TERM_7 + _TERM_6
    power = power * rest + _TERM_5
    power = power * rest + _TERM_4
    power = power * rest + _TERM_3
    power = power * rest + np.float32(0.5)
    power = power * rest + np.float32(1.0)
    power = power * rest + np.float32(1.0)
    return power * _as_float((_as_bits(shifted) + np.uint32(127)) << np.uint32(23))


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _add_rms_norm(hidden, delta, adds, weight, out, floor):
    width = len(hidden)
    if adds:
        for i in range(width):
            _put(hidden, i, _get(hidden, i) + _get(delta, i))
    total = np.float32(0.0)
    for i in range(width):
        total += _get(hidden, i) * _get(hidden, i)
    scale = np.float32(1.0) / np.float32(math.sqrt(total + floor))
    for i in range(width):
        _put(out, i, _get(hidden, i) * scale * weight[i])


@njit(nogil=True, error_model="numpy")
def _silu_and_mul(gates, ups, out):
    for i in range(len(out)):
        gate = _get(gates, i)
        _put(out, i, gate / (np.float32(1.0) + _exp(-gate)) * _get(ups, i))


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _turn(head, cos, signed_sin, scale, out):
    """Rotates (Su et al. 2021, RoFormer) and scales; without a rotation `cos` is empty."""
    dim = len(head)
    half = dim // 2
    if len(cos) == 0:
        for i in range(dim):
            _put(out, i, _get(head, i) * scale)
        return
    for i in range(half):
        turned = _get(head, i) * _get(cos, i) + _get(head, i + half) * _get(signed_sin, i)
        _put(out, i, turned * scale)
    for i in range(half, dim):
        turned = _get(head, i) * _get(cos, i) + _get(head, i - half) * _get(signed_sin, i)
        _put(out, i, turned * scale)


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _scores(queries, keys, table, block_size, first, scores):
    """scores[q, j] = queries[q] . key at position first + j; queries (heads, dim), keys (slots, kv heads, dim)."""
    num_kv_heads, dim = keys.shape[1:]
    fold, end = len(queries) // num_kv_heads, first + scores.shape[1]
    for block in range(first // block_size, (end - 1) // block_size + 1):
        start = block * block_size
        for position in range(max(start, first), min(start + block_size, end)):
            slot = table[block] * block_size + position - start
            for head in range(num_kv_heads):
                key = keys[slot, head]
                for q in range(head * fold, (head + 1) * fold):
                    total = np.float32(0.0)
                    for i in range(dim):
                        total += queries[q, i] * _get(key, i)
                    scores[q, position - first] = total


@njit(nogil=True, error_model="numpy")
def _soft_cap(scores, softcap):
    for j in range(len(scores)):
        scores[j] = softcap * np.float32(math.tanh(scores[j] / softcap))


@njit(nogil=True, error_model="numpy")
def _exponentials(scores):
    highest = scores[0]
    for j in range(1, len(scores)):
        highest = scores[j] if scores[j] > highest else highest
    for j in range(len(scores)):
        scores[j] = _exp(scores[j] - highest)
    return highest


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _sum(values):
    total = np.float32(0.0)
    for j in range(len(values)):
        total += values[j]
    return total


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _mix(weights, values, table, block_size, first, mixed):
    """mixed[q] = sum of weights[q, j] * value at position first + j; mixed (heads, dim), values as keys above."""
    num_kv_heads, dim = values.shape[1:]
    fold, end = len(mixed) // num_kv_heads, first + weights.shape[1]
    mixed[:] = np.float32(0.0)
    for block in range(first // block_size, (end - 1) // block_size + 1):
        start = block * block_size
        for position in range(max(start, first), min(start + block_size, end)):
            slot = table[block] * block_size + position - start
            for head in range(num_kv_heads):
                value = values[slot, head]
                for q in range(head * fold, (head + 1) * fold):
                    weight = weights[q, position - first]
                    for i in range(dim):
                        mixed[q, i] += weight * _get(value, i)


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
def _num_visible(position, window):
    """Tokens that one at `position` sees."""
    return min(position + 1, window) if window else position + 1


@njit(nogil=True, error_model="numpy")
def _total_visible(positions, window):
    total = 0
    for t in range(len(positions)):
        total += _num_visible(positions[t], window)
    return total


@njit(nogil=True, error_model="numpy")
def _attend_part(
    part,
    num_parts,
    heads,
    cos,
    signed_sin,
    positions,
    sequences,
    tables,
    block_size,
    keys,
    values,
    maxima,
    sums,
    mixed,
    scale,
    softcap,
    window,
):
    """One of the parts; what it finds of token t comes into row t + part of `maxima`, `sums` and `mixed`."""
    num_heads, total = maxima.shape[1], _total_visible(positions, window)
    start, stop = total * part // num_parts, total * (part + 1) // num_parts
    queries, offset = np.empty((num_heads, mixed.shape[2]), np.float32), 0
    for t in range(len(positions)):
        num_visible = _num_visible(positions[t], window)
        low, high = max(start - offset, 0), min(stop - offset, num_visible)
        offset += num_visible
        if low < high:
            first, row, table = positions[t] + 1 - num_visible + low, t + part, tables[sequences[t]]
            scores = np.empty((num_heads, high - low), np.float32)
            for q in range(num_heads):
                _turn(heads[t, q], cos[t], signed_sin[t], scale, queries[q])
            _scores(queries, keys, table, block_size, first, scores)
            for q in range(num_heads):
                if softcap:
                    _soft_cap(scores[q], softcap)
                maxima[row, q] = _exponentials(scores[q])
                sums[row, q] = _sum(scores[q])
            _mix(scores, values, table, block_size, first, mixed[row])


@njit(nogil=True, error_model="numpy")
def _join(positions, window, num_parts, maxima, sums, mixed, out):
    """Adds up what the parts found of each token."""
    num_heads, dim = out.shape[1:]
    total, offset, first_part = _total_visible(positions, window), 0, 0
    for t in range(len(positions)):
        end = offset + _num_visible(positions[t], window)
        while total * (first_part + 1) // num_parts <= offset:
            first_part += 1
        row, part = t + first_part, first_part + 1
        while part < num_parts and total * part // num_parts < end:
            if total * part // num_parts < total * (part + 1) // num_parts:
                for q in range(num_heads):
                    _add(t + part, row, q, maxima, sums, mixed)
            part += 1
        for q in range(num_heads):
            share = np.float32(1.0) / sums[row, q]
            for i in range(dim):
                _put(out[t, q], i, mixed[row, q, i] * share)
        offset = end


@njit(nogil=True, error_model="numpy")
def _add(other, row, q, maxima, sums, mixed):
    highest = maxima[other, q] if maxima[other, q] > maxima[row, q] else maxima[row, q]
    weight, other_weight = _exp(maxima[row, q] - highest), _exp(maxima[other, q] - highest)
    maxima[row, q] = highest
    sums[row, q] = sums[row, q] * weight + sums[other, q] * other_weight
    for i in range(mixed.shape[2]):
        mixed[row, q, i] = mixed[row, q, i] * weight + mixed[other, q, i] * other_weight


def compile_kernels(stored: type[np.generic], is_cached: bool, team: Team) -> Kernels:
    """For values stored as np.float32, or as np.uint16, which stands for bfloat16. Takes seconds where not cached."""
    size, real = types.intp, types.float32

    @njit(types.void(*[size] * 6, real), nogil=True, cache=is_cached)
    def add_rms_norm(hidden, delta, weight, out, rows, width, floor):
        weights = carray(_pointer(weight), (width,), np.float32)
        hiddens, outs = carray(_pointer(hidden), (rows, width), stored), carray(_pointer(out), (rows, width), stored)
        deltas = carray(_pointer(delta if delta else hidden), (rows, width), stored)
        for row in range(rows):
            _add_rms_norm(hiddens[row], deltas[row], delta != 0, weights, outs[row], floor)

    @njit(types.void(*[size] * 4), nogil=True, cache=is_cached)
    def silu_and_mul(gate_up, out, rows, width):
        gates, outs = carray(_pointer(gate_up), (rows, 2 * width), stored), carray(_pointer(out), (rows, width), stored)
        for row in range(rows):
            _silu_and_mul(gates[row, :width], gates[row, width:], outs[row])

    @njit(nogil=True, error_model="numpy")
    def attend_parts(call, first_part, step):
        """Every `step`th part of a call from `first_part` on."""
        num_heads, dim = call.num_heads, call.dim
        shape, num_rows = (call.num_tokens, dim if call.cos else 0), call.num_tokens + call.num_parts
        for part in range(first_part, call.num_parts, step):
            _attend_part(
                part,
                call.num_parts,
                carray(_pointer(call.heads), (call.num_tokens, num_heads + 2 * call.num_kv_heads, dim), stored),
                carray(_pointer(call.cos), shape, stored),
                carray(_pointer(call.signed_sin), shape, stored),
                carray(_pointer(call.positions), (call.num_tokens,), np.int64),
                carray(_pointer(call.sequences), (call.num_tokens,), np.int64),
                carray(_pointer(call.tables), (call.num_tokens, call.num_blocks), np.int64),
                call.block_size,
                carray(_pointer(call.keys), (1, call.num_kv_heads, dim), stored),
                carray(_pointer(call.values), (1, call.num_kv_heads, dim), stored),
                carray(_pointer(call.maxima), (num_rows, num_heads), np.float32),
                carray(_pointer(call.sums), (num_rows, num_heads), np.float32),
                carray(_pointer(call.mixed), (num_rows, num_heads, dim), np.float32),
                call.scale,
                call.softcap,
                call.window,
            )

    @cfunc(types.void(types.voidptr), nopython=True, cache=is_cached)
    def attend_parts_of_thread(data):
        call = carray(data, (1,), _CALL)[0]
        attend_parts(call, _ask(call.thread_num), _ask(call.num_threads))

    @njit(types.void(*[size] * 22, real, real), nogil=True, cache=is_cached)
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
        sequences,
        tables,
        num_tokens,
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
        num_parts = num_parts if fork else 1
        shape, rows = (num_tokens, dim if cos else 0), num_tokens + num_parts
        maxima, sums = np.empty((rows, num_heads), np.float32), np.empty((rows, num_heads), np.float32)
        mixed = np.empty((rows, num_heads, dim), np.float32)
        _store(
            carray(_pointer(heads), (num_tokens, num_heads + 2 * num_kv_heads, dim), stored),
            num_heads,
            carray(_pointer(cos), shape, stored),
            carray(_pointer(signed_sin), shape, stored),
            carray(_pointer(slots), (num_tokens,), np.int64),
            carray(_pointer(keys), (1, num_kv_heads, dim), stored),
            carray(_pointer(values), (1, num_kv_heads, dim), stored),
        )
        calls = np.empty(1, _CALL)
        call = calls[0]
        call.thread_num, call.num_threads, call.num_parts = thread_num, num_threads, num_parts
        call.heads, call.cos, call.signed_sin = heads, cos, signed_sin
        call.positions, call.sequences, call.tables = positions, sequences, tables
        call.num_tokens, call.num_blocks, call.block_size = num_tokens, num_blocks, block_size
        call.keys, call.values, call.num_kv_heads = keys, values, num_kv_heads
        call.dim, call.num_heads, call.window, call.scale, call.softcap = dim, num_heads, window, scale, softcap
        call.maxima, call.sums, call.mixed = maxima.ctypes.data, sums.ctypes.data, mixed.ctypes.data
        if num_parts > 1:
            _fork(fork, worker, calls.ctypes.data, num_parts)
        else:
            attend_parts(call, 0, 1)
        _join(
            carray(_pointer(positions), (num_tokens,), np.int64),
            window,
            num_parts,
            maxima,
            sums,
            mixed,
            carray(_pointer(out), (num_tokens, num_heads, dim), stored),
        )

    return Kernels(add_rms_norm, silu_and_mul, partial(attend, attend_parts_of_thread.address, *team))
