"""GPTQ, v1 and v2: codes packed along K, zero points along N, both as dense streams (``formats.md`` 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.geometry import Geometry
from quantkit.layouts.base import GroupedInt, dequantized
from quantkit.layouts.words import pack_rows, unpack_rows
from quantkit.ops.dtypes import TORCH_DTYPES


def _consecutive(geometry: Geometry, device: torch.device) -> Tensor:
    """The group of each input of the linear when groups are consecutive inputs, [K of the cut] int32."""
    k0, size = geometry.origin[1], geometry.scheme.group_size
    inputs = torch.arange(k0, k0 + geometry.k, dtype=torch.int32, device=device)
    return inputs // (geometry.whole[1] if size == -1 else size)


@dataclass(frozen=True, slots=True)
class GptqCodec:
    """Codec of one version. ``offset`` is what v1 subtracts from a zero point before it is stored (``formats.md`` 2.2)."""

    name: str
    offset: int

    def pack(self, result: GroupedInt, geometry: Geometry) -> dict[str, Tensor]:
        if int(result.zeros.min()) < self.offset:
            raise InputError(f"layout {self.name}", "a zero point of 0", "1 or more", "--format gptq_v2 can hold it")
        bits = result.bits
        g_idx = _consecutive(geometry, result.codes.device) if result.g_idx is None else result.g_idx.to(torch.int32)
        parts = {
            "qweight": pack_rows(result.codes.T, bits).contiguous(),  # [K*b/32, N]
            "qzeros": pack_rows(result.zeros - self.offset, bits).T.contiguous(),  # [G, N*b/32]
            "scales": result.scales.T.contiguous().to(TORCH_DTYPES[geometry.scheme.scale_dtype]),  # [G, N]
            "g_idx": g_idx.contiguous(),
        }
        return parts if result.bias is None else {**parts, "bias": result.bias}

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> GroupedInt:
        """As ``Codec.unpack``. Raises InputError when ``g_idx`` names a group that is not there, or is not what the config says."""
        bits, g_idx = geometry.scheme.bits, parts["g_idx"]
        zeros = unpack_rows(parts["qzeros"].T, bits, geometry.n).contiguous()  # [N, G]
        if geometry.scheme.act_order:
            groups = parts["scales"].shape[0]
            if g_idx.numel() and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
                raise InputError("g_idx", f"holds groups {int(g_idx.min())} to {int(g_idx.max())}", f"0 to {groups - 1}")
        elif not torch.equal(g_idx, _consecutive(geometry, g_idx.device)):
            raise InputError("g_idx", "scatters groups, and config.json says desc_act false", "consecutive groups, or desc_act true")
        return GroupedInt(
            codes=unpack_rows(parts["qweight"], bits, geometry.k).T.contiguous(),
            scales=parts["scales"].T.contiguous(),
            zeros=zeros + self.offset,
            bits=bits,
            bias=parts.get("bias"),
            g_idx=g_idx if geometry.scheme.act_order else None,
        )

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantized(self.unpack(parts, geometry), dtype)
