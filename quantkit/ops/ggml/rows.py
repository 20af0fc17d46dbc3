"""Compiled readers of ggml's blocks on a CPU: rows of blocks times activations, or rows as float32 (``linear`` is the front).

Decoding is the float32 operations of ``gguf.md`` 2 in their order, none fused, so ``values`` are the bits of ``decode``. A dot product
may be summed in any order. Every function of ``READERS`` takes ``blocks`` uint8 [N, blocks, bytes], ``x`` float32 [T, blocks, elements],
``out`` float32 [T, N], ``values`` float32 [N, blocks, elements] or of no rows, and a range of rows: it fills ``values`` where there are
rows, and ``out`` for every token. Importing this module imports numba; a function is compiled when it is first called, and what was
compiled is kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

from quantkit.ops.ggml.kernels import LEVELS, from_half

_F = TypeVar("_F", bound=Callable[..., Any])
Floats = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Reader = Callable[[Bytes, Floats, Floats, Floats, int, int], None]
TABLE = np.array(LEVELS, dtype=np.float32)


def _jit(function: _F) -> _F:
    return cast(_F, njit(cache=True, nogil=True, error_model="numpy")(function))


def _summing(function: _F) -> _F:
    return cast(_F, njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})(function))


@_jit
def _half(b: Bytes, at: int) -> np.float32:
    return from_half(np.int64(b[at]) | (np.int64(b[at + 1]) << 8))


@_summing
def _dot(row: Floats, x: Floats) -> np.float32:
    total = np.float32(0)
    for k in range(row.size):
        total += row[k] * x[k]
    return total


@_jit
def _dots(row: Floats, x: Floats, out: Floats, n: int) -> None:
    for t in range(x.shape[0]):
        out[t, n] = _dot(row.reshape(-1), x[t].reshape(-1))


@_jit
def _block_q4_0(b: Bytes, out: Floats) -> None:
    d = _half(b, 0)
    for j in range(16):
        q = b[2 + j]
        out[j] = d * np.float32(np.int32(q & 15) - 8)
        out[16 + j] = d * np.float32(np.int32(q >> 4) - 8)


@_jit
def _block_q4_1(b: Bytes, out: Floats) -> None:
    d, m = _half(b, 0), _half(b, 2)
    for j in range(16):
        q = b[4 + j]
        out[j] = d * np.float32(q & 15) + m
        out[16 + j] = d * np.float32(q >> 4) + m


@_jit
def _block_q5_0(b: Bytes, out: Floats) -> None:
    d = _half(b, 0)
    bits = _word(b, 2)
    for j in range(16):
        q = b[6 + j]
        out[j] = d * np.float32(np.int32((q & 15) | (((bits >> j) & 1) << 4)) - 16)
        out[16 + j] = d * np.float32(np.int32((q >> 4) | (((bits >> (j + 16)) & 1) << 4)) - 16)


@_jit
def _block_q5_1(b: Bytes, out: Floats) -> None:
    d, m = _half(b, 0), _half(b, 2)
    bits = _word(b, 4)
    for j in range(16):
        q = b[8 + j]
        out[j] = d * np.float32((q & 15) | (((bits >> j) & 1) << 4)) + m
        out[16 + j] = d * np.float32((q >> 4) | (((bits >> (j + 16)) & 1) << 4)) + m


@_jit
def _word(b: Bytes, at: int) -> np.uint32:
    return np.uint32(np.int64(b[at]) | (np.int64(b[at + 1]) << 8) | (np.int64(b[at + 2]) << 16) | (np.int64(b[at + 3]) << 24))


@_jit
def _block_q8_0(b: Bytes, out: Floats) -> None:
    d = _half(b, 0)
    for j in range(32):
        out[j] = d * np.float32(np.int8(b[2 + j]))


@_jit
def _block_iq4_nl(b: Bytes, out: Floats) -> None:
    d = _half(b, 0)
    for j in range(16):
        q = b[2 + j]
        out[j] = d * TABLE[q & 15]
        out[16 + j] = d * TABLE[q >> 4]


@_jit
def _block_q2_k(b: Bytes, out: Floats) -> None:
    d, least = _half(b, 80), _half(b, 82)
    for j in range(4):  # 16 bytes, whose four codes lie 32 elements apart: sub-block 8 * (j // 2) + 2 * s + j % 2 for s of 0 to 3
        sub, qs, to = 8 * (j >> 1) + (j & 1), 16 + 16 * j, 128 * (j >> 1) + 16 * (j & 1)
        scale_0, low_0 = d * np.float32(b[sub] & 15), least * np.float32(b[sub] >> 4)
        scale_1, low_1 = d * np.float32(b[sub + 2] & 15), least * np.float32(b[sub + 2] >> 4)
        scale_2, low_2 = d * np.float32(b[sub + 4] & 15), least * np.float32(b[sub + 4] >> 4)
        scale_3, low_3 = d * np.float32(b[sub + 6] & 15), least * np.float32(b[sub + 6] >> 4)
        for k in range(16):
            q = b[qs + k]
            out[to + k] = scale_0 * np.float32(q & 3) - low_0
            out[to + 32 + k] = scale_1 * np.float32((q >> 2) & 3) - low_1
            out[to + 64 + k] = scale_2 * np.float32((q >> 4) & 3) - low_2
            out[to + 96 + k] = scale_3 * np.float32(q >> 6) - low_3


@_jit
def _scale_q3_k(b: Bytes, j: int) -> np.float32:
    low = np.int64(b[96 + (j & 7)] >> (4 * (j >> 3))) & 15
    high = np.int64(b[104 + (j & 3)] >> (2 * (j >> 2))) & 3
    return np.float32((low | (high << 4)) - 32)


@_jit
def _block_q3_k(b: Bytes, out: Floats) -> None:
    d = _half(b, 108)
    for j in range(4):  # as Q2_K; the third bit of code s is bit 4 * (j // 2) + s of the mask
        sub, qs, mask, bit = 8 * (j >> 1) + (j & 1), 32 + 16 * j, 16 * (j & 1), 4 * (j >> 1)
        to = 128 * (j >> 1) + mask
        scale_0, scale_1 = d * _scale_q3_k(b, sub), d * _scale_q3_k(b, sub + 2)
        scale_2, scale_3 = d * _scale_q3_k(b, sub + 4), d * _scale_q3_k(b, sub + 6)
        for k in range(16):
            q, m = np.int32(b[qs + k]), np.int32(b[mask + k]) >> bit
            out[to + k] = scale_0 * np.float32((q & 3) + ((m & 1) << 2) - 4)
            out[to + 32 + k] = scale_1 * np.float32(((q >> 2) & 3) + (((m >> 1) & 1) << 2) - 4)
            out[to + 64 + k] = scale_2 * np.float32(((q >> 4) & 3) + (((m >> 2) & 1) << 2) - 4)
            out[to + 96 + k] = scale_3 * np.float32((q >> 6) + (((m >> 3) & 1) << 2) - 4)


@_jit
def _scale_of(s: Bytes, at: int, j: int) -> np.float32:
    """Scale ``j`` in the 12 bytes at ``at`` of Q4_K and Q5_K."""
    if j < 4:
        return np.float32(s[at + j] & 63)
    return np.float32((s[at + j + 4] & 15) | ((s[at + j - 4] >> 6) << 4))


@_jit
def _min_of(s: Bytes, at: int, j: int) -> np.float32:
    if j < 4:
        return np.float32(s[at + j + 4] & 63)
    return np.float32((s[at + j + 4] >> 4) | ((s[at + j] >> 6) << 4))


@_jit
def _block_q4_k(b: Bytes, out: Floats) -> None:
    d, least = _half(b, 0), _half(b, 2)
    for g in range(4):
        low, low_min = d * _scale_of(b, 4, 2 * g), least * _min_of(b, 4, 2 * g)
        high, high_min = d * _scale_of(b, 4, 2 * g + 1), least * _min_of(b, 4, 2 * g + 1)
        first, to = 16 + 32 * g, 64 * g
        for k in range(32):
            q = b[first + k]
            out[to + k] = low * np.float32(q & 15) - low_min
            out[to + 32 + k] = high * np.float32(q >> 4) - high_min


@_jit
def _block_q5_k(b: Bytes, out: Floats) -> None:
    d, least = _half(b, 0), _half(b, 2)
    for g in range(4):
        low, low_min = d * _scale_of(b, 4, 2 * g), least * _min_of(b, 4, 2 * g)
        high, high_min = d * _scale_of(b, 4, 2 * g + 1), least * _min_of(b, 4, 2 * g + 1)
        first, to = 48 + 32 * g, 64 * g
        for k in range(32):
            q, fifth = b[first + k], b[16 + k] >> (2 * g)
            out[to + k] = low * np.float32((q & 15) | ((fifth & 1) << 4)) - low_min
            out[to + 32 + k] = high * np.float32((q >> 4) | (((fifth >> 1) & 1) << 4)) - high_min


@_jit
def _block_q6_k(b: Bytes, out: Floats) -> None:
    d = _half(b, 208)
    for j in range(4):  # 16 bytes of high bits, whose four codes lie 32 elements apart
        a, half = j >> 1, 16 * (j & 1)
        scale, low, high, to = 192 + 8 * a + (j & 1), 64 * a + half, 128 + 32 * a + half, 128 * a + half
        scale_0, scale_1 = d * np.float32(np.int8(b[scale])), d * np.float32(np.int8(b[scale + 2]))
        scale_2, scale_3 = d * np.float32(np.int8(b[scale + 4])), d * np.float32(np.int8(b[scale + 6]))
        for k in range(16):
            first, second, top = np.int32(b[low + k]), np.int32(b[low + 32 + k]), np.int32(b[high + k])
            out[to + k] = scale_0 * np.float32(((first & 15) | ((top & 3) << 4)) - 32)
            out[to + 32 + k] = scale_1 * np.float32(((second & 15) | (((top >> 2) & 3) << 4)) - 32)
            out[to + 64 + k] = scale_2 * np.float32(((first >> 4) | (((top >> 4) & 3) << 4)) - 32)
            out[to + 96 + k] = scale_3 * np.float32(((second >> 4) | ((top >> 6) << 4)) - 32)


@_jit
def _block_iq4_xs(b: Bytes, out: Floats) -> None:
    d, high = _half(b, 0), np.int64(b[2]) | (np.int64(b[3]) << 8)
    for s in range(8):
        low = np.int64(b[4 + (s >> 1)] >> (4 * (s & 1))) & 15
        scale = d * np.float32((low | (((high >> (2 * s)) & 3) << 4)) - 32)
        first, to = 8 + 16 * s, 32 * s
        for k in range(16):
            q = b[first + k]
            out[to + k] = scale * TABLE[q & 15]
            out[to + 16 + k] = scale * TABLE[q >> 4]


@_jit
def _read_q4_0(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_q4_0(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_q4_1(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_q4_1(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_q5_0(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_q5_0(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_q5_1(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_q5_1(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_q8_0(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_q8_0(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_iq4_nl(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_iq4_nl(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_q2_k(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_q2_k(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_q3_k(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_q3_k(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_q4_k(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_q4_k(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_q5_k(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_q5_k(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_q6_k(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_q6_k(blocks[n, i], into[i])
        _dots(row, x, out, n)


@_jit
def _read_iq4_xs(blocks: Bytes, x: Floats, out: Floats, values: Floats, first: int, last: int) -> None:
    row = np.empty(x.shape[1:], np.float32)
    for n in range(first, last):
        into = values[n] if values.shape[0] else row
        for i in range(blocks.shape[1]):
            _block_iq4_xs(blocks[n, i], into[i])
        _dots(row, x, out, n)


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "Q4_0": _read_q4_0,
        "Q4_1": _read_q4_1,
        "Q5_0": _read_q5_0,
        "Q5_1": _read_q5_1,
        "Q8_0": _read_q8_0,
        "IQ4_NL": _read_iq4_nl,
        "Q2_K": _read_q2_k,
        "Q3_K": _read_q3_k,
        "Q4_K": _read_q4_k,
        "Q5_K": _read_q5_k,
        "Q6_K": _read_q6_k,
        "IQ4_XS": _read_iq4_xs,
    }
)
