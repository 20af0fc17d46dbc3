"""Compiled encoders of ggml's block types: float32 blocks in, bytes out, the same bytes as ggml's own (``encode`` is the front).

Three rules make the bytes the same. Every step is one float32 operation, rounded, never fused: constants are ``np.float32``, since numba
turns float32 with an int or a Python float into float64. Every sum over the elements of a block runs in order. A comparison keeps the first
of equals. Searches run over many blocks at once: arrays are [element, lane], a lane is one block, and the inner loop is over lanes, so that
it compiles to SIMD and still adds each block's elements in order.

Every ``encode_*`` takes ``values`` float32 [blocks, elements], ``importance`` float32 [blocks of a row, elements] (no rows: none is used)
and ``out`` uint8 [blocks, bytes], which it fills. Importing this module imports numba; compiled code is kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_F = TypeVar("_F", bound=Callable[..., Any])
Floats = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def _jit(function: _F) -> _F:
    return cast(_F, njit(cache=True, nogil=True, error_model="numpy")(function))


def _inline(function: Callable[..., Any]) -> Any:
    return intrinsic(function)


LANES = 64
"""Blocks that a search takes at once."""
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
TENTH = np.float32(0.1)
TINY = np.float32(1e-15)
"""A block whose largest magnitude is below this is zero."""
INFINITE = np.float32(np.inf)
LOWEST, HIGHEST = np.int32(-(1 << 22)), np.int32(1 << 22)
"""Bounds of what ``_nearest`` can give: no clipping."""
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The sixteen values of IQ4_NL and IQ4_XS by code."""
LEVEL_0 = np.float32(LEVELS[0])


def _bounds() -> tuple[float, ...]:
    """For each pair of neighbouring levels, the least float32 that takes the upper one: upper unless v - lower < upper - v in float32."""
    found = []
    for low, high in pairwise(LEVELS):
        lower, upper = np.float32(low), np.float32(high)
        below, above = lower, upper
        while (middle := np.float32((below + above) / TWO)) not in (below, above):
            if middle - lower < upper - middle:
                below = middle
            else:
                above = middle
        found.append(float(above))
    return tuple(found)


BOUNDS = _bounds()


@_inline
def _bits(typing: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""
    return types.uint32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@_inline
def _float(typing: Any, value: Any) -> Any:
    """The float32 of a bit pattern."""
    return types.float32(types.uint32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.FloatType())


@_inline
def _nearest(typing: Any, value: Any, low: Any, high: Any) -> Any:
    """Round half to even, clip to ``low``..``high`` (int32); float32.

    The whole number is read from the mantissa of value + 1.5 * 2^23, so that past 2^22 it wraps as ggml's does.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, least, most = arguments
        word = ir.IntType(32)
        bits = builder.bitcast(builder.fadd(number, ir.Constant(ir.FloatType(), 12582912.0)), word)
        whole = builder.sub(builder.and_(bits, ir.Constant(word, 0x7FFFFF)), ir.Constant(word, 0x400000))
        whole = builder.select(builder.icmp_signed("<", whole, least), least, whole)
        whole = builder.select(builder.icmp_signed(">", whole, most), most, whole)
        return builder.sitofp(whole, ir.FloatType())

    return types.float32(types.float32, types.int32, types.int32), generate


@_inline
def _choose(typing: Any, condition: Any, one: Any, other: Any) -> Any:
    """``one`` where the condition holds, else ``other``, which may be what lies where the answer is stored.

    Python's own ``if`` would make of that a masked store, which is many times slower on some processors. LLVM's "freeze" hides it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        frozen = ir.instructions.Instruction(builder.block, ir.FloatType(), "freeze", [arguments[2]])
        builder._insert(frozen)
        return builder.select(arguments[0], arguments[1], frozen)

    return types.float32(types.boolean, types.float32, types.float32), generate


@_inline
def _either(typing: Any, found: Any, condition: Any) -> Any:
    """``found`` or the condition, as uint32: numba's own ``|`` would be of 64 bits, and halve the lanes of a vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.or_(arguments[0], builder.zext(arguments[1], ir.IntType(32)))

    return types.uint32(types.uint32, types.boolean), generate


def _steps(first: int, steps: list[int]) -> Any:
    """IR of ``first`` + the steps whose bound is not above a value, as float32 (exact: small integers)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        real = ir.FloatType()
        total = ir.Constant(real, float(first))
        for bound, step in zip(BOUNDS, steps, strict=True):
            below = builder.fcmp_ordered("<", arguments[0], ir.Constant(real, bound))
            total = builder.fadd(total, builder.select(below, ir.Constant(real, 0.0), ir.Constant(real, float(step))))
        return total

    return generate


@_inline
def _level(typing: Any, value: Any) -> Any:
    """The level nearest to a float32, as float32."""
    return types.float32(types.float32), _steps(LEVELS[0], [high - low for low, high in pairwise(LEVELS)])


@_inline
def _level_code(typing: Any, value: Any) -> Any:
    """The code of the level nearest to a float32, as float32."""
    return types.float32(types.float32), _steps(0, [1] * 15)


@_jit
def to_half(value: np.float32) -> np.int64:
    """The bits of the float16 nearest to a float32, ties to even; too large gives infinity."""
    bits = np.int64(_bits(value))
    size = bits & 0x7FFFFFFF
    if 0x38800000 <= size < 0x47800000:  # a normal float16, or one that rounds to infinity
        return ((bits >> 16) & 0x8000) | ((size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13)
    sign, exponent, mantissa = (bits >> 16) & 0x8000, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if exponent == 255:
        return sign | np.int64(0x7E00 if mantissa != 0 else 0x7C00)
    exponent -= 112
    if exponent >= 31:
        return sign | np.int64(0x7C00)
    if exponent < -10:
        return sign
    if exponent <= 0:
        mantissa |= 0x800000
        shift = 14 - exponent
        exponent = np.int64(0)
    else:
        shift = np.int64(13)
    half = (exponent << 10) + (mantissa >> shift)
    rest, middle = mantissa & ((1 << shift) - 1), 1 << (shift - 1)
    if rest > middle or (rest == middle and half & 1 == 1):
        half += 1
    return sign | half


@_jit
def from_half(half: np.int64) -> np.float32:
    """The float32 of a float16's bits."""
    sign, exponent, mantissa = (half & 0x8000) << 16, (half >> 10) & 31, half & 0x3FF
    if exponent == 0:
        size = np.float32(mantissa) * np.float32(2.0**-24)
        return -size if sign != 0 else size
    wide = np.int64(255) if exponent == 31 else exponent + 112
    value: np.float32 = _float(np.uint32(sign | (wide << 23) | (mantissa << 13)))
    return value


@_jit
def halves(values: Floats, out: np.ndarray[Any, np.dtype[np.uint16]], back: Floats) -> None:
    """``to_half`` of every value, and ``from_half`` of that."""
    for i in range(values.size):
        half = to_half(values[i])
        out[i] = half
        back[i] = from_half(half)


@_jit
def _put_half(out: Bytes, offset: int, value: np.float32) -> np.float32:
    """Store a float16, little-endian; return what was stored."""
    half = to_half(value)
    out[offset] = half & 255
    out[offset + 1] = half >> 8
    return from_half(half)


@_jit
def _inverse(value: np.float32) -> np.float32:
    return ONE / value if value != ZERO else ZERO


@_jit
def first_not_finite(values: Floats) -> int:
    """The first block with a value that is not finite, -1 if there is none."""
    for b in range(values.shape[0]):
        worst = np.uint32(0)
        for i in range(values.shape[1]):
            worst = max(worst, np.uint32(_bits(values[b, i]) & np.uint32(0x7FFFFFFF)))
        if worst >= 0x7F800000:
            return b
    return -1


@_jit
def first_infinite(out: Bytes, offset: int) -> int:
    """The first block whose float16 at ``offset`` is not finite, -1 if there is none."""
    for b in range(out.shape[0]):
        if out[b, offset + 1] & 0x7C == 0x7C:
            return b
    return -1


@_jit
def _gather(values: Floats, first: int, count: int, size: int, x: Floats) -> int:
    """Sub-blocks of ``size`` of the blocks ``first``..``first + count`` into the lanes of ``x`` [size, lane]; the number of lanes."""
    parts = int(values.shape[1]) // size
    for b in range(count):
        for s in range(parts):
            for i in range(size):
                x[i, b * parts + s] = values[first + b, s * size + i]
    return count * parts


@_jit
def _square_sum(x: Floats) -> np.float32:
    total = ZERO
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@_jit
def _weigh(
    values: Floats, importance: Floats, first: int, count: int, size: int, factor: np.float32, divisor: np.float32, w: Floats
) -> None:
    """``w`` [size, lane] = importance * sqrt(factor * sum of x^2 over the block / divisor + x^2)."""
    parts = values.shape[1] // size
    for b in range(count):
        block = values[first + b]
        weights = importance[(first + b) % importance.shape[0]]
        spread = factor * _square_sum(block) / divisor
        for s in range(parts):
            for i in range(size):
                value = block[s * size + i]
                w[i, b * parts + s] = weights[s * size + i] * np.sqrt(spread + value * value)


@_jit
def _weigh_plain(x: Floats, lanes: int, w: Floats, work: Floats) -> None:
    """``w`` [element, lane] = root of the mean square of the lane + |x| (Q4_K and Q5_K without importance)."""
    size = x.shape[0]
    root = work[0]
    for j in range(lanes):
        root[j] = ZERO
    for i in range(size):
        for j in range(lanes):
            root[j] += x[i, j] * x[i, j]
    for j in range(lanes):
        root[j] = np.sqrt(root[j] / np.float32(size))
    for i in range(size):
        for j in range(lanes):
            w[i, j] = root[j] + abs(x[i, j])


@_jit
def _lane_sums(w: Floats, lanes: int, total: Floats) -> None:
    for j in range(lanes):
        total[j] = ZERO
    for i in range(w.shape[0]):
        for j in range(lanes):
            total[j] += w[i, j]


@_jit
def _scale_min_search(
    x: Floats, w: Floats, lanes: int, top: int, start: np.float32, step: np.float32, steps: int, absolute: bool, work: Floats, codes: Floats
) -> None:
    """x ~ scale * code - low, codes 0..top: grids around each lane's range, a least-squares fit to each, the least weighted error kept.

    ``x``, ``w``, ``codes`` (filled) [element, lane]; ``work`` [16, lane]: row 0 gets the scales, row 1 the lows (not negative).
    ``absolute`` weighs |error| instead of its square.
    """
    size = x.shape[0]
    nmax, high, low = np.float32(top), np.int32(top), np.int32(0)
    scale, least, most, best, ratio, base = work[0], work[1], work[2], work[3], work[4], work[5]
    sum_w, sum_x, r, a, b, c = work[6], work[7], work[8], work[9], work[10], work[11]
    new_scale, new_least, error = work[12], work[13], work[14]
    for j in range(lanes):
        least[j] = x[0, j]
        most[j] = x[0, j]
        sum_w[j] = w[0, j]
        sum_x[j] = w[0, j] * x[0, j]
    for i in range(1, size):
        for j in range(lanes):
            value = x[i, j]
            least[j] = value if value < least[j] else least[j]
            most[j] = value if value > most[j] else most[j]
            sum_w[j] += w[i, j]
            sum_x[j] += w[i, j] * value
    for j in range(lanes):
        least[j] = ZERO if least[j] > ZERO else least[j]
        flat = most[j] == least[j]
        ratio[j] = ZERO if flat else nmax / (most[j] - least[j])
        scale[j] = ZERO if flat else ONE / ratio[j]
        base[j] = least[j]
        error[j] = ZERO
    for i in range(size):
        for j in range(lanes):
            code = _nearest(ratio[j] * (x[i, j] - least[j]), low, high)
            miss = scale[j] * code + least[j] - x[i, j]
            error[j] += w[i, j] * (abs(miss) if absolute else miss * miss)
    for j in range(lanes):
        best[j] = -INFINITE if most[j] == least[j] else error[j]
    for k in range(steps + 1):
        numerator = (start + step * np.float32(k)) + nmax
        for j in range(lanes):
            r[j] = numerator / (most[j] - least[j])
            a[j] = ZERO
            b[j] = ZERO
            c[j] = ZERO
            error[j] = ZERO
        for i in range(size):
            for j in range(lanes):
                code = _nearest(r[j] * (x[i, j] - least[j]), low, high)
                codes[i, j] = code
                weighted = w[i, j] * code
                a[j] += weighted
                b[j] += weighted * code
                c[j] += weighted * x[i, j]
        for j in range(lanes):
            d = sum_w[j] * b[j] - a[j] * a[j]
            fit = (sum_w[j] * c[j] - sum_x[j] * a[j]) / d
            bottom = (b[j] * sum_x[j] - a[j] * c[j]) / d
            above = bottom > ZERO
            new_scale[j] = c[j] / b[j] if above else fit
            new_least[j] = ZERO if above else bottom
            a[j] = d
        for i in range(size):
            for j in range(lanes):
                miss = new_scale[j] * codes[i, j] + new_least[j] - x[i, j]
                error[j] += w[i, j] * (abs(miss) if absolute else miss * miss)
        for j in range(lanes):
            better = (a[j] > ZERO) & (error[j] < best[j])
            ratio[j] = _choose(better, r[j], ratio[j])
            base[j] = _choose(better, least[j], base[j])
            scale[j] = _choose(better, new_scale[j], scale[j])
            least[j] = _choose(better, new_least[j], least[j])
            best[j] = _choose(better, error[j], best[j])
    for i in range(size):
        for j in range(lanes):
            codes[i, j] = _nearest(ratio[j] * (x[i, j] - base[j]), low, high)
    for j in range(lanes):
        least[j] = -least[j]


@_jit
def _peaks(x: Floats, lanes: int, size: Floats, peak: Floats) -> None:
    """Of each lane of ``x`` [element, lane]: the largest magnitude and the first value that has it."""
    for j in range(lanes):
        size[j] = ZERO
        peak[j] = ZERO
    for i in range(x.shape[0]):
        for j in range(lanes):
            value = x[i, j]
            larger = abs(value) > size[j]
            size[j] = abs(value) if larger else size[j]
            peak[j] = value if larger else peak[j]


@_jit
def _symmetric_search(x: Floats, w: Floats, squares: bool, lanes: int, top: int, work: Floats, codes: Floats) -> None:
    """x ~ scale * (code - top), codes 0..2 top - 1: the grid whose least-squares fit explains most.

    ``squares``: the weights are x^2, ``w`` is not read. ``x``, ``w``, ``codes`` (filled) [element, lane]; ``work`` [16, lane]: row 0 gets
    the scales.
    """
    nmax, low, high = np.float32(top), np.int32(-top), np.int32(top - 1)
    scale, size, peak, best, ratio, r, p, q = work[0], work[1], work[2], work[3], work[4], work[5], work[6], work[7]
    _peaks(x, lanes, size, peak)
    for t in range(-10, 10):  # -10 is the first guess, 0 would repeat it
        if t == 0:
            continue
        numerator = -nmax if t == -10 else -(nmax + TENTH * np.float32(t))
        for j in range(lanes):
            r[j] = numerator / peak[j]
            p[j] = ZERO
            q[j] = ZERO
        for i in range(x.shape[0]):
            for j in range(lanes):
                value = x[i, j]
                code = _nearest(r[j] * value, low, high)
                weight = value * value if squares else w[i, j]
                p[j] += weight * value * code
                q[j] += weight * code * code
        if t == -10:
            for j in range(lanes):
                ratio[j] = r[j]
                scale[j] = p[j] / q[j] if q[j] != ZERO else ZERO
                best[j] = scale[j] * p[j]
        else:
            for j in range(lanes):
                better = (q[j] > ZERO) & (p[j] * p[j] > best[j] * q[j])
                ratio[j] = _choose(better, r[j], ratio[j])
                scale[j] = _choose(better, p[j] / q[j], scale[j])
                best[j] = _choose(better, scale[j] * p[j], best[j])
    for i in range(x.shape[0]):
        for j in range(lanes):
            codes[i, j] = ZERO if size[j] < TINY else _nearest(ratio[j] * x[i, j], low, high) + nmax
    for j in range(lanes):
        scale[j] = ZERO if size[j] < TINY else scale[j]


@_jit
def _refine_search(x: Floats, lanes: int, top: int, work: Floats, codes: Floats) -> None:
    """x ~ scale * (code - top), codes 0..2 top - 1, weights x^2: five sweeps that move one code at a time where that explains more.

    They end, as ggml's do, after a sweep that moves nothing; in a lane where that is so earlier the next ones move nothing either.
    ``x``, ``codes`` (filled) [element, lane]; ``work`` [16, lane]: row 0 gets the scales.
    """
    nmax, low, high = np.float32(top), np.int32(-top), np.int32(top - 1)
    scale, size, peak, p, q, r = work[0], work[1], work[2], work[3], work[4], work[5]
    _peaks(x, lanes, size, peak)
    for j in range(lanes):
        r[j] = -nmax / peak[j]
        p[j] = ZERO
        q[j] = ZERO
    for i in range(x.shape[0]):
        for j in range(lanes):
            value = x[i, j]
            weight = value * value
            code = _nearest(r[j] * value, low, high)
            codes[i, j] = code
            p[j] += weight * value * code
            q[j] += weight * code * code
    for _ in range(5):
        moved = np.uint32(0)
        for i in range(x.shape[0]):
            for j in range(lanes):
                value = x[i, j]
                weight = value * value
                old = codes[i, j]
                without_p = p[j] - weight * value * old
                without_q = q[j] - weight * old * old
                code = _nearest(value * without_q / without_p, low, high)
                new_p = without_p + weight * value * code
                new_q = without_q + weight * code * code
                better = (without_p > ZERO) & (code != old) & (new_q > ZERO) & (new_p * new_p * q[j] > p[j] * p[j] * new_q)
                codes[i, j] = _choose(better, code, old)
                p[j] = _choose(better, new_p, p[j])
                q[j] = _choose(better, new_q, q[j])
                moved = _either(moved, better)
        if moved == 0:
            break
    for j in range(lanes):
        scale[j] = p[j] / q[j] if (q[j] > ZERO) & (size[j] >= TINY) else ZERO
    for i in range(x.shape[0]):
        for j in range(lanes):
            codes[i, j] = ZERO if size[j] < TINY else codes[i, j] + nmax


@_jit
def _positive_search(x: Floats, w: Floats, top: int, codes: Floats) -> np.float32:
    """x ~ scale * code, codes 0..top, for a block's own scales or lows; fills ``codes``, returns the scale."""
    nmax, high = np.float32(top), np.int32(top)
    most = ZERO
    for i in range(x.size):
        most = x[i] if x[i] > most else most
    if most < TINY:
        for i in range(x.size):
            codes[i] = ZERO
        return ZERO
    ratio = nmax / most
    best = ZERO
    for t in range(-5, 5):  # -5 is the first guess, 0 would repeat it
        if t == 0:
            continue
        r = ratio if t == -5 else (TENTH * np.float32(t) + nmax) / most
        scale = ONE / r
        error = ZERO
        for i in range(x.size):
            miss = x[i] - scale * _nearest(r * x[i], LOWEST, HIGHEST if t == -5 else high)
            error += w[i] * miss * miss
        if t == -5:
            best = error
        elif error < best:
            best = error
            ratio = r
    p = ZERO
    q = ZERO
    for i in range(x.size):
        codes[i] = _nearest(ratio * x[i], LOWEST, high)
        p += w[i] * x[i] * codes[i]
        q += w[i] * codes[i] * codes[i]
    for _ in range(5):  # sweeps that move one code at a time where that explains more
        changed = False
        for i in range(x.size):
            without_p = p - w[i] * x[i] * codes[i]
            without_q = q - w[i] * codes[i] * codes[i]
            if without_p > ZERO and without_q > ZERO:
                code = _nearest(x[i] * without_q / without_p, LOWEST, high)
                if code != codes[i]:
                    without_p += w[i] * x[i] * code
                    without_q += w[i] * code * code
                    if without_p * without_p * q > p * p * without_q:
                        codes[i] = code
                        p = without_p
                        q = without_q
                        changed = True
        if not changed:
            break
    return p / q if q > ZERO else ZERO


@_jit
def _top_scale(x: Floats, top: int, codes: Floats) -> np.float32:
    """Codes 0..top of a block's scales or lows by its largest; returns the scale before rounding."""
    nmax = np.float32(top)
    most = ZERO
    for i in range(x.size):
        most = x[i] if x[i] > most else most
    if not most > ZERO:
        for i in range(x.size):
            codes[i] = ZERO
        return ZERO
    ratio = nmax / most
    for i in range(x.size):
        codes[i] = _nearest(ratio * x[i], LOWEST, np.int32(top))
    return most / nmax


@_jit
def _peak_of(x: Floats) -> np.float32:
    peak = ZERO
    for i in range(x.size):
        if abs(x[i]) > abs(peak):
            peak = x[i]
    return peak


@_jit
def _checked(scale: np.float32, parts: Floats) -> np.float32:
    """The scale of a block, infinite if the search overflowed in one of its parts: the caller refuses what has no float16."""
    for i in range(parts.size):
        if not abs(parts[i]) < INFINITE:
            return INFINITE
    return scale


@_jit
def encode_legacy(values: Floats, importance: Floats, out: Bytes, five: bool, affine: bool) -> None:
    """Q4_0, Q4_1 (``affine``), Q5_0 (``five``), Q5_1 (both) with importance; ``rounded`` has them without."""
    top = (31 if affine else 16) if five else (15 if affine else 8)
    blocks = values.shape[0]
    codes = np.empty((32, LANES), np.float32)
    scales, lows = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    x, w, work = np.empty((32, LANES), np.float32), np.empty((32, LANES), np.float32), np.empty((16, LANES), np.float32)
    columns = importance.shape[0] * 32
    spread = ZERO
    for first in range(0, blocks, LANES):
        lanes = min(LANES, blocks - first)
        _gather(values, first, lanes, 32, x)
        for j in range(lanes):
            part = (first + j) % importance.shape[0]
            if part == 0:  # a new row: its mean square
                spread = _square_sum(values[first + j : first + j + importance.shape[0]].reshape(columns)) / np.float32(columns)
            for i in range(32):
                w[i, j] = importance[part, i] * np.sqrt(spread + x[i, j] * x[i, j])
        if affine:
            _scale_min_search(x, w, lanes, top, np.float32(-0.9), np.float32(0.05), 36, False, work, codes)
            for j in range(lanes):
                scales[j] = work[0, j]
                lows[j] = -work[1, j]
        else:
            _symmetric_search(x, w, False, lanes, top, work, codes)
            for j in range(lanes):
                scales[j] = work[0, j]
        for j in range(lanes):
            block_out = out[first + j]
            _put_half(block_out, 0, scales[j])
            at = 2
            if affine:
                _put_half(block_out, 2, lows[j])
                at = 4
            if five:
                for k in range(4):
                    byte = np.int64(0)
                    for i in range(8):
                        byte |= (np.int64(codes[8 * k + i, j]) >> 4) << i
                    block_out[at + k] = byte
                at += 4
            for i in range(16):
                block_out[at + i] = (np.int64(codes[i, j]) & 15) | ((np.int64(codes[i + 16, j]) & 15) << 4)


@_jit
def _recode(
    block: Floats, start: int, size: int, scale: np.float32, low: np.float32, floor: int, top: int, found: Floats, lane: int, codes: Bytes
) -> None:
    """Codes of block[start:start + size] by the stored scale and low, as code - floor; with a zero scale those that the search found."""
    if scale == ZERO:
        for i in range(size):
            codes[start + i] = np.uint8(found[i, lane])
        return
    least, most = np.int32(floor), np.int32(top)
    for i in range(start, start + size):
        codes[i] = np.uint8(np.int32(_nearest((block[i] + low) / scale, least, most)) - floor)


@_jit
def _put_crumbs(codes: Bytes, out: Bytes) -> None:
    """Low two bits of 256 codes into 64 bytes: byte 32a + l holds elements 128a + 32s + l at bit 2s."""
    for a in range(2):
        for i in range(32):
            e = 128 * a + i
            out[32 * a + i] = (codes[e] & 3) | ((codes[e + 32] & 3) << 2) | ((codes[e + 64] & 3) << 4) | ((codes[e + 96] & 3) << 6)


@_jit
def encode_min(values: Floats, importance: Floats, out: Bytes, bits: int) -> None:
    """Q2_K (2 ``bits``), Q4_K (4) and Q5_K (5): codes from 0, a scale and a low for each sub-block, themselves codes of a float16 each."""
    size = 16 if bits == 2 else 32
    parts = 256 // size
    top, part_top = (1 << bits) - 1, 15 if bits == 2 else 63
    weighed = importance.shape[0] > 0
    steps = 36 if weighed else (20 if bits == 4 else 15)
    start = np.float32(-0.9) if weighed else np.float32(-1.0 if bits == 4 else -0.5)
    step = np.float32(0.05) if weighed else TENTH
    x, w, found = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    work, sums = np.empty((16, LANES), np.float32), np.empty(LANES, np.float32)
    scales, lows = np.empty(parts, np.float32), np.empty(parts, np.float32)
    codes = np.empty(256, np.uint8)
    many = LANES // parts
    for first in range(0, values.shape[0], many):
        count = min(many, values.shape[0] - first)
        lanes = _gather(values, first, count, size, x)
        if weighed:
            _weigh(values, importance, first, count, size, ONE if bits == 2 else TWO, np.float32(256), w)
            _lane_sums(w, lanes, sums)
        elif bits == 2:
            for i in range(size):
                for j in range(lanes):
                    w[i, j] = abs(x[i, j])
        else:
            _weigh_plain(x, lanes, w, work)
        _scale_min_search(x, w, lanes, top, start, step, steps, bits == 2 and not weighed, work, found)
        for b in range(count):
            lane, block, block_out = b * parts, values[first + b], out[first + b]
            own = slice(lane, lane + parts)
            if weighed:
                scale = _positive_search(work[0, own], sums[own], part_top, scales)
                low = _positive_search(work[1, own], sums[own], part_top, lows)
            else:
                scale = _top_scale(work[0, own], part_top, scales)
                low = _top_scale(work[1, own], part_top, lows)
            at = 80 if bits == 2 else 0
            scale = _put_half(block_out, at, _checked(scale, work[0, own]))
            low = _put_half(block_out, at + 2, _checked(low, work[1, own]))
            for s in range(parts):
                _recode(block, s * size, size, scale * scales[s], low * lows[s], 0, top, found, lane + s, codes)
            if bits == 2:
                for s in range(parts):
                    block_out[s] = np.int64(scales[s]) | (np.int64(lows[s]) << 4)
                _put_crumbs(codes, block_out[16:80])
                continue
            for s in range(4):
                upper, upper_low = np.int64(scales[s + 4]), np.int64(lows[s + 4])
                block_out[4 + s] = np.int64(scales[s]) | ((upper >> 4) << 6)
                block_out[8 + s] = np.int64(lows[s]) | ((upper_low >> 4) << 6)
                block_out[12 + s] = (upper & 15) | ((upper_low & 15) << 4)
            at = 16
            if bits == 5:
                for i in range(32):
                    byte = np.int64(0)
                    for s in range(8):
                        byte |= (np.int64(codes[32 * s + i]) >> 4) << s
                    block_out[16 + i] = byte
                at = 48
            for g in range(4):
                for i in range(32):
                    block_out[at + 32 * g + i] = (codes[64 * g + i] & 15) | ((codes[64 * g + 32 + i] & 15) << 4)


@_jit
def encode_q3_k(values: Floats, importance: Floats, out: Bytes) -> None:
    """Q3_K: codes -4..3 in two bits and a bit of a mask, 16 signed six-bit scales."""
    weighed = importance.shape[0] > 0
    x, w, found = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    work, sums = np.empty((16, LANES), np.float32), np.empty(LANES, np.float32)
    part_x, part_w = np.empty((16, 4), np.float32), np.empty((16, 4), np.float32)
    part_work, part_codes = np.empty((16, 4), np.float32), np.empty((16, 4), np.float32)
    codes = np.empty(256, np.uint8)
    for first in range(0, values.shape[0], 4):
        count = min(4, values.shape[0] - first)
        lanes = _gather(values, first, count, 16, x)
        if weighed:
            _weigh(values, importance, first, count, 16, TWO, np.float32(256), w)
            _lane_sums(w, lanes, sums)
            _symmetric_search(x, w, False, lanes, 4, work, found)
        else:
            _refine_search(x, lanes, 4, work, found)
        for j in range(lanes):
            part_x[j % 16, j // 16] = work[0, j]
        if weighed:
            for j in range(lanes):
                part_w[j % 16, j // 16] = sums[j]
            _symmetric_search(part_x, part_w, False, count, 32, part_work, part_codes)
        for b in range(count):
            block, block_out = values[first + b], out[first + b]
            if weighed:
                scale = part_work[0, b]
            else:
                peak = _peak_of(part_x[:, b])
                if peak == ZERO:
                    scale = ZERO
                    part_codes[:, b] = ZERO
                else:
                    ratio = np.float32(-32) / peak
                    scale = ONE / ratio
                    for s in range(16):
                        part_codes[s, b] = _nearest(ratio * part_x[s, b], np.int32(-32), np.int32(31)) + np.float32(32)
            scale = _put_half(block_out, 108, _checked(scale, part_x[:, b]))
            for s in range(16):
                _recode(block, s * 16, 16, scale * (part_codes[s, b] - np.float32(32)), ZERO, -4, 3, found, b * 16 + s, codes)
            for i in range(32):
                byte = np.int64(0)
                for s in range(8):
                    byte |= (np.int64(codes[32 * s + i]) >> 2) << s
                block_out[i] = byte
            _put_crumbs(codes, block_out[32:96])
            for s in range(8):
                block_out[96 + s] = (np.int64(part_codes[s, b]) & 15) | ((np.int64(part_codes[s + 8, b]) & 15) << 4)
            for s in range(4):
                byte = np.int64(0)
                for k in range(4):
                    byte |= (np.int64(part_codes[s + 4 * k, b]) >> 4) << (2 * k)
                block_out[104 + s] = byte


@_jit
def encode_q6_k(values: Floats, importance: Floats, out: Bytes) -> None:
    """Q6_K: codes -32..31, 16 int8 scales. The weights are the importance itself."""
    weighed = importance.shape[0] > 0
    x, w, found = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    work = np.empty((16, LANES), np.float32)
    codes = np.empty(256, np.uint8)
    for first in range(0, values.shape[0], 4):
        count = min(4, values.shape[0] - first)
        lanes = _gather(values, first, count, 16, x)
        if weighed:
            for b in range(count):
                weights = importance[(first + b) % importance.shape[0]]
                for e in range(256):
                    w[e % 16, b * 16 + e // 16] = weights[e]
        _symmetric_search(x, w, not weighed, lanes, 32, work, found)
        for b in range(count):
            lane, block, block_out = b * 16, values[first + b], out[first + b]
            scales = work[0, lane : lane + 16]
            peak = _peak_of(scales)
            if _checked(abs(peak), scales) < TINY:
                block_out[:] = 0
                continue
            ratio = np.float32(-128) / peak
            scale = _put_half(block_out, 208, _checked(ONE / ratio, scales))
            for s in range(16):
                part = _nearest(ratio * scales[s], LOWEST, np.int32(127))
                block_out[192 + s] = np.int64(part) & 255
                _recode(block, s * 16, 16, scale * part, ZERO, -32, 31, found, lane + s, codes)
            for a in range(2):
                for i in range(64):
                    block_out[64 * a + i] = (codes[128 * a + i] & 15) | ((codes[128 * a + 64 + i] & 15) << 4)
                for i in range(32):
                    e = 128 * a + i
                    block_out[128 + 32 * a + i] = (
                        (codes[e] >> 4) | ((codes[e + 32] >> 4) << 2) | ((codes[e + 64] >> 4) << 4) | ((codes[e + 96] >> 4) << 6)
                    )


@_jit
def _level_search(x: Floats, w: Floats, lanes: int, work: Floats) -> None:
    """x ~ scale * level: the grid whose least-squares fit explains most.

    ``x``, ``w`` [element, lane]; ``work`` [16, lane]: row 0 gets the scales.
    """
    scale, size, peak, best, r, p, q = work[0], work[1], work[2], work[3], work[4], work[5], work[6]
    _peaks(x, lanes, size, peak)
    for t in range(-8, 8):  # -8 is the first guess
        for j in range(lanes):
            r[j] = ONE / (-peak[j] / LEVEL_0) if t == -8 else (np.float32(t) + LEVEL_0) / peak[j]
            p[j] = ZERO
            q[j] = ZERO
        for i in range(x.shape[0]):
            for j in range(lanes):
                level = _level(r[j] * x[i, j])
                weighted = w[i, j] * level
                p[j] += weighted * x[i, j]
                q[j] += weighted * level
        for j in range(lanes):
            better = (q[j] > ZERO) & ((t == -8) | (p[j] * p[j] > best[j] * q[j]))
            scale[j] = _choose(better, p[j] / q[j], (ZERO if t == -8 else scale[j]))
            best[j] = scale[j] * p[j] if (better | (t == -8)) else best[j]
    for j in range(lanes):
        scale[j] = ZERO if size[j] < TINY else scale[j]


@_jit
def encode_iq4(values: Floats, importance: Floats, out: Bytes) -> None:
    """IQ4_NL (blocks of 32) and IQ4_XS (of 256, with eight six-bit scales): codes of sixteen uneven levels."""
    weighed = importance.shape[0] > 0
    size = values.shape[1]
    parts = size // 32
    x, w = np.empty((32, LANES), np.float32), np.empty((32, LANES), np.float32)
    work = np.empty((16, LANES), np.float32)
    many = LANES // parts
    for first in range(0, values.shape[0], many):
        count = min(many, values.shape[0] - first)
        lanes = _gather(values, first, count, 32, x)
        if weighed:
            # 2 / size is a power of two: a product with it, as ggml has it, is this division by size / 2
            _weigh(values, importance, first, count, 32, ONE, np.float32(size // 2), w)
        else:
            for i in range(32):
                for j in range(lanes):
                    w[i, j] = x[i, j] * x[i, j]
        _level_search(x, w, lanes, work)
        for b in range(count):
            block, block_out = values[first + b], out[first + b]
            if parts == 1:
                _put_half(block_out, 0, work[0, b])
                inverse = _inverse(work[0, b])
                for i in range(16):
                    block_out[2 + i] = np.int64(_level_code(inverse * block[i])) | (np.int64(_level_code(inverse * block[i + 16])) << 4)
                continue
            scales = work[0, b * 8 : b * 8 + 8]
            scale = -_peak_of(scales) / np.float32(32)
            _put_half(block_out, 0, _checked(scale, scales))
            ratio = _inverse(scale)
            upper = np.int64(0)
            block_out[4:8] = 0
            for s in range(8):
                part = _nearest(ratio * scales[s], np.int32(-32), np.int32(31))
                inverse = _inverse(scale * part)
                for i in range(16):
                    low, high = _level_code(inverse * block[32 * s + i]), _level_code(inverse * block[32 * s + 16 + i])
                    block_out[8 + 16 * s + i] = np.int64(low) | (np.int64(high) << 4)
                stored = np.int64(part) + 32
                block_out[4 + s // 2] |= (stored & 15) << (4 * (s % 2))
                upper |= (stored >> 4) << (2 * s)
            block_out[2] = upper & 255
            block_out[3] = upper >> 8
