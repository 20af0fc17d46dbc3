"""ggml's blocks with their scales kept and other codes put in: what a method needs that chooses the codes itself.

The inverse of ``decode``: it knows where the codes of a block lie and how they are packed (``gguf.md`` 2). In torch, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.geometry import GGML_BLOCKS
from quantkit.ops.ggml.decode import affine

ZEROS: Mapping[str, int] = MappingProxyType(
    {"Q4_0": 8, "Q4_1": 0, "Q5_0": 16, "Q5_1": 0, "Q8_0": 128, "Q2_K": 0, "Q3_K": 4, "Q4_K": 0, "Q5_K": 0, "Q6_K": 32}
)
"""Kind -> the code that stands for 0. IQ4_NL and IQ4_XS are not here: their levels are not evenly spaced."""


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """``w = scale * (code - zero) + offset`` for codes 0 to 2^bits - 1: what a decoder computes, in this order.

    ``scales [N, G]`` float32, any sign or 0; ``offsets [N, G]`` float32, or None for none; a group is K / G consecutive weights.
    """

    scales: Tensor
    offsets: Tensor | None
    zero: int
    bits: int


def _blocks(data: Tensor, kind: str) -> Tensor:
    return data.reshape(-1, GGML_BLOCKS[kind].nbytes)


def grid(data: Tensor, kind: str) -> BlockGrid:
    """The grid of ``data [N, bytes]`` uint8, rows of blocks of a ``kind`` of ``ZEROS``."""
    _, scales, offsets = affine(_blocks(data, kind), kind)
    rows = data.shape[0]
    return BlockGrid(scales.reshape(rows, -1), None if offsets is None else offsets.reshape(rows, -1), ZEROS[kind], GGML_BLOCKS[kind].bits)


def codes(data: Tensor, kind: str) -> Tensor:
    """The codes of ``data [N, bytes]``: uint8 ``[N, K]``."""
    found, _, _ = affine(_blocks(data, kind), kind)
    return found.to(torch.int16).add_(ZEROS[kind]).to(torch.uint8).reshape(data.shape[0], -1)


def _nibbles(values: Tensor, run: int) -> Tensor:
    """Codes of four bits ``[B, 2n]`` -> bytes ``[B, n]``: of every ``2 * run``, the first half are the low nibbles."""
    pairs = values.reshape(values.shape[0], -1, 2, run)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(values.shape[0], -1)


def _shifted(values: Tensor, dim: int, step: int) -> Tensor:
    """The values along ``dim``, each ``step`` bits above the one before, in one byte: that dim goes."""
    out = values.select(dim, 0).clone()
    for place in range(1, values.shape[dim]):
        out |= values.select(dim, place) << (place * step)
    return out


def _pairs(values: Tensor) -> Tensor:
    """Codes of two bits ``[B, 128 a]`` -> bytes ``[B, 32 a]``: element 128 a + 32 s + l is bits 2 s of byte 32 a + l."""
    return _shifted(values.reshape(values.shape[0], -1, 4, 32), 2, 2).reshape(values.shape[0], -1)


def _bytes_of_bits(values: Tensor) -> Tensor:
    """Bits ``[B, 32]`` -> the four bytes of a little-endian word."""
    return _shifted(values.reshape(-1, 4, 8), 2, 1)


def _masks(values: Tensor) -> Tensor:
    """Bits ``[B, 256]`` -> 32 bytes: bit s of byte l is element 32 s + l."""
    return _shifted(values.reshape(-1, 8, 32), 1, 1)


Packed = tuple[tuple[int, Tensor], ...]
"""Bytes ``[B, n]`` by the offset in a block where they lie."""

_PACKERS: Mapping[str, Callable[[Tensor], Packed]] = MappingProxyType(
    {
        "Q4_0": lambda q: ((2, _nibbles(q, 16)),),
        "Q4_1": lambda q: ((4, _nibbles(q, 16)),),
        "Q5_0": lambda q: ((2, _bytes_of_bits(q >> 4)), (6, _nibbles(q & 15, 16))),
        "Q5_1": lambda q: ((4, _bytes_of_bits(q >> 4)), (8, _nibbles(q & 15, 16))),
        "Q8_0": lambda q: ((2, q ^ 128),),
        "Q2_K": lambda q: ((16, _pairs(q)),),
        "Q3_K": lambda q: ((0, _masks(q >> 2)), (32, _pairs(q & 3))),
        "Q4_K": lambda q: ((16, _nibbles(q, 32)),),
        "Q5_K": lambda q: ((16, _masks(q >> 4)), (48, _nibbles(q & 15, 32))),
        "Q6_K": lambda q: ((0, _nibbles(q & 15, 64)), (128, _pairs(q >> 4))),
    }
)


def recode(data: Tensor, kind: str, values: Tensor) -> Tensor:
    """``data [N, bytes]`` uint8 with the codes ``values [N, K]`` uint8, each below 2^bits, and the scales that it had: a new tensor."""
    elements = GGML_BLOCKS[kind].elements
    assert data.dtype == values.dtype == torch.uint8 and values.numel() == _blocks(data, kind).shape[0] * elements, (data, values)
    out = data.clone()
    blocks = _blocks(out, kind)
    for offset, packed in _PACKERS[kind](values.reshape(-1, elements)):
        blocks[:, offset : offset + packed.shape[1]] = packed
    return out
