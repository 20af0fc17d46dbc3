"""Integer groups along K: quantize, dequantize, and multiply.

``codes [N, K]`` uint8, ``scales [N, G]`` of a stored dtype, ``zeros [N, G]`` uint8; ``w = scale * (code - zero)`` with
``g = K / G`` consecutive inputs to a group. These torch functions are the reference of every packed integer layout.
Knows no file layout.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantkit.errors import InputError


def _in_groups(matrix: Tensor, groups: int) -> Tensor:
    """``[N, K]`` as ``[N, G, g]``; N and K may be 0 (a rank that owns nothing)."""
    return matrix.reshape(matrix.shape[0], groups, matrix.shape[1] // max(groups, 1))


def group_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The least and greatest value of each group, with 0 inside the range. ``weight [N, K]`` -> two ``[N, G]``."""
    groups = _in_groups(weight, weight.shape[1] // group_size)
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def scales_and_zeros(
    low: Tensor, high: Tensor, bits: int, sym: bool, scale_dtype: torch.dtype = torch.float16, min_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """Scale (``scale_dtype``) and zero point (uint8) of ranges ``low``, ``high`` (any equal shape; ``formats.md`` 2.3 and 3.4).

    Symmetric: zero is ``2^(b-1)`` and the range is the larger magnitude on both sides. A group of zeros gets scale 1e-5.
    ``min_zero`` 1 is for a format that cannot store a zero point of 0. Raises InputError when a scale leaves its dtype:
    weights that large, or not finite, cannot be stored.
    """
    top = 2**bits - 1
    if sym:
        high = torch.maximum(low.abs(), high)
        low = -high
    # 1e-5 keeps a group of zeros, or one whose scale would be a float16 subnormal, representable.
    scale = ((high - low) / top).clamp(min=1e-5).to(scale_dtype)
    if not torch.isfinite(scale).all():
        limit = torch.finfo(scale_dtype).max
        name = str(scale_dtype).removeprefix("torch.")
        raise InputError("weight", f"holds values whose scale is not a {name}", f"finite weights below about {limit:.6g}")
    if sym:
        return scale, torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    return scale, (-low / scale.to(low.dtype)).round().clamp(min_zero, top).to(torch.uint8)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes of ``weight [N, K]`` on the grid of its stored scales: ``clamp(round(w / s16) + z)`` -> uint8 ``[N, K]``."""
    groups = _in_groups(weight, scales.shape[1])
    codes = (groups / scales.to(weight.dtype).unsqueeze(-1)).round_().add_(zeros.to(weight.dtype).unsqueeze(-1))
    return codes.clamp_(0, 2**bits - 1).flatten(-2).to(torch.uint8)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype = torch.float32, g_idx: Tensor | None = None) -> Tensor:
    """``w = scale * (code - zero)``, computed in float32 (float64 when asked for) and cast to ``dtype``: ``[N, K]``.

    ``g_idx [K]`` gives each input's group where groups are not consecutive.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if g_idx is not None:
        index = g_idx.long()
        return (codes.to(work) - zeros.to(work)[:, index]).mul_(scales.to(work)[:, index]).to(dtype)
    groups = _in_groups(codes, scales.shape[1]).to(work)
    return groups.sub_(zeros.to(work).unsqueeze(-1)).mul_(scales.to(work).unsqueeze(-1)).flatten(-2).to(dtype)


def fake_quantize(
    weight: Tensor,
    group_size: int,
    bits: int,
    sym: bool,
    shrink: Tensor | float = 1.0,
    scale_dtype: torch.dtype = torch.float16,
    min_zero: int = 0,
) -> Tensor:
    """``weight [N, K]`` after a round trip through the grid of its own ranges, each multiplied by ``shrink`` (broadcast to [N, G])."""
    low, high = group_range(weight, group_size)
    scales, zeros = scales_and_zeros(low * shrink, high * shrink, bits, sym, scale_dtype, min_zero)
    return dequantize(encode(weight, scales, zeros, bits), scales, zeros, weight.dtype)


_BLOCK_N = 64
_DENSE_ROWS = 128
"""From this many tokens on, unpacking once and multiplying densely beats the int4 kernel (measured on AVX-512)."""


def _packed_codes(packed: Tensor, k: int) -> Tensor:
    """The codes int32 ``[N, K]`` that torch has packed, N a multiple of the block, if its order is as we know it."""
    blocks = packed.reshape(-1, k, _BLOCK_N // 2)  # [N/64, K, 32]: low nibble n, high nibble n + 32
    both = torch.cat([blocks & 15, blocks >> 4], -1)  # [N/64, K, 64]
    return both.transpose(1, 2).reshape(-1, k).to(torch.int32)


@cache
def _order_known() -> bool:
    """Whether codes are read back as they were packed. The packed order is torch's own affair: proven before it is relied on."""
    codes = torch.randint(0, 16, (2 * _BLOCK_N, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return torch.equal(_packed_codes(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), codes.shape[1]), codes)


class Int4CpuLinear:
    """A 4-bit linear on torch's CPU int4 kernel, bfloat16 activations; the caller adds ``bias``.

    About 0.56 bytes a weight at group 64, held once. Built from codes ``[N, K]`` and, of each group, its scale and ``middles [N, G]``,
    the weight of code 8, in float32; both are kept in bfloat16. N is padded to the kernel's block of 64 with zero rows. Group sizes
    32, 64, 128, 256.
    """

    def __init__(self, codes: Tensor, scales: Tensor, middles: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.n, self.k = codes.shape
        self.group_size = self.k // scales.shape[1]
        pad = -self.n % _BLOCK_N
        padded = torch.nn.functional.pad(codes.to(torch.int32), (0, 0, 0, pad))
        self._packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded, 1)
        scale = torch.nn.functional.pad(scales.float(), (0, 0, 0, pad))
        zero = torch.nn.functional.pad(middles, (0, 0, 0, pad))
        self._scales_and_zeros = torch.stack([scale.T, zero.T], -1).to(torch.bfloat16).contiguous()  # [G, N, 2]

    @property
    def nbytes(self) -> int:
        """Bytes held: packed codes, scales with zeros, bias."""
        return self._packed.nbytes + self._scales_and_zeros.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def weight(self) -> Tensor:
        """The dense bfloat16 weight ``[N, K]`` that this linear multiplies by."""
        if not _order_known():
            eye = torch.eye(self.k, dtype=torch.bfloat16)
            return self(eye).T.contiguous()
        scale, zero = self._scales_and_zeros.unbind(-1)  # [G, N]
        groups = _in_groups((_packed_codes(self._packed, self.k) - 8).to(torch.bfloat16), scale.shape[0])
        return torch.addcmul(zero.T.unsqueeze(-1), groups, scale.T.unsqueeze(-1)).flatten(-2)[: self.n]

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, K]`` bfloat16 -> ``[T, N]`` bfloat16."""
        if _order_known() and x.shape[0] >= _DENSE_ROWS:
            return torch.nn.functional.linear(x, self.weight())
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self._packed, self.group_size, self._scales_and_zeros)
        return y[:, : self.n]


def int4_cpu_supports(k: int, group_size: int) -> bool:
    """Whether torch's CPU int4 kernel takes this shape."""
    return group_size in (32, 64, 128, 256) and k % group_size == 0
