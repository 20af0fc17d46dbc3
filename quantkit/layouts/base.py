"""What a layout offers: the codec between stored parts and a neutral result, and the linear that runs on them.

A layout knows bytes and dims; it knows no rank, no model and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.geometry import Geometry


@dataclass(frozen=True, slots=True)
class GroupedInt:
    """Neutral result of an integer method: ``w[n, k] = scales[n, k // g] * (codes[n, k] - zeros[n, k // g])``.

    ``codes [N, K]`` uint8, ``scales [N, G]`` float16, ``zeros [N, G]`` uint8, ``bias [N]`` or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    bias: Tensor | None = None


class Codec(Protocol):
    """Between the stored parts of one linear and its neutral result."""

    name: str

    def pack(self, result: GroupedInt) -> dict[str, Tensor]:
        """Stored parts by suffix, in the layout's dtypes and shapes."""

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> GroupedInt:
        """The neutral result that ``parts`` hold."""

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[N, K]``."""


class LinearOp(Protocol):
    """A linear ready to run: ``y [T, N] = x [T, K] W^T``. The bias is the caller's to add."""

    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor: ...

    def weight(self) -> Tensor:
        """The dense weight ``[N, K]`` that this linear multiplies by, in its compute dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes that the linear holds in memory, bias included."""
