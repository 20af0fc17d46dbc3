"""GGUF headers: every number of an untrusted file is checked before it is used (``gguf.md`` 1 and 8).

Knows keys, block types and offsets; knows no model, and never reads the data of a tensor. A length that the file states
is compared with the bytes that remain before anything is allocated, and the file is read with pread: a map of a file that
shrinks would end the process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from quantkit import fs
from quantkit.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT, DEFAULT_ALIGNMENT, MAX_ALIGNMENT = "general.alignment", 32, 1 << 20
MAX_HEADER_BYTES = 64 << 20
"""Metadata and tensor infos together; the largest vocabularies take about 20 MB. Bounds the memory that strings can take."""
MAX_KEYS, MAX_TENSORS, MAX_ARRAY, MAX_PARTS = 1 << 16, 1 << 17, 1 << 30, 65535
MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_DIMS = 1 << 16, 63, 4
MIN_KEY_RECORD, MIN_TENSOR_RECORD, STRING_HEAD = 14, 25, 8
FIRST_READ = 1 << 20

U32, BOOL, STRING, ARRAY = 4, 7, 8, 9
SCALARS: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        0: np.dtype("u1"),
        1: np.dtype("i1"),
        2: np.dtype("<u2"),
        3: np.dtype("<i2"),
        U32: np.dtype("<u4"),
        5: np.dtype("<i4"),
        6: np.dtype("<f4"),
        BOOL: np.dtype("?"),
        10: np.dtype("<u8"),
        11: np.dtype("<i8"),
        12: np.dtype("<f8"),
    }
)
"""Value type -> how its bytes are read."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """How a tensor type stores its rows: blocks of ``elements`` values in ``nbytes`` bytes."""

    name: str
    elements: int
    nbytes: int


BLOCK_TYPES: Mapping[int, BlockType] = MappingProxyType(
    {
        number: BlockType(name, elements, nbytes)
        for number, name, elements, nbytes in (
            (0, "F32", 1, 4),
            (1, "F16", 1, 2),
            (2, "Q4_0", 32, 18),
            (3, "Q4_1", 32, 20),
            (6, "Q5_0", 32, 22),
            (7, "Q5_1", 32, 24),
            (8, "Q8_0", 32, 34),
            (9, "Q8_1", 32, 40),
            (10, "Q2_K", 256, 84),
            (11, "Q3_K", 256, 110),
            (12, "Q4_K", 256, 144),
            (13, "Q5_K", 256, 176),
            (14, "Q6_K", 256, 210),
            (15, "Q8_K", 256, 292),
            (16, "IQ2_XXS", 256, 66),
            (17, "IQ2_XS", 256, 74),
            (18, "IQ3_XXS", 256, 98),
            (19, "IQ1_S", 256, 50),
            (20, "IQ4_NL", 32, 18),
            (21, "IQ3_S", 256, 110),
            (22, "IQ2_S", 256, 82),
            (23, "IQ4_XS", 256, 136),
            (24, "I8", 1, 1),
            (25, "I16", 1, 2),
            (26, "I32", 1, 4),
            (27, "I64", 1, 8),
            (28, "F64", 1, 8),
            (29, "IQ1_M", 256, 56),
            (30, "BF16", 1, 2),
            (34, "TQ1_0", 256, 54),
            (35, "TQ2_0", 256, 66),
            (39, "MXFP4", 32, 17),
            (40, "NVFP4", 64, 36),
            (41, "Q1_0", 128, 18),
        )
    }
)
"""Tensor type id -> block. Ids 4, 5, 31 to 33 and 36 to 38 are removed types; what is not here is refused."""
BY_NAME: Mapping[str, BlockType] = MappingProxyType({block.name: block for block in BLOCK_TYPES.values()})


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: ``shape`` slowest axis first (as torch has it), ``nbytes`` bytes at ``offset`` of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a file says it holds.

    ``metadata`` values are int, float, bool or str; an array of strings is a tuple, any other array a read-only 1-D numpy
    array of the file's type.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class _Cursor:
    """The header's bytes, read as far as they are needed, and a position in them."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, fs.file_size(path)
        self.data, self.at = b"", 0

    def fail(self, field: str, what: str, expected: str | None = None, hint: str | None = None) -> NoReturn:
        raise InputError(f"{self.path}: {field}", f"{what} (at byte {self.at})", expected, hint)

    @property
    def remaining(self) -> int:
        return self.size - self.at

    def need(self, nbytes: int, field: str) -> None:
        """Have ``nbytes`` bytes from the position on in memory; refuse a number that the file cannot hold."""
        end = self.at + nbytes
        if end <= len(self.data):
            return
        if nbytes > self.remaining:
            self.fail(field, f"needs {nbytes} bytes, {self.remaining} remain", "a whole file (is it truncated?)")
        if end > MAX_HEADER_BYTES:
            self.fail(field, f"ends at byte {end}", f"a header of at most {MAX_HEADER_BYTES} bytes")
        target = min(self.size, MAX_HEADER_BYTES, max(end, 2 * len(self.data), FIRST_READ))
        have = len(self.data)
        self.data = b"".join((self.data, *fs.read_range(self.path, have, target - have)))

    def take(self, nbytes: int, field: str) -> bytes:
        self.need(nbytes, field)
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def integer(self, nbytes: int, field: str, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(nbytes, field), "little", signed=signed)

    def text(self, field: str, limit: int = MAX_HEADER_BYTES) -> str:
        """A string of at most ``limit`` bytes."""
        length = self.integer(STRING_HEAD, field)
        if length > min(limit, self.remaining):
            self.fail(field, f"has a string of {length} bytes, {self.remaining} remain", f"at most {min(limit, self.remaining)}")
        raw = self.take(length, field)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(field, "is not UTF-8", "a UTF-8 string")

    def texts(self, count: int, field: str) -> tuple[str, ...]:
        """``count`` strings. Vocabularies have half a million: the loop looks at the bytes itself."""
        found: list[str] = []
        data, at, have = self.data, self.at, len(self.data)
        try:
            for _ in range(count):
                end = at + STRING_HEAD
                if end <= have:
                    end += int.from_bytes(data[at:end], "little")
                if end > have:
                    self.at, item = at, f"{field}, string {len(found)}"
                    self.need(STRING_HEAD, item)
                    length = int.from_bytes(self.data[at : at + STRING_HEAD], "little")
                    self.need(STRING_HEAD + length, item)
                    data, have, end = self.data, len(self.data), at + STRING_HEAD + length
                found.append(data[at + STRING_HEAD : end].decode())
                at = end
        except UnicodeDecodeError:
            self.at = at
            self.fail(field, f"string {len(found)} is not UTF-8", "UTF-8 strings")
        self.at = at
        return tuple(found)

    def numbers(self, kind: int, count: int, field: str) -> NDArray[Any]:
        """``count`` numbers as one read-only array that owns its bytes."""
        dtype = SCALARS[kind]
        raw = self.take(count * dtype.itemsize, field)
        if kind == BOOL and raw.translate(None, b"\x00\x01"):
            self.fail(field, "has a bool that is neither 0 nor 1", "0 or 1")
        return np.frombuffer(raw, dtype=dtype)


def _count(cursor: _Cursor, field: str, record: int, limit: int) -> int:
    """A signed count of records of at least ``record`` bytes each."""
    count = cursor.integer(8, field, signed=True)
    fits = min(limit, cursor.remaining // record)
    if not 0 <= count <= fits:
        cursor.fail(field, f"is {count}", f"0 to {fits}: {cursor.remaining} bytes remain")
    return count


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    magic = cursor.take(len(MAGIC), "magic")
    if magic != MAGIC:
        cursor.fail("magic", f"is {magic!r}", f"{MAGIC!r}: this is no GGUF file")
    version = cursor.integer(4, "version")
    if version and not version & 0xFFFF:
        cursor.fail("version", "is byte-swapped: the file is big-endian", "a little-endian file")
    if version not in VERSIONS:
        cursor.fail("version", f"is {version}", f"one of {', '.join(map(str, VERSIONS))}")
    n_tensors = _count(cursor, "tensor count", MIN_TENSOR_RECORD, MAX_TENSORS)
    return version, n_tensors, _count(cursor, "key count", MIN_KEY_RECORD, MAX_KEYS)


def _value(cursor: _Cursor, kind: int, field: str) -> Any:
    if kind in SCALARS:
        return cursor.numbers(kind, 1, field)[0].item()
    if kind == STRING:
        return cursor.text(field)
    if kind != ARRAY:
        cursor.fail(field, f"has value type {kind}", "0 to 12")
    element = cursor.integer(4, field)
    if element != STRING and element not in SCALARS:
        cursor.fail(field, "is an array of arrays" if element == ARRAY else f"has element type {element}", "an array of scalars or strings")
    count = cursor.integer(8, field)
    least = STRING_HEAD if element == STRING else SCALARS[element].itemsize
    fits = min(MAX_ARRAY, cursor.remaining // least)
    if count > fits:
        cursor.fail(field, f"states {count} elements", f"at most {fits}: {cursor.remaining} bytes remain")
    return cursor.texts(count, field) if element == STRING else cursor.numbers(element, count, field)


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number in range(count):
        key = cursor.text(f"key {number}", MAX_KEY_BYTES)
        field = f"key {key!r:.100}"
        if not key:
            cursor.fail(f"key {number}", "is empty", "a name")
        if key in found:
            cursor.fail(field, "is there twice", "each key once")
        kind = cursor.integer(4, field)
        if key == ALIGNMENT and kind != U32:
            cursor.fail(field, f"has value type {kind}", f"{U32} (u32)")
        found[key] = value = _value(cursor, kind, field)
        if key == ALIGNMENT and (not 0 < value <= MAX_ALIGNMENT or value & (value - 1)):
            cursor.fail(field, f"is {value}", f"a power of two up to {MAX_ALIGNMENT}")
    return found


@dataclass(frozen=True, slots=True)
class _Info:
    """A tensor's record: ``offset`` is from the data section."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _info(cursor: _Cursor, number: int) -> _Info:
    name = cursor.text(f"name of tensor {number}", MAX_NAME_BYTES)
    field = f"tensor {name!r:.100}"
    if not name or not name.isprintable():
        cursor.fail(f"name of tensor {number}", f"is {name!r:.100}", "a name of printable characters")
    rank = cursor.integer(4, field)
    if rank > MAX_DIMS:
        cursor.fail(field, f"has {rank} dimensions", f"at most {MAX_DIMS}")
    sizes = [cursor.integer(8, field, signed=True) for _ in range(rank)]  # fastest first
    if any(size < 0 for size in sizes) or math.prod(sizes) >= 1 << 63 or math.prod(size for size in sizes if size) >= 1 << 63:
        cursor.fail(field, f"has sizes {sizes}", "sizes of at least 0 whose product is below 2^63")
    kind = cursor.integer(4, field)
    block = BLOCK_TYPES.get(kind)
    if block is None:
        cursor.fail(field, f"has type {kind}, which is unknown or removed", f"one of {', '.join(BY_NAME)}")
    fastest = sizes[0] if sizes else 1
    if fastest % block.elements:
        cursor.fail(field, f"has rows of {fastest} elements", f"a multiple of {block.elements} for {block.name}")
    nbytes = math.prod(sizes) // block.elements * block.nbytes
    return _Info(name, block.name, tuple(reversed(sizes)), cursor.integer(8, field), nbytes)


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    """The tensors, each where the one before it ends, padded to ``alignment``."""
    infos: dict[str, _Info] = {}
    expected = 0
    for number in range(count):
        info = _info(cursor, number)
        field = f"tensor {info.name!r:.100}"
        if info.name in infos:
            cursor.fail(field, "is there twice", "each name once")
        if info.offset != expected:
            cursor.fail(field, f"has offset {info.offset}", f"{expected}: tensors follow one another, aligned to {alignment}")
        expected = _padded(info.offset + info.nbytes, alignment)
        infos[info.name] = info
    start = _padded(cursor.at, alignment)
    for info in infos.values():
        end = start + info.offset + info.nbytes
        if info.nbytes and end > cursor.size:
            where = f"{cursor.path}: tensor {info.name!r:.100}"
            raise InputError(where, f"ends at byte {end}, the file at {cursor.size}", "a whole file (is it truncated?)")
    return {info.name: GgufTensor(info.name, info.type, info.shape, start + info.offset, info.nbytes) for info in infos.values()}


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _refuse_split(path: Path, metadata: Mapping[str, Any]) -> None:
    where, parts, number = f"{path}: key 'split.count'", metadata.get("split.count", 1), metadata.get("split.no")
    if not isinstance(parts, int) or isinstance(parts, bool) or not 0 <= parts <= MAX_PARTS:
        raise InputError(where, f"is {parts!r:.100}", f"a number of parts up to {MAX_PARTS}")
    if parts > 1:
        which = f"part {number + 1} of {parts}" if isinstance(number, int) else f"one of {parts} parts"
        raise InputError(where, f"this is {which} of a split model", "one file", "llama-gguf-split --merge FIRST_PART OUT.gguf joins them")


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a little-endian GGUF file of version 2 or 3.

    Raises InputError naming the file, the field and the byte for anything that is not well formed: counts and lengths that
    the file cannot hold, a duplicate key or name, an unknown type, tensors that do not follow one another or end past the
    file's end, and a file that is one part of a split model.
    """
    cursor = _Cursor(path)
    version, n_tensors, n_keys = _preamble(cursor)
    metadata = _metadata(cursor, n_keys)
    _refuse_split(path, metadata)
    tensors = _tensors(cursor, n_tensors, metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT))
    return GgufFile(path, version, MappingProxyType(metadata), MappingProxyType(tensors))
