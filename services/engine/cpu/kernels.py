"""Kernels for steps of few rows on a CPU, where an operation of torch costs more to call than to compute.

Owns: their arithmetic. Must not know: torch, models, steps. Compiled by Numba for the processor at hand, for one type
of stored values: float32, or bfloat16 as the uint16 it is kept in. Everything is computed in float32, in one thread
without Python's lock, rounded once when it is stored, and NaN stays NaN. Arrays come as addresses, contiguous; nothing
here checks them.

The attention is that of Kwon et al. 2023 (PagedAttention), section 4.3: it reads the blocks where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload

_SUMS = {"reassoc", "contract", "nsz"}
"""What sums of many terms may be rearranged by; never on the assumption that there are no NaN or infinities."""

_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_ROUNDER = np.float32(12582912.0)
"""1.5 * 2^23: what is added to it is rounded to an integer, which stands in its last bits."""
_LEAST_EXPONENT, _HIGHEST_EXPONENT = np.float32(-87.0), np.float32(88.0)
_TERM_3, _TERM_4, _TERM_5, _TERM_6, _TERM_7 = (np.float32(1.0 / math.factorial(n)) for n in range(3, 8))
"""Of the exponential series."""


class Kernels(NamedTuple):
    """For one type of stored values. Addresses and sizes are integers."""

    add_rms_norm: Callable[..., None]
    """(hidden, delta, weight, out, rows, width, floor): hidden += delta, unless that is 0; out = hidden * weight / the
    root of its square sum and `floor` (Zhang and Sennrich 2019), `weight` being float32."""
    silu_and_mul: Callable[..., None]
    """(gate_up, out, rows, width): out = silu(gate) * up, of rows (gate, up) of `width` each (Shazeer 2020)."""
    attend: Callable[..., None]
    """(heads, out, cos, signed_sin, slots, positions, sequences, tables, num_tokens, num_blocks, block_size, keys,
    values, num_kv_heads, dim, num_heads, window, scale, softcap): stores the keys and values of a step's tokens,
    then attends over all that each may see. `heads` are query, key and value heads (tokens, heads + 2 kv heads, dim),
    `cos` and `signed_sin` (tokens, dim) or 0 where they are rotated already, `out` (tokens, heads, dim); int64 are
    `slots`, `positions` and `sequences` (tokens,), the last of them rows of `tables` (sequences, num_blocks); `keys`
    and `values` (slots, kv heads, dim). `window` and `softcap` are 0 where there is none."""


@intrinsic
def _pointer(context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


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
def _attend(
    heads,
    cos,
    signed_sin,
    slots,
    positions,
    sequences,
    tables,
    block_size,
    keys,
    values,
    out,
    scale,
    softcap,
    window,
):
    num_tokens, num_heads, dim = out.shape
    num_kv_heads = keys.shape[1]
    for t in range(num_tokens):
        for head in range(num_kv_heads):
            _turn(heads[t, num_heads + head], cos[t], signed_sin[t], np.float32(1.0), keys[slots[t], head])
            value = heads[t, num_heads + num_kv_heads + head]
            for i in range(dim):
                values[slots[t], head, i] = value[i]
    queries, mixed = np.empty((num_heads, dim), np.float32), np.empty((num_heads, dim), np.float32)
    for t in range(num_tokens):
        table, end = tables[sequences[t]], positions[t] + 1
        first = max(0, end - window) if window else 0
        scores = np.empty((num_heads, end - first), np.float32)
        for q in range(num_heads):
            _turn(heads[t, q], cos[t], signed_sin[t], scale, queries[q])
        _scores(queries, keys, table, block_size, first, scores)
        for q in range(num_heads):
            if softcap:
                _soft_cap(scores[q], softcap)
            _exponentials(scores[q])
        _mix(scores, values, table, block_size, first, mixed)
        for q in range(num_heads):
            share = np.float32(1.0) / _sum(scores[q])
            for i in range(dim):
                _put(out[t, q], i, mixed[q, i] * share)


def compile_kernels(stored: type[np.generic], is_cached: bool) -> Kernels:
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

    @njit(types.void(*[size] * 17, real, real), nogil=True, cache=is_cached)
    def attend(
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
        shape = (num_tokens, dim if cos else 0)
        _attend(
            carray(_pointer(heads), (num_tokens, num_heads + 2 * num_kv_heads, dim), stored),
            carray(_pointer(cos), shape, stored),
            carray(_pointer(signed_sin), shape, stored),
            carray(_pointer(slots), (num_tokens,), np.int64),
            carray(_pointer(positions), (num_tokens,), np.int64),
            carray(_pointer(sequences), (num_tokens,), np.int64),
            carray(_pointer(tables), (num_tokens, num_blocks), np.int64),
            block_size,
            carray(_pointer(keys), (1, num_kv_heads, dim), stored),
            carray(_pointer(values), (1, num_kv_heads, dim), stored),
            carray(_pointer(out), (num_tokens, num_heads, dim), stored),
            scale,
            softcap,
            window,
        )

    return Kernels(add_rms_norm, silu_and_mul, attend)
