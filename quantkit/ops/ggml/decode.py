"""ggml's blocks -> weights, in torch on any device: the float32 operations of ``gguf.md`` 2 in their order, so the same bits as ggml.

Every type has one form: ``w = scale * code + offset`` with a scale, and of some an offset, for each 16 or 32 consecutive weights. Knows
bytes; knows no file and no layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.geometry import GGML_BLOCKS

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Weights that are decoded at a time: what stays in a processor's cache, or bounds the temporaries on a GPU."""
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of IQ4_NL and IQ4_XS by code."""

FOUR_BITS = frozenset({"Q4_0", "Q4_1", "Q4_K"})
"""Types of 4-bit integers in groups of 32."""

Affine = tuple[Tensor, Tensor, Tensor | None]
"""Codes ``[B, G, g]`` integers, scales ``[B, G]`` and offsets ``[B, G]`` float32, of B blocks; offsets None: there are none."""


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte ``at`` of each block, as float32 ``[B, 1]``."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(qs: Tensor, g: int) -> Tensor:
    """``[B, n]`` bytes -> ``[B, 2n/g, g]``: the low nibbles of each ``g`` bytes, then their high ones."""
    runs = qs.reshape(qs.shape[0], -1, 1, g)
    return torch.cat([runs & 15, runs >> 4], 2).reshape(qs.shape[0], -1, g)


def _fifth_bits(qh: Tensor) -> Tensor:
    """``[B, 4]`` bytes -> bit j of the little-endian word as ``[B, 1, 32]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=qh.device)
    return ((qh.unsqueeze(-1) >> shifts) & 1).reshape(qh.shape[0], 1, 32)


def _pairs(qs: Tensor) -> Tensor:
    """``[B, 32a]`` bytes -> ``[B, 4a, 32]`` codes of two bits: element ``128a + 32s + l`` is bits 2s and 2s + 1 of byte ``32a + l``."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=qs.device).reshape(1, 1, 4, 1)
    return ((qs.reshape(qs.shape[0], -1, 1, 32) >> shifts) & 3).reshape(qs.shape[0], -1, 32)


def _q4_0(b: Tensor) -> Affine:
    return _nibbles(b[:, 2:], 16).reshape(-1, 1, 32).to(torch.int8) - 8, _half(b, 0), None


def _q4_1(b: Tensor) -> Affine:
    return _nibbles(b[:, 4:], 16).reshape(-1, 1, 32), _half(b, 0), _half(b, 2)


def _q5_0(b: Tensor) -> Affine:
    codes = _nibbles(b[:, 6:], 16).reshape(-1, 1, 32) | (_fifth_bits(b[:, 2:6]) << 4)
    return codes.to(torch.int8) - 16, _half(b, 0), None


def _q5_1(b: Tensor) -> Affine:
    return _nibbles(b[:, 8:], 16).reshape(-1, 1, 32) | (_fifth_bits(b[:, 4:8]) << 4), _half(b, 0), _half(b, 2)


def _q8_0(b: Tensor) -> Affine:
    return b[:, 2:].contiguous().view(torch.int8).reshape(-1, 1, 32), _half(b, 0), None


def _levels(codes: Tensor) -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.int8, device=codes.device)[codes.int()]


def _iq4_nl(b: Tensor) -> Affine:
    return _levels(_nibbles(b[:, 2:], 16).reshape(-1, 1, 32)), _half(b, 0), None


def _q2_k(b: Tensor) -> Affine:
    scales = b[:, :16]
    codes = _pairs(b[:, 16:80]).reshape(-1, 16, 16)
    return codes, _half(b, 80) * (scales & 15).float(), -(_half(b, 82) * (scales >> 4).float())


def _q3_k(b: Tensor) -> Affine:
    bits = torch.arange(8, dtype=torch.uint8, device=b.device).reshape(1, 8, 1)
    high = (b[:, None, :32] >> bits) & 1  # [B, 8, 32]: bit 4a + s of hmask[l]
    codes = (_pairs(b[:, 32:96]) + (high << 2)).to(torch.int8) - 4
    packed = b[:, 96:108]
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    top = torch.cat([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scales = (low | (top << 4)).to(torch.int8) - 32
    return codes.reshape(-1, 16, 16), _half(b, 108) * scales.float(), None


def six_bits(s: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and mins ``[B, 8]`` of Q4_K and Q5_K in their 12 bytes."""
    scales = torch.cat([s[:, :4] & 63, (s[:, 8:] & 15) | ((s[:, :4] >> 6) << 4)], 1)
    mins = torch.cat([s[:, 4:8] & 63, (s[:, 8:] >> 4) | ((s[:, 4:8] >> 6) << 4)], 1)
    return scales, mins


def _q4_k(b: Tensor) -> Affine:
    scales, mins = six_bits(b[:, 4:16])
    return _nibbles(b[:, 16:], 32), _half(b, 0) * scales.float(), -(_half(b, 2) * mins.float())


def _q5_k(b: Tensor) -> Affine:
    scales, mins = six_bits(b[:, 4:16])
    bits = torch.arange(8, dtype=torch.uint8, device=b.device).reshape(1, 8, 1)
    high = (b[:, None, 16:48] >> bits) & 1  # [B, 8, 32]: bit 2g + s of qh[l]
    return _nibbles(b[:, 48:], 32) | (high << 4), _half(b, 0) * scales.float(), -(_half(b, 2) * mins.float())


def _q6_k(b: Tensor) -> Affine:
    low = _nibbles(b[:, :128], 64).reshape(-1, 8, 32)  # runs of 64 bytes: [low 0, low 32, high 0, high 32] are s = 0 to 3
    codes = (low | (_pairs(b[:, 128:192]) << 4)).to(torch.int8) - 32
    scales = b[:, 192:208].contiguous().view(torch.int8)
    return codes.reshape(-1, 16, 16), _half(b, 208) * scales.float(), None


def _iq4_xs(b: Tensor) -> Affine:
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device)
    low = torch.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], 2).reshape(-1, 8)
    top = ((b[:, 2:4].unsqueeze(-1) >> shifts) & 3).reshape(-1, 8)
    scales = (low | (top << 4)).to(torch.int8) - 32
    return _levels(_nibbles(b[:, 8:], 16).reshape(-1, 8, 32)), _half(b, 0) * scales.float(), None


_AFFINE: Mapping[str, Callable[[Tensor], Affine]] = MappingProxyType(
    {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "IQ4_NL": _iq4_nl,
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "IQ4_XS": _iq4_xs,
    }
)


def affine(blocks: Tensor, kind: str) -> Affine:
    """What ``blocks [B, bytes]`` uint8 of type ``kind`` hold."""
    return _AFFINE[kind](blocks)


def infinite_blocks(blocks: Tensor, kind: str) -> int:
    """How many of ``blocks [N, bytes of a row]`` have a scale or an offset that is infinite or no number."""
    flat, found = blocks.reshape(-1, GGML_BLOCKS[kind].nbytes), 0
    step = CHUNK_ELEMENTS[blocks.device.type] // GGML_BLOCKS[kind].elements
    for start in range(0, flat.shape[0], step):
        _, scales, offsets = affine(flat[start : start + step], kind)
        finite = scales.isfinite().all(1)
        found += int((~(finite if offsets is None else finite & offsets.isfinite().all(1))).sum())
    return found


def four_bits(blocks: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """``blocks [N, bytes of a row]`` of a kind in FOUR_BITS -> codes ``[N, K]`` uint8, scales and weights of code 8 ``[N, G]`` float32."""
    rows = blocks.shape[0]
    codes, scales, offsets = affine(blocks.reshape(-1, GGML_BLOCKS[kind].nbytes), kind)
    if offsets is None:  # Q4_0: codes from -8 on
        codes, middles = (codes + 8).to(torch.uint8), torch.zeros_like(scales)
    else:
        middles = scales * 8 + offsets
    return codes.reshape(rows, -1), scales.reshape(rows, -1), middles.reshape(rows, -1)


def decode(blocks: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """``blocks [N, bytes of a row]`` uint8, contiguous -> the weights ``[N, K]``: float32 as ggml decodes them, then cast to ``dtype``."""
    block = GGML_BLOCKS[kind]
    rows = blocks.shape[0]
    k = blocks.shape[1] // block.nbytes * block.elements
    out = torch.empty(rows, k, dtype=dtype, device=blocks.device)
    flat, values = blocks.reshape(-1, block.nbytes), out.reshape(-1, block.elements)
    step = CHUNK_ELEMENTS[blocks.device.type] // block.elements
    for start in range(0, flat.shape[0], step):
        codes, scales, offsets = affine(flat[start : start + step], kind)
        some = codes.float().mul_(scales.unsqueeze(-1))
        if offsets is not None:
            some.add_(offsets.unsqueeze(-1))
        values[start : start + step] = some.reshape(-1, block.elements)
    return out
