"""8-bit layouts whose values lie unpacked: compressed-tensors int8 and FP8, block FP8, LLM.int8 (``formats.md`` 4.3, 4.5, 5.6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.geometry import FP8_BLOCK, Geometry
from quantkit.layouts.base import Scaled
from quantkit.ops.dtypes import TORCH_DTYPES
from quantkit.ops.eightbit import dequantize_scaled, llm_int8_dequantize

LLM_INT8_ROWS = 0
"""``weight_format`` of row-major LLM.int8; the others are layouts of old GPUs."""


@dataclass(frozen=True, slots=True)
class ScaledCodec:
    """Codec of values with a scale each row, matrix or block; ``scale`` is the suffix of the scales."""

    name: str
    scale: str
    block: int | None = None

    def pack(self, result: Scaled, geometry: Geometry) -> dict[str, Tensor]:
        dtype = TORCH_DTYPES[geometry.part(self.scale).dtype]
        parts = {"weight": result.values.contiguous(), self.scale: result.scales.contiguous().to(dtype)}
        return parts if result.bias is None else {**parts, "bias": result.bias}

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> Scaled:
        return Scaled(parts["weight"], parts[self.scale], parts.get("bias"))

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantize_scaled(parts["weight"], parts[self.scale], self.block, dtype)


class LlmInt8Codec:
    """Codec of LLM.int8: ``w = q * SCB / 127``."""

    name = "bnb8"

    def pack(self, result: Scaled, geometry: Geometry) -> dict[str, Tensor]:
        parts = {
            "weight": result.values.contiguous(),
            "SCB": result.scales.reshape(-1).contiguous().float(),
            "weight_format": torch.tensor(LLM_INT8_ROWS, dtype=torch.uint8),
        }
        return parts if result.bias is None else {**parts, "bias": result.bias}

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> Scaled:
        return Scaled(parts["weight"], parts["SCB"].unsqueeze(1), parts.get("bias"), divisor=127)

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        return llm_int8_dequantize(parts["weight"], parts["SCB"], dtype)


INT8, FP8 = ScaledCodec("int8", "weight_scale"), ScaledCodec("fp8", "weight_scale")
FP8_BLOCKS = ScaledCodec("fp8_block", "weight_scale_inv", FP8_BLOCK)
