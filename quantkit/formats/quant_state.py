"""The JSON that rides along with a 4-bit bitsandbytes weight, as bytes of a uint8 tensor (``formats.md`` 5.1).

Knows names and numbers, never the tensors they describe.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import InputError
from quantkit.formats.jsonfile import parse_object

KINDS = ("nf4", "fp4")
DTYPES = ("float32", "float16", "bfloat16")
BLOCK_SIZES = tuple(2**power for power in range(5, 13))
NESTED_BLOCK_SIZE = 256
SIZE_LIMIT = 4096
"""Bytes; the longest honest one has fewer than 300."""
DIM_LIMIT = 1 << 40
_PLAIN = ("quant_type", "blocksize", "dtype", "shape")
_NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")


@dataclass(frozen=True, slots=True)
class QuantState:
    """What a 4-bit weight was: codebook, block length over the flattened ``shape`` (N, K), and the dtype that it decodes to.

    ``nested_offset``: the mean of its absmax, of double quantization; None where absmax is stored as float32.
    """

    kind: str
    block_size: int
    dtype: str
    shape: tuple[int, int]
    nested_offset: float | None


def quant_state_json(kind: str, block_size: int, dtype: str, shape: tuple[int, int], nested_offset: float | None) -> bytes:
    """The bytes that bitsandbytes writes of this state. ``nested_offset`` is the double that equals the float32 offset."""
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block_size, "dtype": dtype, "shape": list(shape)}
    if nested_offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": nested_offset}
    _checked(state, "quant state")
    return json.dumps(state).encode()


def parse_quant_state(data: bytes, where: str) -> QuantState:
    """The state that ``data`` holds. Raises InputError, blaming ``where``, for whatever a reader could not honour."""
    if len(data) > SIZE_LIMIT:
        raise InputError(where, f"is a quant state of {len(data)} bytes", f"at most {SIZE_LIMIT}")
    return _checked(parse_object(data, where, "a quant state of bitsandbytes"), where)


def _checked(state: Mapping[str, Any], where: str) -> QuantState:
    nested = bool(state.keys() & set(_NESTED))
    keys = _PLAIN + _NESTED if nested else _PLAIN
    if state.keys() != set(keys):
        raise InputError(where, f"is a quant state with {', '.join(map(repr, state)):.200}", f"exactly {', '.join(keys)}")
    _one_of(state, "quant_type", KINDS, where)
    _one_of(state, "blocksize", BLOCK_SIZES, where)
    _one_of(state, "dtype", DTYPES, where)
    shape = state["shape"]
    if not isinstance(shape, list) or len(shape) != 2 or any(type(dim) is not int or not 0 < dim <= DIM_LIMIT for dim in shape):
        raise InputError(where, f"states shape {shape!r:.100}", "two positive integers [N, K]")
    if nested:
        _one_of(state, "nested_blocksize", (NESTED_BLOCK_SIZE,), where)
        _one_of(state, "nested_dtype", ("float32",), where)
        if not _is_float32(state["nested_offset"]):
            raise InputError(where, f"states nested_offset {state['nested_offset']!r:.100}", "a finite float32")
    offset = float(state["nested_offset"]) if nested else None
    return QuantState(state["quant_type"], state["blocksize"], state["dtype"], (shape[0], shape[1]), offset)


def _one_of(state: Mapping[str, Any], key: str, allowed: tuple[object, ...], where: str) -> None:
    # By type as well: True equals 1, and 64.0 would be written back as another text.
    if not any(type(state[key]) is type(value) and state[key] == value for value in allowed):
        raise InputError(where, f"states {key} {state[key]!r:.100}", f"one of {', '.join(map(str, allowed))}")


def _is_float32(value: object) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(struct.unpack("<f", struct.pack("<f", value))[0])
    except (OverflowError, struct.error):
        return False
