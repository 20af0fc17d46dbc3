"""The quant state of 4-bit bitsandbytes tensors: its bytes, and what a stranger may put there."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.formats.quant_state import BLOCK_SIZES, DTYPES, KINDS, SIZE_LIMIT, QuantState, parse_quant_state, quant_state_json
from quantkit.geometry import BNB_BLOCKS, NESTED_BLOCK

NESTED: dict[str, Any] = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "bfloat16",
    "shape": [2, 64],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 1.25,
}


def test_writes_the_bytes_of_the_format() -> None:
    plain = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}'
    nested = (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64], '
        b'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.25}'
    )
    assert quant_state_json("nf4", 64, "float32", (2, 64), None) == plain
    assert quant_state_json("nf4", 64, "bfloat16", (2, 64), 1.25) == nested
    assert (len(plain), len(nested)) == (76, 152)


def test_blocks_are_those_of_the_geometry() -> None:
    assert BLOCK_SIZES == BNB_BLOCKS
    assert NESTED["nested_blocksize"] == NESTED_BLOCK


@given(
    st.sampled_from(KINDS),
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 1 << 20), st.integers(1, 1 << 20)),
    st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_reads_what_it_writes(kind: str, block: int, dtype: str, shape: tuple[int, int], offset: float | None) -> None:
    data = quant_state_json(kind, block, dtype, shape, offset)
    assert len(data) < 300
    state = parse_quant_state(data, "x")
    assert state == QuantState(kind, block, dtype, shape, offset)
    if offset is not None:
        assert struct.pack("<d", state.nested_offset) == struct.pack("<d", offset)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_type": "int4"},
        {"quant_type": ["nf4"]},
        {"blocksize": 16},
        {"blocksize": 65},
        {"blocksize": 64.0},
        {"blocksize": True},
        {"blocksize": "64"},
        {"dtype": "float64"},
        {"dtype": None},
        {"shape": None},
        {"shape": [2]},
        {"shape": [2, 64, 1]},
        {"shape": [2, 0]},
        {"shape": [-2, 64]},
        {"shape": [2, 64.0]},
        {"shape": [2, True]},
        {"shape": [1 << 63, 64]},
        {"shape": {"0": 2}},
        {"nested_blocksize": 128},
        {"nested_dtype": "float16"},
        {"nested_offset": float("nan")},
        {"nested_offset": float("inf")},
        {"nested_offset": 1e39},
        {"nested_offset": 10**400},
        {"nested_offset": "1.25"},
        {"nested_offset": None},
        {"nested_offset": True},
        {"extra": 1},
    ],
    ids=str,
)
def test_refuses_a_value_that_no_reader_could_honour(change: dict[str, Any]) -> None:
    data = json.dumps(NESTED | change).encode()
    with pytest.raises(InputError, match=r"^layer\.weight: ") as caught:
        parse_quant_state(data, "layer.weight")
    assert "\n" not in caught.value.line and len(caught.value.line) < 500


@pytest.mark.parametrize("missing", list(NESTED))
def test_refuses_a_state_that_is_not_whole(missing: str) -> None:
    with pytest.raises(InputError, match="quant state"):
        parse_quant_state(json.dumps({key: value for key, value in NESTED.items() if key != missing}).encode(), "x")


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[1]", b"{", b"\xff\xfe", b'{"quant_type": "nf4", "quant_type": "fp4"}', b"[" * 2000, b"{}" + b" " * SIZE_LIMIT],
    ids=range(8),
)
def test_refuses_what_is_no_object(data: bytes) -> None:
    with pytest.raises(InputError):
        parse_quant_state(data, "x")


def test_does_not_write_what_it_would_not_read() -> None:
    for arguments in (
        ("nf3", 64, "float32", (2, 2), None),
        ("nf4", 48, "float32", (2, 2), None),
        ("nf4", 64, "float32", (2, 2), float("nan")),
    ):
        with pytest.raises(InputError):
            quant_state_json(*arguments)
