"""A quantized embedding: a matrix of which rows are looked up, and only those are dequantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.geometry import Axis, Geometry
from quantkit.layouts.base import GroupedInt, LinearOp, dequantized
from quantkit.layouts.registry import codec, load_linear
from quantkit.layouts.words import unpack_rows


class PackedTable:
    """Rows of a vocabulary as they are stored: ``table(ids [T])`` -> ``[T, K]`` in ``dtype``, as dequantizing all of it would give.

    ``geometry`` is of a layout that stores its weights row by row (``packed``, ``int8``, ``fp8``, ``ggml``), of this rank's rows.
    """

    def __init__(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype, device: str = "cpu") -> None:
        self.dtype, self.shape = dtype, (geometry.n, geometry.k)
        self._parts = {suffix: part.to(device) for suffix, part in parts.items()}
        self._zeros: Tensor | None = None
        packed = self._parts.pop("weight_zero_point", None)
        if packed is not None:  # four rows to a word: taken apart here, they are as many bytes and each row has its own
            self._zeros = unpack_rows(packed, geometry.scheme.bits, geometry.n).contiguous()
            geometry = replace(geometry, scheme=replace(geometry.scheme, sym=True))
        self._geometry = geometry
        self._by_row = frozenset(part.suffix for part in geometry.parts if part.axes[0] == Axis("N"))

    @property
    def device(self) -> torch.device:
        return next(iter(self._parts.values())).device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts.values()) + (0 if self._zeros is None else self._zeros.nbytes)

    def __call__(self, ids: Tensor) -> Tensor:
        """``ids [T]`` int64 on the table's device, each below ``shape[0]`` -> ``[T, K]``."""
        if not ids.shape[0]:
            return torch.empty(0, self.shape[1], dtype=self.dtype, device=self.device)
        parts = {suffix: part[ids] if suffix in self._by_row else part for suffix, part in self._parts.items()}
        geometry = replace(self._geometry, n=ids.shape[0])
        if self._zeros is None:
            return codec(geometry.layout).dequant(parts, geometry, self.dtype)
        result = codec(geometry.layout).unpack(parts, geometry)
        assert isinstance(result, GroupedInt)
        return dequantized(replace(result, zeros=self._zeros[ids]), self.dtype)

    def linear(self, *, parity: bool) -> LinearOp:
        """The head that is tied to this table: it multiplies by the parts that are looked up in."""
        return load_linear(self._geometry, self._parts, dtype=self.dtype, device=str(self.device), parity=parity)
