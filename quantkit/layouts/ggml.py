"""Codec of ggml's block types: a linear whose ``weight`` is the bytes that a GGUF file stores for it (``gguf.md`` 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.geometry import Geometry
from quantkit.layouts.base import Neutral, SuperBlock
from quantkit.ops.ggml.decode import decode


class GgmlCodec:
    """Codec of the layout ``ggml``. Its neutral form is the blocks themselves: scales and codes of one lie among each other."""

    name = "ggml"

    def pack(self, result: Neutral, geometry: Geometry) -> dict[str, Tensor]:
        """Raises InputError for what is not blocks of the geometry's type: codes and scales do not say which blocks they make."""
        if not isinstance(result, SuperBlock) or result.kind != geometry.scheme.code:
            found = f"blocks of {result.kind}" if isinstance(result, SuperBlock) else f"a {type(result).__name__}"
            raise InputError(f"layout {self.name}", f"cannot hold {found}", f"blocks of {geometry.scheme.code}")
        bias = {} if result.bias is None else {"bias": result.bias}
        return {"weight": result.blocks.contiguous(), **bias}

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> Neutral:
        return SuperBlock(parts["weight"], geometry.scheme.code, parts.get("bias"))

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        return decode(parts["weight"].contiguous(), geometry.scheme.code, dtype)
