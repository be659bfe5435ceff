"""Kernels for steps of few rows on a CPU, where an operation of torch costs more to call than to compute.

Owns: what they are, and the arithmetic of norms and gates. Must not know: torch, models, steps. Compiled by Numba for
the processor at hand, for one type of stored values: float32, or bfloat16 as the uint16 it is kept in. Everything is
computed in float32, without Python's lock, rounded once when it is stored, and NaN stays NaN. Arrays come as addresses,
contiguous; nothing here checks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import carray, njit, types

from services.engine.cpu.arithmetic import LANES, SUMS, exp, get, pointer, put
from services.engine.cpu.attention import compile_attention
from services.engine.cpu.team import Team


class Kernels(NamedTuple):
    """For one type of stored values. Addresses and sizes are integers."""

    lanes: int
    """Query heads of a key head that the attention computes at once."""
    add_rms_norm: Callable[..., None]
    """(hidden, delta, weight, out, rows, width, floor): hidden += delta, unless that is 0; out = hidden * weight / the
    root of its square sum and `floor` (Zhang and Sennrich 2019), `weight` being float32."""
    silu_and_mul: Callable[..., None]
    """(gate_up, out, rows, width): out = silu(gate) * up, of rows (gate, up) of `width` each (Shazeer 2020)."""
    attend: Callable[..., None]
    """(num_parts, heads, out, cos, signed_sin, slots, positions, starts, tables, num_tokens, num_sequences,
    num_blocks, block_size, keys, values, num_kv_heads, dim, num_heads, window, scale, softcap): stores the keys and
    values of a step's tokens, then attends over all that each may see. `heads` are query, key and value heads (tokens,
    heads + 2 kv heads, dim), `cos` and `signed_sin` (tokens, dim) or 0 where they are rotated already, `out` (tokens,
    heads, dim); int64 are `slots` and `positions` (tokens,), `starts` (sequences + 1,), the first token of each
    sequence and the end, and `tables` (sequences, num_blocks); `keys` and `values` (slots, kv heads, dim). `window` and
    `softcap` are 0 where there is none. It is computed in `num_parts` threads, where there is a team."""


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def _add_rms_norm(hidden, delta, adds, weight, out, floor):
    width = len(hidden)
    if adds:
        for i in range(width):
            put(hidden, i, get(hidden, i) + get(delta, i))
    total = np.float32(0.0)
    for i in range(width):
        total += get(hidden, i) * get(hidden, i)
    scale = np.float32(1.0) / np.float32(math.sqrt(total + floor))
    for i in range(width):
        put(out, i, get(hidden, i) * scale * weight[i])


@njit(nogil=True, error_model="numpy")
def _silu_and_mul(gates, ups, out):
    for i in range(len(out)):
        gate = get(gates, i)
        put(out, i, gate / (np.float32(1.0) + exp(-gate)) * get(ups, i))


def compile_kernels(stored: type[np.generic], is_cached: bool, team: Team) -> Kernels:
    """For values stored as np.float32, or as np.uint16, which stands for bfloat16. Takes seconds where not cached."""
    size, real = types.intp, types.float32

    @njit(types.void(*[size] * 6, real), nogil=True, cache=is_cached)
    def add_rms_norm(hidden, delta, weight, out, rows, width, floor):
        weights = carray(pointer(weight), (width,), np.float32)
        hiddens, outs = carray(pointer(hidden), (rows, width), stored), carray(pointer(out), (rows, width), stored)
        deltas = carray(pointer(delta if delta else hidden), (rows, width), stored)
        for row in range(rows):
            _add_rms_norm(hiddens[row], deltas[row], delta != 0, weights, outs[row], floor)

    @njit(types.void(*[size] * 4), nogil=True, cache=is_cached)
    def silu_and_mul(gate_up, out, rows, width):
        gates, outs = carray(pointer(gate_up), (rows, 2 * width), stored), carray(pointer(out), (rows, width), stored)
        for row in range(rows):
            _silu_and_mul(gates[row, :width], gates[row, width:], outs[row])

    return Kernels(LANES, add_rms_norm, silu_and_mul, compile_attention(stored, is_cached, team))
