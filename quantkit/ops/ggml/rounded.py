"""Compiled encoders of the types that need no search: Q8_0, and Q4_0, Q4_1, Q5_0, Q5_1 without importance. As ``kernels`` has it.

These are as fast as memory, so a block is one vector of 32 lanes: its extremes come from the bits of its values, compared as integers
both with and without sign, and its codes leave the vector as packed bytes. Blocks in which that could be unlike ggml's scalar order
(values of one sign, two magnitudes alike) take the scalar way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from quantkit.ops.ggml.kernels import (
    HALF,
    INFINITE,
    ZERO,
    Bytes,
    Floats,
    _inline,
    _inverse,
    _jit,
    _peak_of,
    _put_half,
    to_half,
)

_WORD, _REAL, _BYTE = ir.IntType(32), ir.FloatType(), ir.IntType(8)
_WORDS, _REALS, _BYTES, _HALF_BYTES = (ir.VectorType(kind, n) for kind, n in ((_WORD, 32), (_REAL, 32), (_BYTE, 32), (_BYTE, 16)))
INFINITE_WORD, INFINITE_HALF = 0x7F800000, 0x7C00
"""Bits of infinity as float32 and float16: those of a finite number without its sign are below."""


def _row(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """IR of the address of row ``index`` of an array."""
    found = context.make_array(kind)(context, builder, array)
    offset = builder.mul(index, builder.extract_value(found.strides, 0))
    return builder.gep(builder.bitcast(found.data, _BYTE.as_pointer()), [offset])


def _all_lanes(builder: Any, value: Any) -> Any:
    """IR of a vector of 32 times ``value``."""
    kind = ir.VectorType(value.type, 32)
    none = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(none, value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, none, ir.Constant(_WORDS, [0] * 32))


def _same(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


@_inline
def _extremes(typing: Any, values: Any, block: Any) -> Any:
    """Of the bits of ``values[block]``: the greatest as int32, and the greatest as uint32, given as int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = _row(context, builder, signature.args[0], *arguments)
        words = builder.load(builder.bitcast(start, _WORDS.as_pointer()), align=4)
        kind = ir.FunctionType(_WORD, [_WORDS])
        names = [f"llvm.vector.reduce.{name}.v32i32" for name in ("smax", "umax")]
        found = [builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [words]) for name in names]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.int32, 2)(values, types.intp), generate


@_inline
def _put_codes(typing: Any, values: Any, block: Any, least: Any, factor: Any, bias: Any, top: Any, out: Any, offset: Any, five: Any) -> Any:
    """``(value - least) * factor + bias`` of ``values[block]``, cut to a whole number and to ``top``: the low four bits of each into the
    16 bytes at ``offset`` of ``out[block]``, the fifth of all into the four bytes before, with ``five``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.bitcast(_row(context, builder, signature.args[0], *arguments[:2]), _REALS.as_pointer())
        low, by, plus, most = (_all_lanes(builder, argument) for argument in arguments[2:6])
        exact = builder.fadd(builder.fmul(builder.fsub(builder.load(start, align=4), low), by), plus)
        whole = builder.fptosi(exact, _WORDS)
        codes = builder.trunc(builder.select(builder.icmp_signed("<", whole, most), whole, most), _BYTES)
        place = builder.gep(_row(context, builder, signature.args[6], arguments[6], arguments[1]), [arguments[7]])
        with builder.if_then(arguments[8]):
            fifth = builder.icmp_unsigned("!=", builder.and_(codes, _same(_BYTES, 16)), _same(_BYTES, 0))
            before = builder.gep(place, [ir.Constant(ir.IntType(64), -4)])
            builder.store(builder.bitcast(fifth, _WORD), builder.bitcast(before, _WORD.as_pointer()), align=1)
        codes = builder.and_(codes, _same(_BYTES, 15))
        lower, upper = (
            builder.shuffle_vector(codes, codes, ir.Constant(ir.VectorType(_WORD, 16), list(range(first, first + 16)))) for first in (0, 16)
        )
        packed = builder.or_(lower, builder.shl(upper, _same(_HALF_BYTES, 4)))
        builder.store(packed, builder.bitcast(place, _HALF_BYTES.as_pointer()), align=1)
        return context.get_dummy_value()

    real, whole, place = types.float32, types.int32, types.intp
    return types.void(values, place, real, real, real, whole, out, place, types.boolean), generate


@_inline
def _real(typing: Any, word: Any) -> Any:
    """The float32 of the bits of an int32."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], _REAL)


@_jit
def _truncate(value: np.float32) -> np.int32:
    """Toward zero; 0 for what an int32 does not hold, since ggml keeps the low byte of the processor's answer, 2^31."""
    return np.int32(value) if abs(value) < np.float32(2147483648.0) else np.int32(0)


@_jit
def encode_q8_0(values: Floats, out: Bytes) -> None:
    """Q8_0: d = max|x| / 127, codes rounded half away from zero."""
    for b in range(values.shape[0]):
        largest = ZERO
        for i in range(32):
            size = abs(values[b, i])
            if size > largest:
                largest = size
        scale = largest / np.float32(127)
        inverse = _inverse(scale)
        _put_half(out[b], 0, scale)
        for i in range(32):
            value = values[b, i] * inverse  # infinite where the inverse of a denormal scale is
            whole = _truncate(value)
            rest = value - np.float32(whole)
            up, down = HALF <= rest < INFINITE, -HALF >= rest > -INFINITE
            out[b, 2 + i] = (whole + np.int32(up) - np.int32(down)) & 255


@_jit
def _range_of(block: Floats) -> tuple[np.float32, np.float32]:
    """Least and greatest, the first of equals."""
    least, most = block[0], block[0]
    for i in range(1, 32):
        least = block[i] if block[i] < least else least
        most = block[i] if block[i] > most else most
    return least, most


@_jit
def encode_legacy_plain(values: Floats, out: Bytes, five: bool, affine: bool) -> int:
    """Q4_0, Q4_1 (``affine``), Q5_0 (``five``), Q5_1 (both). Returns the first block that has a value which is not finite or a scale that
    float16 does not hold, -1 if there is none."""
    top = np.int32(31 if five else 15)
    nmax = np.float32(top if affine else (16 if five else 8))
    bias = HALF if affine else nmax + HALF
    offset = (4 if affine else 2) + (4 if five else 0)
    bad = -1
    for b in range(values.shape[0]):
        high, low = _extremes(values, b)  # of finite values with both signs: the greatest, and the least
        magnitude = low & 0x7FFFFFFF
        least = ZERO
        if affine:
            if high > 0 and low < 0 and magnitude > 0:
                least, most = _real(low), _real(high)
            else:
                least, most = _range_of(values[b])
            scale = (most - least) / nmax
        else:
            if high > magnitude:
                peak = _real(high)
            elif magnitude > high and magnitude > 0:
                peak = _real(low)
            else:
                peak = _peak_of(values[b])
            scale = peak / -nmax
        half = to_half(scale)
        out[b, 0] = half & 255
        out[b, 1] = half >> 8
        unfit = (half & INFINITE_HALF) == INFINITE_HALF
        if affine:
            half = to_half(least)
            out[b, 2] = half & 255
            out[b, 3] = half >> 8
            unfit |= (half & INFINITE_HALF) == INFINITE_HALF
        if bad < 0 and (unfit or high >= INFINITE_WORD or (low < 0 and magnitude >= INFINITE_WORD)):
            bad = b
        inverse = _inverse(scale)
        if abs(inverse) < INFINITE:
            _put_codes(values, b, least, inverse, bias, top, out, offset, five)
        else:  # of a denormal scale; ggml makes 0 of what no int32 holds
            for i in range(4 if affine else 2, out.shape[1]):
                out[b, i] = 0
    return bad
