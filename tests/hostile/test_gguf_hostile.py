"""GGUF files from strangers: every lie is an InputError that names the file and the field, in little time and memory."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantkit.checkpoint.gguf import GgufSource
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.cli import run
from quantkit.errors import InputError
from quantkit.formats import gguf as formats_gguf
from quantkit.formats.gguf import (
    BLOCK_TYPES,
    MAX_HEADER_BYTES,
    SCALARS,
    Value,
    boolean,
    encode_header,
    f32,
    i32,
    padded,
    read_gguf,
    tensor_bytes,
    texts,
    u64,
)
from quantkit.formats.gguf import array as array_value
from quantkit.formats.gguf import text as text_value
from quantkit.formats.gguf import u32 as u32_value

HUGE = (1 << 63) - 1
HIDDEN, FFN, VOCAB, HEADS = 8, 8, 4, 2


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def info(name: bytes, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}qIQ", len(sizes), *sizes, kind, offset)


def header(*, keys: tuple[bytes, ...] = (), infos: tuple[bytes, ...] = (), version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<Iqq", version, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)


def with_data(raw: bytes, nbytes: int = 4096, alignment: int = 32) -> bytes:
    return raw + bytes(-len(raw) % alignment) + bytes(nbytes)


def tiny_model() -> bytes:
    """A llama of one layer, F32, with every kind of key; nothing follows its last tensor."""
    facts = {"block_count": 1, "context_length": 16, "embedding_length": HIDDEN, "feed_forward_length": FFN, "attention.head_count": HEADS}
    keys = [key(b"general.architecture", 8, text(b"llama")), key(b"general.alignment", 4, u32(32))]
    keys += [key(f"llama.{name}".encode(), 4, u32(value)) for name, value in facts.items()]
    keys += [key(b"llama.attention.head_count_kv", 9, array(5, 1, u32(1)))]
    keys += [key(b"llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5))]
    keys += [key(b"tokenizer.ggml.tokens", 9, array(8, VOCAB, b"".join(text(t.encode()) for t in "abé😀")))]
    keys += [key(b"tokenizer.ggml.token_type", 9, array(5, VOCAB, u32(1) * VOCAB)), key(b"tokenizer.ggml.eos_token_id", 4, u32(1))]
    keys += [key(b"tokenizer.ggml.add_bos_token", 7, b"\x01")]
    shapes = {"token_embd": (HIDDEN, VOCAB), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)}
    shapes |= {
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN, 4),
        "blk.0.attn_v": (HIDDEN, 4),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
    }
    shapes |= {"blk.0.ffn_gate": (HIDDEN, FFN), "blk.0.ffn_up": (HIDDEN, FFN), "blk.0.ffn_down": (FFN, HIDDEN)}
    infos, data = [], b""
    for name, sizes in shapes.items():
        infos.append(info(f"{name}.weight".encode(), sizes, 0, len(data)))
        data += np.arange(np.prod(sizes), dtype="<f4").tobytes()
        data += bytes(-len(data) % 32)
    raw = header(keys=tuple(keys), infos=tuple(infos))
    return raw + bytes(-len(raw) % 32) + data


@contextmanager
def modest(seconds: float = 15.0, nbytes: int = 8 << 20) -> Iterator[None]:
    """Fail when what runs inside takes long or needs much memory."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        yield
    finally:
        took, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert took < seconds and peak < nbytes, (took, peak)


def refused(path: Path, raw: bytes, match: str) -> None:
    path.write_bytes(raw)
    with modest(), pytest.raises(InputError, match=match) as caught:
        read_gguf(path)
    assert caught.value.where.startswith(str(path)) and "\n" not in caught.value.line and len(caught.value.line) < 1000


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "m.gguf"


LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", r"magic: needs 4 bytes, 0 remain"),
    "bad magic": (header(magic=b"GGML"), r"magic: is b'GGML' \(at byte 4\), expected b'GGUF'"),
    "version 0": (header(version=0), r"version: is 0 \(at byte 8\), expected one of 2, 3"),
    "version 1": (header(version=1), r"version: is 1 "),
    "version 4": (header(version=4), r"version: is 4 "),
    "big-endian": (b"GGUF" + struct.pack(">Iqq", 3, 0, 0), r"version: is byte-swapped: the file is big-endian"),
    "tensors -1": (b"GGUF" + struct.pack("<Iqq", 3, -1, 0), r"tensor count: is -1 \(at byte 16\)"),
    "tensors 2^63-1": (
        b"GGUF" + struct.pack("<Iqq", 3, HUGE, 0),
        r"tensor count: is 9223372036854775807 .*, expected 0 to 0: 8 bytes remain",
    ),
    "keys -1": (b"GGUF" + struct.pack("<Iqq", 3, 0, -1), r"key count: is -1 \(at byte 24\)"),
    "keys 2^63-1": (b"GGUF" + struct.pack("<Iqq", 3, 0, HUGE), r"key count: is 9223372036854775807 "),
    "one key too many": (b"GGUF" + struct.pack("<Iqq", 3, 0, 2) + bytes(27), r"key count: is 2 .*, expected 0 to 1: 27 bytes remain"),
    "one tensor too many": (b"GGUF" + struct.pack("<Iqq", 3, 2, 0) + bytes(41), r"tensor count: is 2 .*, expected 0 to 1: 49 bytes remain"),
    "key longer than the file": (
        header(keys=(struct.pack("<Q", 60_000) + b"general.name" + bytes(9),)),
        r"key 0: has a string of 60000 bytes, 21 remain",
    ),
    "key longer than keys are": (
        header(keys=(text(b"x" * 65537) + bytes(9),)),
        r"key 0: has a string of 65537 bytes, .* expected at most 65536",
    ),
    "key of 2^64-1 bytes": (header(keys=(b"\xff" * 8 + bytes(9),)), r"key 0: has a string of 18446744073709551615 bytes"),
    "empty key": (header(keys=(key(b"", 4, u32(1)),)), r"key 0: is empty"),
    "key not UTF-8": (header(keys=(key(b"\xff\xfe", 4, u32(1)),)), r"key 0: is not UTF-8"),
    "duplicate key": (header(keys=(key(b"a", 4, u32(1)), key(b"a", 4, u32(1)))), r"key 'a': is there twice"),
    "value type 13": (header(keys=(key(b"a", 13, u32(1)),)), r"key 'a': has value type 13 .*, expected 0 to 12"),
    "value type 2^32-1": (header(keys=(key(b"a", (1 << 32) - 1, u32(1)),)), r"key 'a': has value type 4294967295"),
    "bool 2": (header(keys=(key(b"a", 7, b"\x02"),)), r"key 'a': has a bool that is neither 0 nor 1"),
    "bools 2": (header(keys=(key(b"a", 9, array(7, 3, b"\x01\x00\x02")),)), r"key 'a': has a bool that is neither"),
    "array of arrays": (header(keys=(key(b"a", 9, array(9, 1, array(4, 0))),)), r"key 'a': is an array of arrays"),
    "array of type 13": (header(keys=(key(b"a", 9, array(13, 1)),)), r"key 'a': has element type 13"),
    "array of 2^63 bytes": (header(keys=(key(b"a", 9, array(0, 1 << 63)),)), r"key 'a': states 9223372036854775808 elements"),
    "array of 2^63 strings": (header(keys=(key(b"a", 9, array(8, 1 << 63)),)), r"key 'a': states 9223372036854775808 elements"),
    "array of 2^61 u64": (header(keys=(key(b"a", 9, array(10, 1 << 61, bytes(8))),)), r"states 2305843009213693952 .* at most 1: 8 bytes"),
    "array one longer than the file": (
        header(keys=(key(b"a", 9, array(4, 3, bytes(11))),)),
        r"states 3 elements .* at most 2: 11 bytes remain",
    ),
    "string longer than the file": (
        header(keys=(key(b"a", 8, struct.pack("<Q", 5) + b"abcd"),)),
        r"key 'a': has a string of 5 bytes, 4 remain",
    ),
    "string of 2^63 bytes": (
        header(keys=(key(b"a", 8, struct.pack("<Q", 1 << 63) + b"abcd"),)),
        r"key 'a': has a string of 9223372036854775808",
    ),
    "strings longer than the file": (
        header(keys=(key(b"a", 9, array(8, 2, text(b"xyz") + struct.pack("<Q", 1 << 62))),)),
        r"key 'a', string 1: needs 4611686018427387912 bytes, 8 remain",
    ),
    "strings that stop": (header(keys=(key(b"a", 9, array(8, 2, text(b"x" * 9))),)), r"key 'a', string 1: needs 8 bytes, 0 remain"),
    "strings not UTF-8": (header(keys=(key(b"a", 9, array(8, 2, text(b"x") + text(b"\xc3"))),)), r"key 'a': string 1 is not UTF-8"),
    "string not UTF-8": (header(keys=(key(b"a", 8, text(b"\xc3")),)), r"key 'a': is not UTF-8"),
    "alignment 13": (header(keys=(key(b"general.alignment", 4, u32(13)),)), r"key 'general\.alignment': is 13 .*, expected a power of two"),
    "alignment 0": (header(keys=(key(b"general.alignment", 4, u32(0)),)), r"general\.alignment': is 0"),
    "alignment 2 MiB": (header(keys=(key(b"general.alignment", 4, u32(2 << 20)),)), r"general\.alignment': is 2097152"),
    "alignment u64": (
        header(keys=(key(b"general.alignment", 10, struct.pack("<Q", 32)),)),
        r"'general\.alignment': has value type 10 .*, expected 4",
    ),
    "alignment string": (header(keys=(key(b"general.alignment", 8, text(b"32")),)), r"'general\.alignment': has value type 8"),
    "split of another name": (
        header(keys=(key(b"split.no", 2, b"\x00\x00"), key(b"split.count", 2, b"\x03\x00"))),
        r"key 'split\.no': this is part 1 of 3 of a split model, and is called 'm\.gguf', expected 'm-00001-of-00003\.gguf'",
    ),
    "split without number": (header(keys=(key(b"split.count", 2, b"\x03\x00"),)), r"key 'split\.no': is missing"),
    "split of 65536": (header(keys=(key(b"split.count", 4, u32(65536)),)), r"key 'split\.count': is 65536, expected .* 0 to 65535"),
    "split text": (header(keys=(key(b"split.count", 8, text(b"3")),)), r"split\.count': is '3'"),
    "split -1": (header(keys=(key(b"split.count", 5, b"\xff" * 4),)), r"split\.count': is -1"),
    "split array": (header(keys=(key(b"split.count", 9, array(0, 2, b"\x01\x01")),)), r"split\.count': is array"),
    "name too long": (
        with_data(header(infos=(info(b"n" * 64, (4,)),))),
        r"name of tensor 0: has a string of 64 bytes, .*, expected at most 63",
    ),
    "name empty": (with_data(header(infos=(info(b"", (4,)),))), r"name of tensor 0: is ''"),
    "name with an escape": (with_data(header(infos=(info(b"\x1b[31m", (4,)),))), r"name of tensor 0: is '\\x1b\[31m'"),
    "name twice": (with_data(header(infos=(info(b"a", (4,)), info(b"a", (4,), 0, 32)))), r"tensor 'a': is there twice"),
    "5 dimensions": (with_data(header(infos=(info(b"a", (1, 1, 1, 1, 1)),))), r"tensor 'a': has 5 dimensions .*, expected at most 4"),
    "2^32-1 dimensions": (with_data(header(infos=(text(b"a") + u32((1 << 32) - 1),))), r"tensor 'a': has 4294967295 dimensions"),
    "negative size": (with_data(header(infos=(info(b"a", (4, -1)),))), r"tensor 'a': has sizes \[4, -1\]"),
    "two negative sizes": (with_data(header(infos=(info(b"a", (-4, -1)),))), r"tensor 'a': has sizes \[-4, -1\]"),
    "2^63 elements": (with_data(header(infos=(info(b"a", (1 << 32, 1 << 31)),))), r"tensor 'a': has sizes .* below 2\^63"),
    "2^64 elements": (with_data(header(infos=(info(b"a", (1 << 32, 1 << 32)),))), r"tensor 'a': has sizes .* below 2\^63"),
    "2^63 elements but for a zero": (
        with_data(header(infos=(info(b"a", (1 << 32, 0, 1 << 32)),))),
        r"tensor 'a': has sizes .* below 2\^63",
    ),
    "2^65 bytes": (with_data(header(infos=(info(b"a", (1 << 31, 1 << 31, 2)),))), r"tensor 'a': has sizes .* below 2\^63"),
    "2^64 bytes": (
        with_data(header(infos=(info(b"a", (1 << 31, 1 << 31)),))),
        r"tensor 'a': ends at byte 18446744073709551\d+, the file at",
    ),
    "padding that wraps": (
        with_data(header(infos=(info(b"a", (4, (1 << 30) - 1, (1 << 30) + 1)), info(b"b", (4,), 0, 0)))),
        r"tensor 'b': has offset 0 .*, expected 18446744073709551616: ",
    ),
    "two near 2^63": (
        with_data(header(infos=(info(b"a", (HUGE // 4 - 8,)), info(b"b", (HUGE // 4 - 8,), 0, (1 << 63) - 32)))),
        r"tensor 'a': ends at byte 9223372036854775868, the file at",
    ),
    **{
        f"type {kind}": (with_data(header(infos=(info(b"a", (256,), kind),))), rf"tensor 'a': has type {kind}, which is unknown or removed")
        for kind in (4, 5, 31, 32, 33, 36, 37, 38, 43, 1 << 31)
    },
    "row of half a block": (
        with_data(header(infos=(info(b"a", (48, 2), 2),))),
        r"tensor 'a': has rows of 48 elements .* a multiple of 32 for Q4_0",
    ),
    "rows of half a super-block": (
        with_data(header(infos=(info(b"a", (128, 2), 12),))),
        r"rows of 128 elements .* a multiple of 256 for Q4_K",
    ),
    "offset not aligned": (
        with_data(header(infos=(info(b"a", (4,)), info(b"b", (4,), 0, 16)))),
        r"tensor 'b': has offset 16 .*, expected 32:",
    ),
    "offset with a gap": (
        with_data(header(infos=(info(b"a", (4,)), info(b"b", (4,), 0, 64)))),
        r"tensor 'b': has offset 64 .*, expected 32:",
    ),
    "offset that overlaps": (
        with_data(header(infos=(info(b"a", (16,)), info(b"b", (4,), 0, 32)))),
        r"tensor 'b': has offset 32 .*, expected 64:",
    ),
    "first offset": (with_data(header(infos=(info(b"a", (4,), 0, 32),))), r"tensor 'a': has offset 32 .*, expected 0:"),
    "offset 2^64-32": (with_data(header(infos=(info(b"a", (4,), 0, (1 << 64) - 32),))), r"tensor 'a': has offset 18446744073709551584"),
    "offset of another tensor": (
        with_data(header(infos=(info(b"a", (16,)), info(b"b", (4,), 0, 0)))),
        r"tensor 'b': has offset 0 .*, expected 64:",
    ),
    "another alignment": (
        with_data(header(keys=(key(b"general.alignment", 4, u32(64)),), infos=(info(b"a", (4,)), info(b"b", (4,), 0, 32)))),
        r"tensor 'b': has offset 32 .*, expected 64: tensors follow one another, aligned to 64",
    ),
    "data one byte short": (with_data(header(infos=(info(b"a", (4,)),)), 15), r"tensor 'a': ends at byte 80, the file at 79"),
    "no data": (header(infos=(info(b"a", (4,)),)), r"tensor 'a': ends at byte 80, the file at 57, expected a whole file"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_by_name(tmp_path: Path, name: str) -> None:
    raw, match = LIES[name]
    refused(tmp_path / "m.gguf", raw, match)


@pytest.mark.parametrize("name", [n for n in LIES if n not in ("nothing",)])
def test_bytes_after_the_lie_do_not_make_it_true(tmp_path: Path, name: str) -> None:
    """With room for small lies, the next check must still say no; a file that becomes well formed is fine."""
    path = tmp_path / "m.gguf"
    path.write_bytes(LIES[name][0] + bytes(1 << 16))
    with modest(nbytes=16 << 20):
        try:
            read_gguf(path)
        except InputError as exc:
            assert exc.where.startswith(str(path))
        else:
            truncated = ("array one longer", "string longer than", "key longer than the file", "strings that stop", "one key", "one tensor")
            assert name.startswith((*truncated, "data one byte short", "no data")), "only a cut file may be completed"


def sparse(path: Path, raw: bytes, size: int = 10 << 30) -> Path:
    """A file of ten GiB that takes no room on the disk."""
    path.write_bytes(raw)
    os.truncate(path, size)
    return path


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (array(0, 1 << 30), r"key 'a': ends at byte \d+ .*, expected a header of at most 67108864 bytes"),
        (array(0, (1 << 30) + 1), r"key 'a': states 1073741825 elements .* at most 1073741824"),
        (array(10, 1 << 30), r"key 'a': ends at byte \d+"),
        (array(8, 1, struct.pack("<Q", 1 << 32)), r"key 'a', string 0: ends at byte \d+ .* a header of at most"),
    ],
    ids=["bytes", "more than any array has", "u64", "a string"],
)
def test_a_huge_file_does_not_make_huge_arrays_good(tmp_path: Path, value: bytes, match: str) -> None:
    path = sparse(tmp_path / "m.gguf", header(keys=(key(b"a", 9, value),)))
    with modest(), pytest.raises(InputError, match=match):
        read_gguf(path)
    long = sparse(tmp_path / "n.gguf", header(keys=(key(b"a", 8, struct.pack("<Q", 1 << 32)),)))
    with modest(), pytest.raises(InputError, match=rf"key 'a': has a string of 4294967296 bytes, .* at most {MAX_HEADER_BYTES}"):
        read_gguf(long)


def test_the_counts_of_a_huge_file_are_bounded(tmp_path: Path) -> None:
    for counts, match in (((1 << 17) + 1, 0), "tensor count: is 131073"), ((0, (1 << 16) + 1), "key count: is 65537"):
        path = sparse(tmp_path / "m.gguf", b"GGUF" + struct.pack("<Iqq", 3, *counts))
        with modest(), pytest.raises(InputError, match=match):
            read_gguf(path)


def test_a_header_of_small_strings_ends_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be made of a long header: strings of two bytes take seven times the room in memory. Zeros are empty strings."""
    monkeypatch.setattr(formats_gguf, "MAX_HEADER_BYTES", 1 << 20)
    monkeypatch.setattr(formats_gguf, "FIRST_READ", 1 << 10)
    strings = array(8, 1 << 30, text(b"\xc3\xbf") * 50_000)
    path = sparse(tmp_path / "m.gguf", header(keys=(key(b"a", 9, strings),)), 64 << 30)
    with modest(nbytes=20 << 20), pytest.raises(InputError, match=r"key 'a', string 1\d\d\d\d\d: ends at byte"):
        read_gguf(path)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", tmp_path, tmp_path / "absent.gguf", Path("/dev/zero")):
        with modest(), pytest.raises(InputError):
            read_gguf(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "C:\\\\x", "a/../b", ".", "..", "%s%n", "<b>", "~"])
def test_a_tensor_name_is_only_a_name(tmp_path: Path, name: str) -> None:
    """What looks like a path is the key of a mapping: nothing is opened by it, and no model has such a tensor."""
    path = tmp_path / "m.gguf"
    path.write_bytes(with_data(header(infos=(info(name.encode(), (4,)),))))
    assert list(read_gguf(path).tensors) == [name]
    raw = tiny_model()
    path.write_bytes(raw.replace(text(b"output_norm.weight"), text(name.encode().ljust(18, b"x"))))
    with pytest.raises(InputError, match=r"output_norm\.weight: is missing"):
        GgufSource(read_gguf(path))
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize(
    "name", ["bad magic", "version 4", "big-endian", "tensors -1", "padding that wraps", "array of 2^63 bytes", "no data"]
)
def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(LIES[name][0])
    for command in ("inspect", "plan", "verify"):
        capsys.readouterr()
        arguments = [command, str(path), *(["--tp", "1"] if command == "plan" else [])]
        assert run(arguments) == 2
        found = capsys.readouterr()
        assert found.out == "" and found.err.startswith(f"error: {path}: ") and "Traceback" not in found.err
        assert sum(line.startswith("error: ") for line in found.err.splitlines()) == 1


# split models


def split_key(name: str, value: int, kind: int = 2) -> bytes:
    return key(f"split.{name}".encode(), kind, struct.pack("<H" if kind == 2 else "<i", value))


def part(number: int, count: int, total: int, names: tuple[str, ...] = (), keys: tuple[bytes, ...] = ()) -> bytes:
    """Part ``number`` (from 1): its tensors are F32 ``[4]``."""
    own = (split_key("no", number - 1), split_key("count", count), split_key("tensors.count", total, 5))
    infos = tuple(info(name.encode(), (4,), 0, 32 * index) for index, name in enumerate(names))
    return with_data(header(keys=(*own, *keys), infos=infos), 32 * len(names))


def split(folder: Path, *parts: bytes, count: int = 3) -> Path:
    for number, raw in enumerate(parts, 1):
        (folder / f"m-{number:05d}-of-{count:05d}.gguf").write_bytes(raw)
    return folder / f"m-00001-of-{count:05d}.gguf"


A, B, C = part(1, 3, 4, ("a", "b"), (key(b"k", 4, u32(7)),)), part(2, 3, 4, ("c",)), part(3, 3, 4, ("d",))


def test_a_split_model_is_opened_from_its_first_part(tmp_path: Path) -> None:
    first = split(tmp_path, A, B, C)
    file = read_gguf(first)
    assert [(name, t.file.name) for name, t in file.tensors.items()] == [
        ("a", first.name),
        ("b", first.name),
        ("c", "m-00002-of-00003.gguf"),
        ("d", "m-00003-of-00003.gguf"),
    ]
    assert file.metadata["k"] == 7 and list(file.values()) == ["k"] and len(file.paths) == 3


@pytest.mark.parametrize("number", [2, 3])
def test_another_part_names_the_first(tmp_path: Path, number: int) -> None:
    first = split(tmp_path, A, B, C)
    other = tmp_path / f"m-{number:05d}-of-00003.gguf"
    message = rf"this is part {number} of 3 of a split model, expected the first part, 'm-00001-of-00003\.gguf'"
    with pytest.raises(InputError, match=message) as caught:
        read_gguf(other)
    assert caught.value.where.startswith(str(other)) and "\n" not in caught.value.line
    first.unlink()
    with pytest.raises(InputError, match=message):
        read_gguf(other)


SPLIT_LIES: dict[str, tuple[tuple[bytes, ...], str]] = {
    "a part is missing": ((A, B), r"m-00001-of-00003\.gguf: part 3 of 3, 'm-00003-of-00003\.gguf', is missing, expected all parts"),
    "a part is cut": ((A, B[:-17], C), r"m-00002-of-00003\.gguf: tensor 'c': ends at byte"),
    "a part is empty": ((A, b"", C), r"m-00002-of-00003\.gguf: magic: needs 4 bytes"),
    "parts are swapped": ((A, C, B), r"m-00002-of-00003\.gguf: key 'split\.no': is 2, expected 1"),
    "the first twice": ((A, A, C), r"m-00002-of-00003\.gguf: key 'split\.no': is 0, expected 1"),
    "a part of no split": ((A, with_data(header(infos=(info(b"c", (4,)),))), C), r"m-00002-of-00003\.gguf: key 'split\.no': is missing"),
    "a part of another count": ((A, part(2, 4, 4, ("c",)), C), r"m-00002-of-00003\.gguf: key 'split\.count': is 4, expected 3"),
    "a part of another total": ((A, part(2, 3, 5, ("c",)), C), r"m-00002-of-00003\.gguf: key 'split\.tensors\.count': is 5, expected 4"),
    "a name in two parts": ((A, part(2, 3, 4, ("b",)), C), r"m-00002-of-00003\.gguf: tensor 'b': is in 'm-00001-of-00003\.gguf' too"),
    "a tensor too few": ((A, part(2, 3, 4), C), r"key 'split\.tensors\.count': is 4, and all parts hold 3"),
    "a tensor too many": ((A, part(2, 3, 4, ("c", "e", "f")), C), r"key 'split\.tensors\.count': is 4, and 2 parts hold 5"),
    "a negative total": ((part(1, 3, -1), B, C), r"key 'split\.tensors\.count': is -1, expected a whole number"),
    "no total": (
        (header(keys=(split_key("no", 0), split_key("count", 3))), B, C),
        r"m-00001-of-00003\.gguf: key 'split\.tensors\.count': is missing",
    ),
    "more parts than files": ((part(1, 65535, 4), B, C), r"is called 'm-00001-of-00003\.gguf', expected 'm-00001-of-65535\.gguf'"),
    "a number that is text": ((header(keys=(key(b"split.no", 8, text(b"0")), split_key("count", 3))), B, C), r"key 'split\.no': is '0'"),
}


@pytest.mark.parametrize("name", SPLIT_LIES)
def test_a_lie_about_parts_is_refused_by_name(tmp_path: Path, name: str) -> None:
    parts, match = SPLIT_LIES[name]
    first = split(tmp_path, *parts)
    with modest(), pytest.raises(InputError, match=match) as caught:
        read_gguf(first)
    assert caught.value.where.startswith(str(tmp_path)) and "\n" not in caught.value.line and len(caught.value.line) < 1000


def test_a_split_of_65535_parts_that_are_not_there_ends_at_once(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-65535.gguf"
    first.write_bytes(part(1, 65535, 4, ("a",)))
    with modest(seconds=2), pytest.raises(InputError, match=r"part 2 of 65535, 'm-00002-of-65535\.gguf', is missing"):
        read_gguf(first)


def test_no_part_is_read_outside_the_folder_of_the_first(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    first = split(folder, A, B, C)
    (folder / "m-00002-of-00003.gguf").rename(elsewhere / "part.gguf")
    (folder / "m-00002-of-00003.gguf").symlink_to(elsewhere / "part.gguf")
    with pytest.raises(InputError, match="is a link that leaves the directory"):
        read_gguf(first)
    (folder / "m-00002-of-00003.gguf").unlink()
    os.mkfifo(folder / "m-00002-of-00003.gguf")
    with modest(), pytest.raises(InputError, match="is not a regular file"):
        read_gguf(first)


def test_the_name_of_the_first_part_may_hold_anything_that_a_name_may(tmp_path: Path) -> None:
    for prefix in ("m-00001-of-00003.gguf", "%s", "é 日本", "-"):
        folder = tmp_path / prefix
        folder.mkdir()
        for number, raw in enumerate((A, B, C), 1):
            (folder / f"{prefix}-{number:05d}-of-00003.gguf").write_bytes(raw)
        assert list(read_gguf(folder / f"{prefix}-00001-of-00003.gguf").tensors) == ["a", "b", "c", "d"]


# random metadata and tensors


scalars = st.one_of(
    st.builds(u32_value, st.integers(0, (1 << 32) - 1)),
    st.builds(u64, st.integers(0, (1 << 64) - 1)),
    st.builds(i32, st.integers(-(1 << 31), (1 << 31) - 1)),
    st.builds(f32, st.floats(width=32)),
    st.builds(boolean, st.booleans()),
    st.builds(text_value, st.text(max_size=12)),
    st.builds(texts, st.lists(st.text(max_size=5), max_size=5)),
    *(st.builds(array_value, st.just(kind), arrays(dtype, st.integers(0, 5))) for kind, dtype in SCALARS.items()),
    *(st.builds(Value, st.just(kind), arrays(dtype, 1).map(lambda one: one[0].item())) for kind, dtype in SCALARS.items()),
)
shapes = st.sampled_from(list(BLOCK_TYPES.values())).flatmap(
    lambda block: st.tuples(
        st.just(block.name),
        st.builds(
            lambda outer, blocks: (*outer, blocks * block.elements),
            st.lists(st.integers(0, 3), max_size=3),
            st.integers(0, 2),
        ),
    )
)
names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=15)


@settings(max_examples=100, deadline=None)
@given(
    keys=st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: not name.startswith(("general.", "split."))), scalars, max_size=6
    ),
    infos=st.dictionaries(names, shapes, max_size=6),
    alignment=st.sampled_from([None, 1, 4, 32, 256]),
    trailing=st.binary(max_size=40),
)
def test_what_is_written_is_read(
    scratch: Path, keys: dict[str, Value], infos: dict[str, tuple[str, tuple[int, ...]]], alignment: int | None, trailing: bytes
) -> None:
    """Keys of every type, tensors of every type and rank; cut anywhere, the file is refused."""
    metadata = {**keys, **({} if alignment is None else {"general.alignment": u32_value(alignment)})}
    align = alignment or 32
    raw = encode_header(metadata, [(name, kind, shape) for name, (kind, shape) in infos.items()], align)
    assert len(raw) % align == 0
    offsets, end = {}, len(raw)
    for name, (kind, shape) in infos.items():
        offsets[name] = end
        end += padded(tensor_bytes(kind, shape), align)
    scratch.write_bytes(raw + bytes(end - len(raw)) + trailing)
    file = read_gguf(scratch)
    assert file.values() == metadata and list(file.metadata) == list(metadata)
    assert [(t.name, t.type, t.shape) for t in file.tensors.values()] == [(name, *rest) for name, rest in infos.items()]
    assert {t.name: t.offset for t in file.tensors.values()} == offsets
    needed = max((t.offset + t.nbytes for t in file.tensors.values() if t.nbytes), default=0)
    if needed:
        os.truncate(scratch, needed - 1)
        with pytest.raises(InputError, match="ends at byte"):
            read_gguf(scratch)


# whole models


def use(path: Path) -> None:
    """All that opening a model and reading it does."""
    source = open_checkpoint(path)
    for name, tensor in source.tensors.items():
        assert source.read(name).shape == tensor.shape
        source.read(name, tuple(slice(1, size) for size in tensor.shape))


def test_the_tiny_model_is_good(tmp_path: Path) -> None:
    """What the next tests break is whole to begin with."""
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_model())
    use(path)
    assert read_gguf(path).metadata["tokenizer.ggml.tokens"] == ("a", "b", "é", "😀")


def test_no_prefix_of_a_model_is_a_model(tmp_path: Path) -> None:
    path, raw = tmp_path / "m.gguf", tiny_model()
    path.write_bytes(raw)
    for length in reversed(range(len(raw))):
        os.truncate(path, length)
        with pytest.raises(InputError):
            read_gguf(path)


def test_every_byte_of_the_header_may_be_anything(tmp_path: Path) -> None:
    """Each byte set to 255, and with its lowest bit turned: success or InputError, never another error."""
    path, raw = tmp_path / "m.gguf", tiny_model()
    path.write_bytes(raw)
    end = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    with path.open("r+b", buffering=0) as file:
        for at in range(end):
            for value in {0xFF, raw[at] ^ 1} - {raw[at]}:
                os.pwrite(file.fileno(), bytes([value]), at)
                try:
                    use(path)
                except InputError as exc:
                    assert str(path) in exc.where and "\n" not in exc.line
            os.pwrite(file.fileno(), raw[at : at + 1], at)
    use(path)


edits = st.lists(st.tuples(st.integers(0, len(tiny_model()) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(edits=edits, cut=st.none() | st.integers(0, len(tiny_model())), tail=st.binary(max_size=64))
def test_random_damage_is_refused_or_harmless(scratch: Path, edits: list[tuple[int, bytes]], cut: int | None, tail: bytes) -> None:
    raw = bytearray(tiny_model())
    for at, new in edits:
        raw[at : at + len(new)] = new
    scratch.write_bytes(bytes(raw[:cut]) + tail)
    with modest():
        try:
            use(scratch)
        except InputError as exc:
            assert str(scratch) in exc.where


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=400), counts=st.tuples(st.integers(0, 4), st.integers(0, 8)))
def test_noise_after_a_good_beginning_is_refused_or_harmless(scratch: Path, noise: bytes, counts: tuple[int, int]) -> None:
    scratch.write_bytes(b"GGUF" + struct.pack("<Iqq", 3, *counts) + noise)
    with modest():
        try:
            read_gguf(scratch)
        except InputError as exc:
            assert str(scratch) in exc.where
