"""The codecs by layout name, and the choice of the linear that runs a stored linear on a device."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.geometry import Geometry
from quantkit.layouts.awq import AwqCodec
from quantkit.layouts.base import Codec, LinearOp
from quantkit.layouts.plain import DenseLinear, PlainCodec
from quantkit.ops.grouped import Int4CpuLinear, int4_cpu_supports

CODECS: Mapping[str, Codec] = MappingProxyType({"plain": PlainCodec(), "awq": AwqCodec()})


def codec(name: str) -> Codec:
    """The codec of a layout. Raises InputError for a name that no layout has."""
    if name not in CODECS:
        raise InputError("layout", f"{name!r} is unknown", f"one of {', '.join(CODECS)}")
    return CODECS[name]


class UnpackingLinear:
    """A packed linear that dequantizes itself at each call: the parity mode, exact in the compute dtype.

    Only the parts stay in memory; the dense weight lives for one call.
    """

    def __init__(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype) -> None:
        self._parts = {suffix: part for suffix, part in parts.items() if suffix != "bias"}
        self._geometry, self._dtype = geometry, dtype
        self.bias = parts["bias"].to(dtype) if "bias" in parts else None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts.values()) + (0 if self.bias is None else self.bias.nbytes)

    def weight(self) -> Tensor:
        return codec(self._geometry.layout).dequant(self._parts, self._geometry, self._dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight())


def load_linear(
    geometry: Geometry, parts: Mapping[str, Tensor], *, dtype: torch.dtype, device: str = "cpu", parity: bool = False
) -> LinearOp:
    """The linear that runs ``parts`` (one stored linear) in ``dtype`` on ``device``.

    On a CPU in bfloat16 a 4-bit layout runs on torch's int4 kernel; everywhere else, and with ``parity``, it is
    dequantized at each call. Empty shapes (a rank that owns nothing) run as dense.
    """
    moved = {suffix: part.to(device) for suffix, part in parts.items()}
    bias = moved["bias"].to(dtype) if "bias" in moved else None
    if geometry.layout == "plain" or not geometry.n or not geometry.k:
        return DenseLinear(codec(geometry.layout).dequant(moved, geometry, dtype), bias)
    if device == "cpu" and dtype == torch.bfloat16 and not parity:
        result = codec(geometry.layout).unpack(moved, geometry)
        if result.bits == 4 and int4_cpu_supports(geometry.k, geometry.k // result.scales.shape[1]):
            return Int4CpuLinear(result.codes, result.scales, result.zeros, bias)
    return UnpackingLinear(moved, geometry, dtype)
