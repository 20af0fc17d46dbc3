"""4-bit codebooks over blocks of the flattened matrix, and the 8-bit double quantization of their scales (``formats.md`` 5, A).

``w = table[code] * absmax[i // block]`` for flat index ``i``; NF4 and FP4 of QLoRA (Dettmers et al. 2023). Codes, absmax and
double-quantized absmax are those of bitsandbytes 0.50 on a CPU, bit for bit. Knows no file layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.geometry import BNB_BLOCKS, NESTED_BLOCK


def _floats(words: str) -> Tensor:
    """float32 of hexadecimal bit patterns: tables are constants, since recomputing them changes last bits between machines."""
    return torch.from_numpy(np.array([int(word, 16) for word in words.split()], dtype=np.uint32).view(np.float32).copy())


_NF4 = _floats("""
bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000
""")
_FP4 = _floats("""
00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000
00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000
""")
_MAP_UPPER = _floats("""
3513a3b7 365a1a94 370205ff 37b24206 38378034 388aefb3 38ba1f4b 3923d70b 398ce705 39c7e283 3a016f01 3a1eecc1 3a3c6a80 3a59e83e 3a7765ff
3aa7ef9d 3af1a9fc 3b1db22d 3b428f5c 3b676c8a 3b8624dd 3b989374 3bab020d 3bbd70a4 3bcfdf3b 3be24dd3 3bf4bc6a 3c039581 3c0ccccd 3c160418
3c1f3b64 3c3ae148 3c68f5c3 3c8b851f 3ca28f5d 3cb9999a 3cd0a3d7 3ce7ae15 3cfeb852 3d0ae148 3d166667 3d21eb85 3d2d70a3 3d38f5c3 3d447ae1
3d500000 3d5b851f 3d670a3d 3d728f5d 3d7e147b 3d84cccd 3d8a8f5d 3d9051eb 3d96147b 3d9bd70a 3da1999a 3da75c2a 3dad1eb8 3db2e148 3db8a3d7
3dbe6667 3dc428f7 3dc9eb85 3ddb3334 3df80000 3e0a6666 3e18cccd 3e273333 3e35999a 3e440000 3e526666 3e60cccd 3e6f3333 3e7d9999 3e860000
3e8d3334 3e946666 3e9b999a 3ea2cccc 3eaa0000 3eb13333 3eb86666 3ebf999a 3ec6cccc 3ece0000 3ed53333 3edc6666 3ee3999a 3eeacccc 3ef20000
3ef93332 3f003333 3f03cccc 3f076666 3f0b0000 3f0e999a 3f123334 3f15cccd 3f196666 3f1d0000 3f20999a 3f243334 3f27cccd 3f2b6666 3f2f0000
3f32999a 3f363334 3f39cccd 3f3d6666 3f410000 3f44999a 3f483333 3f4bcccd 3f4f6666 3f530000 3f56999a 3f5a3333 3f5dcccd 3f616666 3f650000
3f68999a 3f6c3333 3f6fcccd 3f736666 3f770000 3f7a999a 3f7e3333
""")

CODEBOOKS: Mapping[str, Tensor] = MappingProxyType({"nf4": _NF4, "fp4": _FP4})
"""Kind -> 16 values by code, float32. FP4 has its sign in bit 3 and two zeros, codes 0 and 8."""
ZERO_CODE: Mapping[str, int] = MappingProxyType({"nf4": 7, "fp4": 0})
"""The code of 0.0, which also fills the last nibble of an odd number of codes."""
NESTED_MAP = torch.cat([-_MAP_UPPER.flip(0), torch.zeros(1), _MAP_UPPER, torch.ones(1)])
"""The 256 values of double quantization, ascending, float32. There is no -1."""

_RANKED: Mapping[str, Tensor] = MappingProxyType(
    {
        "nf4": torch.arange(16, dtype=torch.uint8),
        "fp4": torch.tensor([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], dtype=torch.uint8),
    }
)
"""Kind -> codes by ascending value."""
_LEAST = 1e-38
_CHUNK = 1 << 22
"""Elements at a time: the float32 copies of a large matrix stay within some dozens of megabytes."""


def midpoints(ascending: Tensor) -> Tensor:
    """The thresholds between neighbours of ``ascending [C]``, in its dtype: ``[C - 1]``."""
    return (ascending[:-1] + ascending[1:]) / 2


def quantize_4bit(weight: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[numel]`` and absmax float32 ``[B]`` of ``weight``, of any shape and float dtype, flattened row by row.

    ``y = w * (1 / absmax)`` in float32, and the code counts the thresholds below ``y`` (``formats.md`` 5.2). A last block that is
    short divides by absmax instead, and its absmax is at least 1e-38, which makes that of zeros not 0: so does the reference.
    Raises InputError for weights that are not finite.
    """
    assert block_size in BNB_BLOCKS, block_size
    flat = weight.reshape(-1)
    ranked = _RANKED[kind].to(weight.device)
    thresholds = midpoints(CODEBOOKS[kind].to(weight.device)[ranked.int()])
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(math.ceil(flat.numel() / block_size), dtype=torch.float32, device=weight.device)

    def encode(scaled: Tensor, start: int) -> None:
        places = torch.bucketize(scaled.clamp_(-1, 1).reshape(-1), thresholds, out_int32=True)
        codes[start : start + places.numel()] = ranked[places]

    whole = flat.numel() - flat.numel() % block_size
    for start in range(0, whole, _CHUNK):
        blocks = flat[start : min(start + _CHUNK, whole)].float().view(-1, block_size)
        largest = blocks.abs().amax(1)
        absmax[start // block_size :][: largest.numel()] = largest
        encode(blocks * (1.0 / largest.clamp(min=_LEAST)).unsqueeze(1), start)
    if whole < flat.numel():
        rest = flat[whole:].float()
        absmax[-1] = rest.abs().amax().clamp(min=_LEAST)
        encode(rest / absmax[-1], whole)
    if not torch.isfinite(absmax).all():
        raise InputError("weight", "holds values that are not finite", "finite weights")
    return codes, absmax


def dequantize_4bit(codes: Tensor, absmax: Tensor, table: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """``table[code] * absmax[block]`` in float32, cast to ``dtype``: ``codes [numel]`` uint8, ``absmax [B]`` -> ``[numel]``.

    ``table [16]`` is the one that is stored with the weight. FP4's code 8 gives the zero of the table, +0; the reference gives -0.
    """
    values = table.float().index_select(0, codes.int())
    whole = values.numel() - values.numel() % block_size
    values[:whole].view(-1, block_size).mul_(absmax[: whole // block_size].float().unsqueeze(1))
    if whole < values.numel():
        values[whole:].mul_(absmax[-1].float())
    return values.to(dtype)


_CELLS = 65536


def _nested_codes() -> Tensor:
    """The 8-bit code of each of the 65536 grid points over [-1, 1]: the nearest entry of NESTED_MAP."""
    grid = torch.arange(_CELLS, dtype=torch.float64) / (_CELLS - 1) * 2 - 1
    return torch.bucketize(grid, midpoints(NESTED_MAP.double())).to(torch.uint8)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization of ``absmax [B]`` float32: codes uint8 ``[B]``, nested absmax float32 ``[ceil(B/256)]``, offset float32 ``[]``.

    The offset is torch's own mean, as the reference's is: its last bit depends on torch, the device and the instruction set, and from
    32768 blocks on also on the number of threads. Deviations from it are scaled to [-1, 1] by blocks of
    256 and rounded to a grid of 65536 points before the nearest map entry is taken: entries 124 to 130 lie between two points and are
    never used. Without that grid (``formats.md`` 5.3) about one code of 650 would be another. A block without deviations gets code 0.
    """
    offset = absmax.mean()
    blocks = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    scaled = torch.where(nested > 0, 1.0 / nested, 0.0).unsqueeze(1).mul(blocks).clamp_(-1, 1)
    cells = ((scaled + 1.0) * ((_CELLS - 1) / 2) + 0.5).int()
    codes = _nested_codes().to(absmax.device)[cells]
    codes[nested == 0] = 0
    return codes.view(-1)[: absmax.numel()].clone(), nested, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor, table: Tensor, index: Tensor | None = None) -> Tensor:
    """absmax float32, of the shape of ``codes`` uint8: ``table[code] * nested_absmax[block // 256] + offset``.

    ``table [256]`` is the one that is stored. ``index`` int64, shaped as ``codes``, is each block's place in the uncut matrix, and
    ``nested_absmax`` that of the whole matrix; None: the codes are all of its blocks, in order (``formats.md`` 9.5).
    """
    if index is None:
        index = torch.arange(codes.numel(), device=codes.device).view(codes.shape)
    return table.float()[codes.int()].mul_(nested_absmax.float()[index // NESTED_BLOCK]).add_(offset.float())


def pack_nibbles(codes: Tensor, fill: int) -> Tensor:
    """Two codes to a byte, the first in the high nibble: ``[n]`` uint8 below 16 -> ``[ceil(n/2)]``; ``fill`` completes an odd last byte."""
    even = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=fill)
    return (even[::2] << 4) | even[1::2]


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` codes of ``packed [ceil(count/2)]`` uint8: ``[count]`` uint8."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).view(-1)[:count]
