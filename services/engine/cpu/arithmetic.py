"""What the kernels are made of: stored values as float32, e^x, addresses, and products of whole vectors.

Owns: how one value, or one vector, is computed. Must not know: layers, attention, torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""Values of float32 that are computed together."""
KEYS_AT_ONCE = 8
DIMS_AT_ONCE = 8

SUMS = {"reassoc", "contract", "nsz"}
"""What sums of many terms may be rearranged by; never on the assumption that there are no NaN or infinities."""

_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_ROUNDER = np.float32(12582912.0)
"""1.5 * 2^23: what is added to it is rounded to an integer, which stands in its last bits."""
_LEAST_EXPONENT, _HIGHEST_EXPONENT = np.float32(-87.0), np.float32(88.0)
_TERM_3, _TERM_4, _TERM_5, _TERM_6, _TERM_7 = (np.float32(1.0 / math.factorial(n)) for n in range(3, 8))
"""Of the exponential series."""

_REAL, _WORD, _PLACE = ir.FloatType(), ir.IntType(32), ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(_REAL, LANES)

Generated = tuple[types.Type, Callable[..., Any]]


@intrinsic
def pointer(context, address) -> Generated:
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], _PLACE)

    return types.voidptr(types.intp), generate


@intrinsic
def prefetch(context, address) -> Generated:
    """Has the cache line at an address brought nearer; any address will do."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [_PLACE, _WORD, _WORD, _WORD])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        reads, stays, is_data = ir.Constant(_WORD, 0), ir.Constant(_WORD, 3), ir.Constant(_WORD, 1)
        builder.call(function, [builder.inttoptr(arguments[0], _PLACE), reads, stays, is_data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _as_float(context, bits) -> Generated:
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _REAL)

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(context, number) -> Generated:
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _WORD)

    return types.uint32(types.float32), generate


def get(array, i):
    """The value at `i` as float32."""


@overload(get)
def _get_of(array, i):
    if array.dtype == types.float32:
        return lambda array, i: array[i]
    return lambda array, i: _as_float(np.uint32(array[i]) << np.uint32(16))


def put(array, i, value):
    """Stores a float32, in bfloat16 the nearest, of two the even one."""


@overload(put)
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
def exp(x):
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


@intrinsic
def multiply_keys(context, keys, width, queries, scores, dim) -> Generated:
    """scores[k] = sum over i < dim of keys[k, i] * queries[i], for KEYS_AT_ONCE keys k; of float32 keys (keys, width),
    queries (dim, LANES), scores (keys, LANES)."""

    def generate(context, builder, signature, arguments):
        keys, width, queries, scores, dim = arguments
        totals = [cgutils.alloca_once_value(builder, _all(0.0)) for _ in range(KEYS_AT_ONCE)]
        with cgutils.for_range(builder, dim) as loop:
            query = _load(builder, queries, builder.mul(loop.index, _size(LANES)))
            for k, total in enumerate(totals):
                at = builder.add(builder.mul(width, _size(k)), loop.index)
                _add_product(builder, total, _spread(builder, keys, at), query)
        for k, total in enumerate(totals):
            _store(builder, builder.load(total), scores, _size(k * LANES))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@intrinsic
def add_values(context, values, width, weights, mixed, num_values) -> Generated:
    """mixed[i] += sum over j < num_values of values[j, i] * weights[j], for DIMS_AT_ONCE dims i; of float32 values
    (num_values, width), weights (num_values, LANES), mixed (dims, LANES)."""

    def generate(context, builder, signature, arguments):
        values, width, weights, mixed, num_values = arguments
        totals = [
            cgutils.alloca_once_value(builder, _load(builder, mixed, _size(i * LANES))) for i in range(DIMS_AT_ONCE)
        ]
        with cgutils.for_range(builder, num_values) as loop:
            weight = _load(builder, weights, builder.mul(loop.index, _size(LANES)))
            row = builder.mul(loop.index, width)
            for i, total in enumerate(totals):
                _add_product(builder, total, _spread(builder, values, builder.add(row, _size(i))), weight)
        for i, total in enumerate(totals):
            _store(builder, builder.load(total), mixed, _size(i * LANES))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@intrinsic
def find_maxima(context, scores, maxima, num_keys) -> Generated:
    """maxima = the greatest of it and of scores[j], j < num_keys, each lane its own; float32 (num_keys, LANES)."""

    def generate(context, builder, signature, arguments):
        scores, maxima, num_keys = arguments
        highest = cgutils.alloca_once_value(builder, _load(builder, maxima, _size(0)))
        with cgutils.for_range(builder, num_keys) as loop:
            score, so_far = _load(builder, scores, builder.mul(loop.index, _size(LANES))), builder.load(highest)
            builder.store(builder.select(builder.fcmp_ordered(">", score, so_far), score, so_far), highest)
        _store(builder, builder.load(highest), maxima, _size(0))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def exponentiate(context, scores, maxima, sums, num_keys) -> Generated:
    """scores[j] = e^(scores[j] - maxima), and sums += scores[j], for j < num_keys; float32 (num_keys, LANES)."""

    def generate(context, builder, signature, arguments):
        scores, maxima, sums, num_keys = arguments
        highest, total = (
            _load(builder, maxima, _size(0)),
            cgutils.alloca_once_value(builder, _load(builder, sums, _size(0))),
        )
        with cgutils.for_range(builder, num_keys) as loop:
            at = builder.mul(loop.index, _size(LANES))
            weight = _exp(builder, builder.fsub(_load(builder, scores, at), highest))
            _store(builder, weight, scores, at)
            builder.store(builder.fadd(builder.load(total), weight), total)
        _store(builder, builder.load(total), sums, _size(0))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def scale_rows(context, rows, factors, num_rows) -> Generated:
    """rows[i] *= factors for i < num_rows, each lane by its own; float32 (num_rows, LANES)."""

    def generate(context, builder, signature, arguments):
        rows, factors, num_rows = arguments
        factor = _load(builder, factors, _size(0))
        with cgutils.for_range(builder, num_rows) as loop:
            at = builder.mul(loop.index, _size(LANES))
            _store(builder, builder.fmul(_load(builder, rows, at), factor), rows, at)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def add_rows(context, rows, factors, others, other_factors, num_rows) -> Generated:
    """rows[i] = rows[i] * factors + others[i] * other_factors for i < num_rows; float32 (num_rows, LANES)."""

    def generate(context, builder, signature, arguments):
        rows, factors, others, other_factors, num_rows = arguments
        factor, other_factor = _load(builder, factors, _size(0)), _load(builder, other_factors, _size(0))
        with cgutils.for_range(builder, num_rows) as loop:
            at = builder.mul(loop.index, _size(LANES))
            scaled = builder.fmul(_load(builder, rows, at), factor)
            other = builder.fmul(_load(builder, others, at), other_factor)
            _store(builder, builder.fadd(scaled, other), rows, at)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """As `exp`, of a vector."""

    def fused(left: ir.Value, right: ir.Value, more: ir.Value) -> ir.Value:
        return builder.fadd(builder.fmul(left, right, flags=("contract",)), more, flags=("contract",))

    least, highest, log2_e, rounder = (_all(n) for n in (_LEAST_EXPONENT, _HIGHEST_EXPONENT, _LOG2_E, _ROUNDER))
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    x = builder.select(builder.fcmp_ordered(">", x, highest), highest, x)
    shifted = builder.fadd(builder.fmul(x, log2_e), rounder)
    power = builder.fsub(builder.fmul(x, log2_e), builder.fsub(shifted, rounder))
    rest = builder.fmul(power, _all(_LN_2))
    power = fused(rest, _all(_TERM_7), _all(_TERM_6))
    for term in (_TERM_5, _TERM_4, _TERM_3, 0.5, 1.0, 1.0):
        power = fused(power, rest, _all(term))
    words = ir.VectorType(_WORD, LANES)
    exponent = builder.add(builder.bitcast(shifted, words), ir.Constant(words, [127] * LANES))
    scale = builder.shl(exponent, ir.Constant(words, [23] * LANES))
    return builder.fmul(power, builder.bitcast(scale, _VECTOR))


def _all(number: float | np.floating[Any]) -> ir.Constant:
    return ir.Constant(_VECTOR, [float(number)] * LANES)


def _size(number: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), number)


def _place(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    """Of the float32 at `index`, as a pointer to `kind`."""
    return builder.inttoptr(builder.add(address, builder.mul(index, _size(4))), kind.as_pointer())


def _load(builder: ir.IRBuilder, address: ir.Value, index: ir.Value) -> ir.Value:
    return builder.load(_place(builder, address, index, _VECTOR), align=4)


def _store(builder: ir.IRBuilder, vector: ir.Value, address: ir.Value, index: ir.Value) -> None:
    builder.store(vector, _place(builder, address, index, _VECTOR), align=4)


def _spread(builder: ir.IRBuilder, address: ir.Value, index: ir.Value) -> ir.Value:
    """One float32 in all lanes."""
    number = builder.load(_place(builder, address, index, _REAL), align=4)
    single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES))


def _add_product(builder: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value) -> None:
    product = builder.fmul(left, right, flags=("contract",))
    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
