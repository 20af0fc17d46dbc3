"""safetensors headers and indexes: the reference library agrees, and each defect is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from quantkit.errors import InputError
from quantkit.formats.index import encode_index, read_index
from quantkit.formats.safetensors import DTYPE_BYTES, TensorEntry, canonical_order, encode_header, parse_header, read_header

VECTOR = (
    b'{"__metadata__":{"format":"pt"},"a.g_idx":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},'
    b'"a.bias":{"dtype":"F16","shape":[1],"data_offsets":[8,10]},"b.scales":{"dtype":"F16","shape":[1,8],"data_offsets":[10,26]}}  '
)


def raw(head: Any, *, length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_known_vector() -> None:
    unordered = [
        TensorEntry("b.scales", "F16", (1, 8), 10, 26),
        TensorEntry("a.g_idx", "I32", (2,), 0, 8),
        TensorEntry("a.bias", "F16", (1,), 8, 10),
    ]
    assert encode_header(canonical_order(unordered), {"format": "pt"}) == struct.pack("<Q", 216) + VECTOR
    header = parse_header(struct.pack("<Q", 216) + VECTOR, "file")
    assert (header.data_start, header.data_bytes, header.metadata) == (224, 26, {"format": "pt"})
    assert list(header.entries.values()) == canonical_order(unordered)


def test_order_and_bytes_are_those_of_the_reference_writer(tmp_path: Path) -> None:
    kinds = {
        "F64": "f8",
        "I64": "i8",
        "F32": "f4",
        "I32": "i4",
        "F16": "f2",
        "I16": "i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
        "U64": "u8",
        "U32": "u4",
    }
    tensors = {f"{letter}.{name}": np.ones((2, 3), kind) for name, kind in kinds.items() for letter in "ba"}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert list(header.entries.values()) == canonical_order(header.entries.values())
    written = (tmp_path / "x.safetensors").read_bytes()[: header.data_start]
    assert encode_header(header.entries.values(), header.metadata) == written


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes), max_size=6), st.sampled_from([8, 64, 4096]))
def test_what_is_written_is_read_back(tensors: dict[str, tuple[str, list[int]]], align: int) -> None:
    entries, end = [], 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[dtype]
        entries.append(TensorEntry(name, dtype, tuple(shape), begin, end))
    data = encode_header(entries, {"format": "pt"}, align)
    header = parse_header(data, "file")
    assert (list(header.entries.values()), header.data_start) == (entries, len(data))
    assert len(data) % align == 0


def test_the_reference_library_reads_an_aligned_file(tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32)
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_header([TensorEntry("größe", "F32", (2, 3), 0, 24)], {"format": "pt"}, 4096) + data.tobytes())
    assert path.stat().st_size == 4096 + 24
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert np.array_equal(load_file(path)["größe"], data.reshape(2, 3))


DEFECTS = {
    "seven bytes": (b"1234567", "at least 8"),
    "a header longer than the file": (raw({}, length=3), "is it truncated"),
    "a length of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "at most 100000000"),
    "no JSON": (raw(b"{nope"), "not JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "nested too deeply": (raw(b'{"a":' + b"[" * 100_000), "not JSON"),
    "an array": (raw(b"[]"), "begins with b'['"),
    "a space first": (raw(b" {}"), "begins with b' '"),
    "half a surrogate pair": (raw(b'{"\\uD83d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "surrogates not allowed"),
    "a name twice": (
        raw(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'),
        "twice",
    ),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "string values"),
    "a missing key": (raw({"a": {"dtype": "F32", "shape": [2]}}), "data_offsets"),
    "a key too many": (raw({"a": {**entry(), "x": 1}}), "is not a tensor entry"),
    "an unknown dtype": (raw({"a": entry(dtype="Q4")}), "dtype 'Q4'"),
    "a negative size": (raw({"a": entry(shape=[-2])}), "has shape"),
    "a size that is no number": (raw({"a": entry(shape=[2.0])}), "has shape"),
    "a size of true": (raw({"a": entry(shape=[True], offsets=(0, 4))}), "has shape"),
    "nine dims": (raw({"a": entry(shape=[1] * 9, offsets=(0, 4))}), "has shape"),
    "sizes that overflow": (raw({"a": entry(shape=[1 << 40, 1 << 40])}), "has 8 bytes of data"),
    "offsets in the wrong order": (raw({"a": entry(offsets=(8, 0))}), "where it begins"),
    "three offsets": (raw({"a": entry(offsets=(0, 4, 8))}), "where it begins"),
    "a length that is not the shape's": (raw({"a": entry(offsets=(0, 12))}), "has 12 bytes of data, expected 8"),
    "a gap": (raw({"a": entry(offsets=(4, 12))}), "leaves a gap"),
    "an overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}), "overlaps"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_refused_in_one_line(defect: str) -> None:
    data, what = DEFECTS[defect]
    with pytest.raises(InputError) as caught:
        parse_header(data, "file")
    assert what in caught.value.line
    assert "\n" not in caught.value.line


def test_every_prefix_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": np.ones(3, np.float32)}, whole)
    data, path = whole.read_bytes(), tmp_path / "cut.safetensors"
    read_header(whole)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(InputError):
            read_header(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(InputError, match="bytes after its last tensor"):
        read_header(path)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(VECTOR) + 7), st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(place: int, value: int) -> None:
    data = bytearray(struct.pack("<Q", 216) + VECTOR)
    data[place] = value
    try:
        header = parse_header(bytes(data), "file")
    except InputError:
        return
    assert sum(found.nbytes for found in header.entries.values()) == header.data_bytes


# the index


def test_an_index_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(encode_index({"b": "two.safetensors", "a": "one.safetensors"}, 12))
    assert read_index(path) == {"a": tmp_path / "one.safetensors", "b": tmp_path / "two.safetensors"}
    assert json.loads(path.read_bytes())["metadata"] == {"total_size": 12}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON"),
        ("[1]", "holds list"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "twice"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "plain name"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "plain name"),
        ('{"weight_map": {"a": ""}}', "plain name"),
        ('{"weight_map": {"a": "..\\\\x"}}', "plain name"),
        ('{"weight_map": {"a": "x\\u0000y"}}', "plain name"),
        ('{"weight_map": {"a": "x", "\\ud800": "x"}}', "surrogates not allowed"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(InputError, match=what):
        read_index(path)


def test_a_whole_surrogate_pair_is_a_character() -> None:
    name = "\U0001f600"
    header = parse_header(raw(json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()), "x")
    assert list(header.entries) == [name]
