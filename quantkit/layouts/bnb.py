"""bitsandbytes 4 bits, NF4 and FP4, plain and double-quantized (``formats.md`` 5.1 to 5.3, cuts 9.5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.formats.quant_state import parse_quant_state, quant_state_json
from quantkit.geometry import Geometry
from quantkit.layouts.base import Codebook
from quantkit.ops.codebook import (
    CODEBOOKS,
    NESTED_MAP,
    ZERO_CODE,
    dequantize_4bit,
    dequantize_absmax,
    pack_nibbles,
    quantize_absmax,
    unpack_nibbles,
)
from quantkit.ops.dtypes import FLOAT_DTYPES

DTYPE_WORDS = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


def state_suffix(geometry: Geometry) -> str:
    """The part that holds the quant state."""
    return f"weight.quant_state.bitsandbytes__{geometry.scheme.code}"


def _block_index(geometry: Geometry, device: torch.device) -> Tensor:
    """The number of each block of a cut in the linear that it was cut from, [B] int64."""
    (n0, k0), k, size = geometry.origin, geometry.whole[1], geometry.scheme.group_size
    if k % size:  # rows do not hold whole blocks, so a cut holds whole rows
        count = -(-geometry.n * geometry.k // size)
        return torch.arange(count, device=device) + n0 * k // size
    rows = torch.arange(n0, n0 + geometry.n, device=device).unsqueeze(1) * (k // size)
    columns = torch.arange(k0 // size, (k0 + geometry.k) // size, device=device)
    return (rows + columns).reshape(-1)


class Bnb4Codec:
    """Codec of NF4 and FP4. Parts come and go in the shapes of their axes; on disk some lie flattened."""

    name = "bnb4"

    def pack(self, result: Codebook, geometry: Geometry) -> dict[str, Tensor]:
        shapes = {part.suffix: geometry.shape(part) for part in geometry.parts}
        offset = None
        parts = {
            "weight": pack_nibbles(result.codes.reshape(-1), ZERO_CODE[result.kind]).reshape(shapes["weight"]),
            "weight.quant_map": CODEBOOKS[result.kind].clone(),
        }
        if geometry.scheme.double_quant:
            q8, nested, mean = quantize_absmax(result.absmax)
            offset = float(mean)
            parts["weight.absmax"] = q8.reshape(shapes["weight.absmax"])
            parts["weight.nested_absmax"], parts["weight.nested_quant_map"] = nested, NESTED_MAP.clone()
        else:
            parts["weight.absmax"] = result.absmax.reshape(shapes["weight.absmax"])
        state = quant_state_json(result.kind, result.block_size, DTYPE_WORDS[result.dtype], geometry.whole, offset)
        parts[state_suffix(geometry)] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        return parts if result.bias is None else {**parts, "bias": result.bias}

    def unpack(self, parts: Mapping[str, Tensor], geometry: Geometry) -> Codebook:
        """As ``Codec.unpack``. Raises InputError when the quant state is malformed or speaks of another linear."""
        suffix = state_suffix(geometry)
        state = parse_quant_state(bytes(parts[suffix].cpu().numpy().tobytes()), suffix)
        scheme = geometry.scheme
        if (state.kind, state.block_size, state.shape) != (scheme.code, scheme.group_size, geometry.whole):
            found = f"is for {state.kind} in blocks of {state.block_size} and a shape of {list(state.shape)}"
            raise InputError(
                suffix, found, f"{scheme.code}, {scheme.group_size} and {list(geometry.whole)} as config.json and the parts say"
            )
        if scheme.double_quant != (state.nested_offset is not None):
            raise InputError(suffix, "and the parts disagree on double quantization", "nested parts and a nested_offset, or neither")
        absmax = parts["weight.absmax"].reshape(-1)
        if state.nested_offset is not None:
            offset = torch.tensor(state.nested_offset, dtype=torch.float32, device=absmax.device)
            index = _block_index(geometry, absmax.device)
            absmax = dequantize_absmax(absmax, parts["weight.nested_absmax"], offset, parts["weight.nested_quant_map"], index)
        codes = unpack_nibbles(parts["weight"], geometry.n * geometry.k).reshape(geometry.n, geometry.k)
        return Codebook(codes, absmax.float(), state.kind, state.block_size, FLOAT_DTYPES[state.dtype], parts.get("bias"))

    def dequant(self, parts: Mapping[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
        """As ``Codec.dequant``; the values are rounded to the dtype of the weight that was quantized first, as bitsandbytes does."""
        book = self.unpack(parts, geometry)
        dense = dequantize_4bit(book.codes.reshape(-1), book.absmax, parts["weight.quant_map"], book.block_size, book.dtype)
        return dense.reshape(geometry.n, geometry.k).to(dtype)
