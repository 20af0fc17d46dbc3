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

from quantkit.checkpoint.gguf import GgufSource
from quantkit.errors import InputError
from quantkit.formats import gguf as formats_gguf
from quantkit.formats.gguf import MAX_HEADER_BYTES, read_gguf

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
    "split": (
        header(keys=(key(b"split.no", 2, b"\x00\x00"), key(b"split.count", 2, b"\x03\x00"))),
        r"key 'split\.count': this is part 1 of 3 of a split model, expected one file",
    ),
    "split without number": (
        header(keys=(key(b"split.count", 2, b"\x03\x00"),)),
        r"split\.count': this is one of 3 parts of a split model",
    ),
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


# whole models


def use(path: Path) -> None:
    """All that opening a model and reading it does."""
    source = GgufSource(read_gguf(path))
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


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "m.gguf"


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
