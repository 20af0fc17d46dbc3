"""What a layout offers: the codec between stored parts and a neutral result, and the linear that runs on them.

A layout knows bytes and dims; it knows no rank, no model and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.geometry import Geometry
from quantkit.ops.grouped import dequantize


@dataclass(frozen=True, slots=True)
class GroupedInt:
    """Integers on a grid per group: ``w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g])``.

    ``codes [N, K]`` uint8, ``scales [N, G]`` float, ``zeros [N, G]`` uint8, ``bias [N]`` or None. ``g`` is ``k // (K / G)``, or
    ``g_idx[k]`` where ``g_idx [K]`` int32 is given (GPTQ's act-order).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    bias: Tensor | None = None
    g_idx: Tensor | None = None


def dequantized(result: GroupedInt, dtype: torch.dtype) -> Tensor:
    """The dense weight ``[N, K]`` that ``result`` stands for."""
    return dequantize(result.codes, result.scales, result.zeros, dtype, result.g_idx)


@dataclass(frozen=True, slots=True)
class Codebook:
    """Entries of a 4-bit codebook, scaled per block of the flattened matrix: ``w = table[code] * absmax[block]``.

    ``codes [N, K]`` uint8, ``absmax [B]`` float32, ``kind`` "nf4" or "fp4", ``dtype`` that of the weight that was quantized.
    """

    codes: Tensor
    absmax: Tensor
    kind: str
    block_size: int
    dtype: torch.dtype
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Scaled:
    """8-bit values with a scale per row, per matrix or per block of 128 x 128: ``w = values * scales / divisor``.

    ``values [N, K]`` int8 or float8_e4m3fn; ``scales [N, 1]``, ``[1]`` or ``[ceil(N/128), ceil(K/128)]``. ``divisor`` is 127 of
    LLM.int8, which stores the largest magnitude of each row.
    """

    values: Tensor
    scales: Tensor
    bias: Tensor | None = None
    divisor: int = 1


@dataclass(frozen=True, slots=True)
class SuperBlock:
    """Blocks of ggml, scales and codes together: ``blocks [N, K / elements * bytes]`` uint8 of type ``kind`` (``gguf.md`` 2)."""

    blocks: Tensor
    kind: str
    bias: Tensor | None = None


Neutral = GroupedInt | Codebook | Scaled | SuperBlock
"""What a method makes of a linear, whatever it is stored as."""


def with_bias(result: Neutral, bias: Tensor | None) -> Neutral:
    """``result`` with another bias."""
    return replace(result, bias=bias)


def on_device(result: Neutral, device: str) -> Neutral:
    """``result`` with its tensors on ``device``."""
    parts = {f.name: getattr(result, f.name) for f in fields(result)}
    moved: dict[str, Any] = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
    return replace(result, **moved)


def stacked(results: Sequence[Neutral]) -> Neutral:
    """Linears of one input as one: their outputs (N) one after the other, as fused projections are stored.

    Raises InputError for results that have no common form: other kinds, bits or groups, or blocks that cross a border.
    """
    first = results[0]
    if len(results) == 1:
        return first
    biases = [r.bias for r in results]
    if any((bias is None) != (biases[0] is None) for bias in biases):
        raise InputError("fused linear", "some of its parts have a bias and some have none", "a bias for all or for none")
    bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    if all(isinstance(r, GroupedInt) for r in results):
        ints = [r for r in results if isinstance(r, GroupedInt)]
        orders = [r.g_idx for r in ints]
        same = all(
            (o is None and orders[0] is None) or (o is not None and orders[0] is not None and torch.equal(o, orders[0])) for o in orders
        )
        if len({(r.bits, r.scales.shape[1]) for r in ints}) == 1 and same:
            codes, scales, zeros = (torch.cat([getattr(r, name) for r in ints]) for name in ("codes", "scales", "zeros"))
            return GroupedInt(codes, scales, zeros, ints[0].bits, bias, orders[0])
    if all(isinstance(r, Codebook) for r in results):
        books = [r for r in results if isinstance(r, Codebook)]
        if len({(r.kind, r.block_size, r.dtype) for r in books}) == 1 and all(r.codes.numel() % r.block_size == 0 for r in books[:-1]):
            codes, absmax = (torch.cat([getattr(r, name) for r in books]) for name in ("codes", "absmax"))
            return Codebook(codes, absmax, books[0].kind, books[0].block_size, books[0].dtype, bias)
    if all(isinstance(r, Scaled) for r in results):
        scaled = [r for r in results if isinstance(r, Scaled)]
        rows = all(r.scales.shape[:1] == r.values.shape[:1] for r in scaled)
        blocks = all(r.scales.dim() == 2 and r.values.shape[0] % 128 == 0 for r in scaled[:-1])
        if (rows or blocks) and len({(r.values.dtype, r.scales.shape[1:], r.divisor) for r in scaled}) == 1:
            return Scaled(torch.cat([r.values for r in scaled]), torch.cat([r.scales for r in scaled]), bias, scaled[0].divisor)
    if all(isinstance(r, SuperBlock) for r in results):
        supers = [r for r in results if isinstance(r, SuperBlock)]
        if len({r.kind for r in supers}) == 1:
            return SuperBlock(torch.cat([r.blocks for r in supers]), supers[0].kind, bias)
    raise InputError("fused linear", "its parts were quantized differently, or a block crosses their border", "one scheme for all of them")


class Codec(Protocol):
    """Between the stored parts of one linear and its neutral result."""

    @property
    def name(self) -> str: ...

    def pack(self, result: Any, geometry: Geometry) -> dict[str, Tensor]:
        """Stored parts by suffix, in the dtypes and stored shapes of ``geometry``. ``result`` is of the kind that ``unpack`` gives."""

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> Neutral:
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
