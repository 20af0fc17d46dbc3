"""Importance matrices from strangers: every lie is an InputError that names the file and the field, in little time and memory."""

from __future__ import annotations

import math
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

from quantkit.errors import InputError
from quantkit.formats import gguf
from quantkit.formats import imatrix as formats_imatrix
from quantkit.formats.imatrix import Imatrix, ImatrixEntry, encode_dat, encode_gguf, read_imatrix

LARGEST = (1 << 31) - 1


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
        read_imatrix(path)
    assert caught.value.where.startswith(str(path)) and "\n" not in caught.value.line and len(caught.value.line) < 1000


def record(name: bytes, calls: int, values: tuple[float, ...], *, length: int | None = None, count: int | None = None) -> bytes:
    head = struct.pack("<i", len(name) if length is None else length) + name
    return head + struct.pack("<ii", calls, len(values) if count is None else count) + struct.pack(f"<{len(values)}f", *values)


def dat(*records: bytes, entries: int | None = None, tail: bytes = b"") -> bytes:
    return struct.pack("<i", len(records) if entries is None else entries) + b"".join(records) + tail


GOOD = record(b"blk.0.attn_q.weight", 2, (1.0, 2.0))
DAT_LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", r"is 0 bytes long, and no GGUF file"),
    "too short": (b"GGU", r"is 3 bytes long, and no GGUF file"),
    "no entries": (dat(GOOD, entries=0), r"number of entries: is 0 \(at byte 0\), expected 1 to 2"),
    "entries -1": (dat(GOOD, entries=-1), r"number of entries: is -1 "),
    "entries 2^31-1": (dat(GOOD, entries=LARGEST), r"number of entries: is 2147483647 .*, expected 1 to 2: 39 bytes follow"),
    "an entry too many": (dat(GOOD, entries=2), r"name of entry 1: needs 4 bytes, 0 remain"),
    "name of 0 bytes": (dat(record(b"", 1, (1.0,) * 9)), r"name of entry 0: is 0 \(at byte 4\), expected 1 to "),
    "name of -1 bytes": (dat(record(b"a", 1, (1.0,) * 9, length=-1)), r"name of entry 0: is -1 "),
    "name of 2^31-1 bytes": (dat(record(b"a", 1, (1.0,) * 9, length=LARGEST)), r"name of entry 0: is 2147483647 .*, expected 1 to 45"),
    "name longer than names are": (dat(record(b"a" * 64, 1, (1.0,))), r"name of entry 0: is 64 .*, expected 1 to 63"),
    "name not UTF-8": (dat(record(b"\xff\xfe", 1, (1.0,) * 9)), r"name of entry 0: is b'\\xff\\xfe'"),
    "name with NUL": (dat(record(b"a\0b", 1, (1.0,) * 9)), r"name of entry 0: is 'a\\x00b' .*, expected a name of printable"),
    "name with an escape": (dat(record(b"a\x1b[2J", 1, (1.0,) * 9)), r"name of entry 0: is 'a\\x1b\[2J'"),
    "name twice": (dat(GOOD, GOOD), r"entry 'blk\.0\.attn_q\.weight': is there twice"),
    "calls -1": (dat(record(b"a", -1, (1.0,) * 9)), r"entry 'a', calls: is -1 "),
    "values 0": (dat(record(b"a", 1, (1.0,) * 9, count=0)), r"entry 'a', values: is 0 "),
    "values -1": (dat(record(b"a", 1, (1.0,) * 9, count=-1)), r"entry 'a', values: is -1 "),
    "values 2^31-1": (
        dat(record(b"a", 1, (1.0,) * 9, count=LARGEST)),
        r"entry 'a', values: is 2147483647 .*, expected 1 to 9: 36 bytes follow",
    ),
    "a value too many": (dat(record(b"a", 1, (1.0,) * 9, count=10)), r"entry 'a', values: is 10 .*, expected 1 to 9: 36 bytes follow"),
    "NaN": (dat(record(b"a", 1, (1.0, math.nan))), r"entry 'a': holds a value that is not finite"),
    "infinity": (dat(record(b"a", 1, (1.0, math.inf))), r"entry 'a': holds a value that is not finite"),
    "below 0": (dat(record(b"a", 1, (1.0, -1.0))), r"entry 'a': holds a value below 0"),
    "chunks -1": (dat(GOOD, tail=struct.pack("<ii", -1, 0)), r"chunk count: is -1 "),
    "chunks cut short": (dat(GOOD, tail=b"\1\0"), r"chunk count: needs 4 bytes, 2 remain"),
    "chunks alone": (dat(GOOD, tail=struct.pack("<i", 1)), r"data set: needs 4 bytes, 0 remain"),
    "data set of -1 bytes": (dat(GOOD, tail=struct.pack("<ii", 1, -1)), r"data set: is -1 "),
    "data set of 2^31-1 bytes": (dat(GOOD, tail=struct.pack("<ii", 1, LARGEST) + b"abc"), r"data set: is 2147483647 .*, expected 0 to 3"),
    "data set longer than any": (
        dat(GOOD, tail=struct.pack("<ii", 1, 65537) + bytes(65537)),
        r"data set: is 65537 .*, expected 0 to 65536",
    ),
    "more after the end": (dat(GOOD, tail=struct.pack("<ii", 1, 1) + b"ab"), r"end: 1 more bytes follow"),
    "text": (b"What is this file, if not an importance matrix?\n" * 3, r"number of entries: is "),
}


@pytest.mark.parametrize("lie", DAT_LIES)
def test_a_dat_file_that_lies(tmp_path: Path, lie: str) -> None:
    refused(tmp_path / "m.dat", *DAT_LIES[lie])


def gguf_file(
    tensors: dict[str, tuple[tuple[int, ...], list[float]]], drop: str | None = None, change: dict[str, gguf.Value] | None = None
) -> bytes:
    metadata = {
        "general.type": gguf.text("imatrix"),
        "imatrix.datasets": gguf.texts(["x"]),
        "imatrix.chunk_count": gguf.u32(1),
        "imatrix.chunk_size": gguf.u32(8),
        **(change or {}),
    }
    metadata = {key: value for key, value in metadata.items() if key != drop}
    data = b""
    for _, values in tensors.values():
        data += np.asarray(values, "<f4").tobytes()
        data += bytes(-len(data) % 32)
    return gguf.encode_header(metadata, [(name, "F32", shape) for name, (shape, _) in tensors.items()]) + data


def pair(sums: list[float], counts: list[float], shape: tuple[int, ...] | None = None) -> dict[str, tuple[tuple[int, ...], list[float]]]:
    return {"a.in_sum2": (shape or (len(sums),), sums), "a.counts": ((len(counts),), counts)}


FINE = pair([1.0, 2.0], [4.0])
GGUF_LIES: dict[str, tuple[bytes, str]] = {
    "a model": (gguf_file(FINE, change={"general.type": gguf.text("model")}), r"key 'general\.type': is 'model', expected 'imatrix'"),
    "a type that is a number": (gguf_file(FINE, change={"general.type": gguf.u32(1)}), r"key 'general\.type': is 1"),
    "no data sets": (gguf_file(FINE, "imatrix.datasets"), r"key 'imatrix\.datasets': is missing"),
    "no chunk count": (gguf_file(FINE, "imatrix.chunk_count"), r"key 'imatrix\.chunk_count': is missing"),
    "no chunk size": (gguf_file(FINE, "imatrix.chunk_size"), r"key 'imatrix\.chunk_size': is missing"),
    "data sets that are numbers": (
        gguf_file(FINE, change={"imatrix.datasets": gguf.array(gguf.U32, [1, 2])}),
        r"key 'imatrix\.datasets': is .*, expected strings",
    ),
    "a data set that is no array": (gguf_file(FINE, change={"imatrix.datasets": gguf.text("x")}), r"key 'imatrix\.datasets': is 'x'"),
    "chunks -1": (gguf_file(FINE, change={"imatrix.chunk_count": gguf.i32(-1)}), r"key 'imatrix\.chunk_count': is -1"),
    "chunks 2^32-1": (gguf_file(FINE, change={"imatrix.chunk_count": gguf.u32((1 << 32) - 1)}), r"chunk_count': is 4294967295"),
    "chunks that are true": (gguf_file(FINE, change={"imatrix.chunk_size": gguf.boolean(True)}), r"chunk_size': is True"),
    "chunks that are a float": (gguf_file(FINE, change={"imatrix.chunk_size": gguf.f32(8.0)}), r"chunk_size': is 8\.0"),
    "no tensors": (gguf_file({}), r"has no tensor that ends in \.in_sum2"),
    "other tensors": (gguf_file({"a.weight": ((1,), [1.0])}), r"has no tensor that ends in \.in_sum2"),
    "no counts": (gguf_file({"a.in_sum2": ((1,), [1.0])}), r"a\.in_sum2: has no a\.counts beside it"),
    "no sums": (gguf_file({"a.counts": ((1,), [1.0])}), r"a\.counts: has no a\.in_sum2 beside it"),
    "no values": (gguf_file(pair([], [1.0], (0,))), r"a\.in_sum2: has shape \[0\], expected at least one value"),
    "no count": (gguf_file(pair([1.0], [])), r"a\.counts: has shape \[0\], expected at least one value"),
    "counts that do not fit": (
        gguf_file(pair([1.0] * 6, [1.0, 1.0], (3, 2))),
        r"a\.counts: has 2 counts for sums of shape \[3, 2\], expected 3, or 1 for all",
    ),
    "a count for each value": (gguf_file(pair([1.0, 1.0], [1.0, 1.0])), r"has 2 counts for sums of shape \[2\], expected 1"),
    "sums not finite": (gguf_file(pair([math.nan, 1.0], [1.0])), r"a\.in_sum2: holds a sum that is not finite"),
    "sums below 0": (gguf_file(pair([-1.0, 1.0], [1.0])), r"a\.in_sum2: holds a sum below 0"),
    "counts not finite": (gguf_file(pair([1.0, 1.0], [math.inf])), r"a\.counts: holds a count that is not finite"),
    "counts below 0": (gguf_file(pair([1.0, 1.0], [-1.0])), r"a\.counts: holds a count below 0"),
    "counts of parts of tokens": (gguf_file(pair([1.0, 1.0], [0.25])), r"a\.counts: holds a count that is no whole number"),
}


@pytest.mark.parametrize("lie", GGUF_LIES)
def test_a_gguf_file_that_lies(tmp_path: Path, lie: str) -> None:
    refused(tmp_path / "m.gguf", *GGUF_LIES[lie])


def test_what_the_lies_are_changes_of_is_fine(tmp_path: Path) -> None:
    for name, raw in (("m.gguf", gguf_file(FINE)), ("m.dat", dat(GOOD)), ("no-type.gguf", gguf_file(FINE, "general.type"))):
        (tmp_path / name).write_bytes(raw)
        assert len(read_imatrix(tmp_path / name).entries) == 1


def test_sums_of_another_type_are_refused(tmp_path: Path) -> None:
    metadata = {"general.type": gguf.text("imatrix"), "imatrix.datasets": gguf.texts([])}
    metadata |= {"imatrix.chunk_count": gguf.u32(0), "imatrix.chunk_size": gguf.u32(0)}
    raw = gguf.encode_header(metadata, [("a.in_sum2", "F16", (2,)), ("a.counts", "F32", (1,))]) + bytes(36)
    refused(tmp_path / "m.gguf", raw, r"a\.in_sum2: is of type F16, expected F32")


def matrix() -> Imatrix:
    sums = np.arange(12, dtype=np.float32).reshape(3, 4)
    dense = ImatrixEntry(np.ones((1, 5), np.float32), np.array([7], np.float32))
    return Imatrix({"experts": ImatrixEntry(sums, np.array([1, 0, 9], np.float32)), "dense": dense}, ("x",), 2, 8)


def test_a_dat_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path, raw = tmp_path / "m.dat", encode_dat(matrix())
    end_of_entries = len(raw) - 9
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        if length == end_of_entries:  # what follows may be left out
            assert read_imatrix(path).datasets == ()
            continue
        with pytest.raises(InputError):
            read_imatrix(path)


def test_a_gguf_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path, raw = tmp_path / "m.gguf", encode_gguf(matrix())
    last = len(raw) - 20  # the padding after three counts may be missing
    for length in range(0, last, 1):
        path.write_bytes(raw[:length])
        with pytest.raises(InputError):
            read_imatrix(path)
    path.write_bytes(raw[:last])
    assert set(read_imatrix(path).entries) == {"experts", "dense"}


@settings(max_examples=300, deadline=None)
@given(data=st.data(), form=st.sampled_from([encode_dat, encode_gguf]))
def test_flipped_bytes_are_refused_or_give_values_that_can_be_used(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, form
) -> None:  # type: ignore[no-untyped-def]
    path, raw = tmp_path_factory.getbasetemp() / "flipped", bytearray(form(matrix()))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        found = read_imatrix(path)
    except InputError as exc:
        assert "\n" not in exc.line and len(exc.line) < 1000
        return
    for entry in found.entries.values():
        importance = entry.importance()
        assert importance.shape == entry.sums.shape and np.isfinite(importance).all() and (importance >= 0).all()


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(dat(GOOD))
    os.truncate(path, formats_imatrix.MAX_BYTES + 1)
    with modest(seconds=2, nbytes=1 << 20), pytest.raises(InputError, match=r"is 8589934593 bytes long, expected an importance matrix"):
        read_imatrix(path)


def test_many_small_entries_take_little_time(tmp_path: Path) -> None:
    count = 5_000
    raw = dat(*(record(b"%05d" % number, 1, (1.0,)) for number in range(count)))
    (tmp_path / "m.dat").write_bytes(raw)
    with modest(seconds=20, nbytes=64 << 20):
        assert len(read_imatrix(tmp_path / "m.dat").entries) == count
    limit = formats_imatrix.MAX_ENTRIES
    refused(
        tmp_path / "m.dat", struct.pack("<i", limit + 1) + bytes(17 * (limit + 1)), r"number of entries: is 65537 .*, expected 1 to 65536"
    )


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "m.dat")
    with pytest.raises(InputError):
        read_imatrix(tmp_path / "m.dat")
    with pytest.raises(InputError, match="cannot read it"):
        read_imatrix(tmp_path / "absent.gguf")
