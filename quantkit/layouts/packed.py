"""compressed-tensors ``pack-quantized``: output-major, codes in a dense stream along K (``formats.md`` 4.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.geometry import Geometry
from quantkit.layouts.base import GroupedInt, dequantized
from quantkit.layouts.words import pack_rows, unpack_rows
from quantkit.ops.dtypes import TORCH_DTYPES


class PackedCodec:
    """Codec of pack-quantized. What it stores, signed codes and zero points plus ``2^(b-1)``, are our unsigned ones."""

    name = "packed"

    def pack(self, result: GroupedInt, geometry: Geometry) -> dict[str, Tensor]:
        if result.g_idx is not None:
            raise InputError("layout packed", "groups scattered over the input (act-order)", "groups of consecutive inputs")
        bits = result.bits
        parts = {
            "weight_packed": pack_rows(result.codes.T, bits).T.contiguous(),  # [N, K*b/32]
            "weight_scale": result.scales.contiguous().to(TORCH_DTYPES[geometry.scheme.scale_dtype]),  # [N, G]
            "weight_shape": torch.tensor(geometry.whole, dtype=torch.int64),
        }
        if not geometry.scheme.sym:
            parts["weight_zero_point"] = pack_rows(result.zeros, bits).contiguous()  # [N*b/32, G]
        elif bool((result.zeros != 2 ** (bits - 1)).any()):
            raise InputError("layout packed", "zero points of its own in a symmetric linear", f"{2 ** (bits - 1)} everywhere")
        return parts if result.bias is None else {**parts, "bias": result.bias}

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> GroupedInt:
        bits, scales = geometry.scheme.bits, parts["weight_scale"]
        if geometry.scheme.sym:
            zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
        else:
            zeros = unpack_rows(parts["weight_zero_point"], bits, geometry.n).contiguous()
        codes = unpack_rows(parts["weight_packed"].T, bits, geometry.k).T.contiguous()
        return GroupedInt(codes, scales, zeros, bits, parts.get("bias"))

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantized(self.unpack(parts, geometry), dtype)
