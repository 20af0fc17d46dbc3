"""AutoAWQ: ``version: gemm``, 4-bit codes packed along N in an interleaved order, and the older ``gemv`` (``formats.md`` 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.geometry import Geometry, gemv_columns
from quantkit.layouts.base import GroupedInt, dequantized
from quantkit.layouts.words import pack_rows, unpack_rows
from quantkit.ops.dtypes import TORCH_DTYPES

NIBBLE_OF_ELEMENT = (0, 4, 1, 5, 2, 6, 3, 7)
"""Element ``e`` of eight consecutive outputs sits in this nibble of its word."""


def pack_words(codes: Tensor) -> Tensor:
    """``codes [R, N]`` (0..15) -> int32 ``[R, N/8]``, eight outputs to a word, interleaved."""
    eights = codes.reshape(codes.shape[0], -1, 8).to(torch.int64)  # [R, N/8, 8]
    shifts = torch.tensor([4 * nibble for nibble in NIBBLE_OF_ELEMENT], dtype=torch.int64, device=codes.device)
    return (eights << shifts).sum(-1).to(torch.int32)  # int64 -> int32 keeps the low 32 bits


def unpack_words(words: Tensor) -> Tensor:
    """Inverse of ``pack_words``: int32 ``[R, N/8]`` -> uint8 codes ``[R, N]``."""
    shifts = torch.tensor([4 * nibble for nibble in NIBBLE_OF_ELEMENT], dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(-2)


def _refuse_other(result: GroupedInt, layout: str) -> None:
    """Raise InputError for what AWQ cannot hold: other than 4 bits, or scattered groups."""
    if result.bits != 4:
        raise InputError(f"layout {layout}", f"{result.bits} bits", "4")
    if result.g_idx is not None:
        raise InputError(f"layout {layout}", "groups scattered over the input (act-order)", "groups of consecutive inputs")


class AwqCodec:
    """Codec of the AWQ gemm layout."""

    name = "awq"

    def pack(self, result: GroupedInt, geometry: Geometry) -> dict[str, Tensor]:
        _refuse_other(result, self.name)
        parts = {
            "qweight": pack_words(result.codes.T.contiguous()),  # [K, N/8]
            "qzeros": pack_words(result.zeros.T.contiguous()),  # [G, N/8]
            "scales": result.scales.T.contiguous().to(TORCH_DTYPES[geometry.scheme.scale_dtype]),  # [G, N]
        }
        return parts if result.bias is None else {**parts, "bias": result.bias}

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> GroupedInt:
        return GroupedInt(
            codes=unpack_words(parts["qweight"]).T.contiguous(),
            scales=parts["scales"].T.contiguous(),
            zeros=unpack_words(parts["qzeros"]).T.contiguous(),
            bits=4,
            bias=parts.get("bias"),
        )

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantized(self.unpack(parts, geometry), dtype)


class AwqGemvCodec:
    """Codec of the AWQ gemv layout: output-major, natural order, a padded group axis."""

    name = "awq_gemv"

    def pack(self, result: GroupedInt, geometry: Geometry) -> dict[str, Tensor]:
        _refuse_other(result, self.name)
        words, groups = gemv_columns(geometry.whole[1], geometry.scheme.group_size), result.scales.shape[1]
        pad = (0, 8 * words - groups)
        zeros = torch.nn.functional.pad(result.zeros, pad)
        scales = torch.nn.functional.pad(result.scales, pad).to(TORCH_DTYPES[geometry.scheme.scale_dtype])
        parts = {
            "qweight": pack_rows(result.codes.T, 4).T.contiguous(),  # [N, K/8]
            "qzeros": pack_rows(zeros.T, 4).T.contiguous(),  # [N, Z]
            "scales": scales.contiguous(),  # [N, 8Z]
        }
        return parts if result.bias is None else {**parts, "bias": result.bias}

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> GroupedInt:
        first = geometry.origin[1] // geometry.scheme.group_size
        groups = slice(first, first + geometry.k // geometry.scheme.group_size)
        zeros = unpack_rows(parts["qzeros"].T, 4, parts["scales"].shape[1]).T
        return GroupedInt(
            codes=unpack_rows(parts["qweight"].T, 4, geometry.k).T.contiguous(),
            scales=parts["scales"][:, groups].contiguous(),
            zeros=zeros[:, groups].contiguous(),
            bits=4,
            bias=parts.get("bias"),
        )

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantized(self.unpack(parts, geometry), dtype)
