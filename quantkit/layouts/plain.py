"""Unquantized layouts: ``weight [N, K]``, or ``[K, N]`` as Conv1D stores it, and ``bias [N]`` in a float dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.geometry import Geometry
from quantkit.layouts.base import Neutral


class PlainCodec:
    """Codec of unquantized linears. It packs nothing: its neutral form is the weight itself."""

    name = "plain"

    def pack(self, result: Any, geometry: Geometry) -> dict[str, Tensor]:
        raise InputError(f"layout {self.name}", "holds no integer codes", "a quantized layout")

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> Neutral:
        raise InputError(f"layout {self.name}", "holds no integer codes", "a quantized layout")

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        return parts["weight"].to(dtype)


class TransposedCodec(PlainCodec):
    """Codec of ``weight [K, N]``."""

    name = "transposed"

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        return parts["weight"].to(dtype).T


class DenseLinear:
    """A float linear. ``weight [N, K]`` and ``bias [N]`` share the activations' dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self.bias = weight, bias

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def weight(self) -> Tensor:
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self._weight)
