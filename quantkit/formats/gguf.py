"""GGUF headers, read and made: every number of an untrusted file is checked before it is used (``gguf.md`` 1 and 8).

Knows keys, block types, offsets and the parts of a split model; knows no model, and never reads the data of a tensor. A length
that the file states is compared with the bytes that remain before anything is allocated, and the file is read with pread: a
map of a file that shrinks would end the process.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from quantkit import fs
from quantkit.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
WRITTEN_VERSION = 3
ALIGNMENT, DEFAULT_ALIGNMENT, MAX_ALIGNMENT = "general.alignment", 32, 1 << 20
MAX_HEADER_BYTES = 64 << 20
"""Metadata and tensor infos together; the largest vocabularies take about 20 MB. Bounds the memory that strings can take."""
MAX_KEYS, MAX_TENSORS, MAX_ARRAY, MAX_PARTS = 1 << 16, 1 << 17, 1 << 30, 65535
MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_DIMS = 1 << 16, 63, 4
MIN_KEY_RECORD, MIN_TENSOR_RECORD, STRING_HEAD = 14, 25, 8
FIRST_READ = 1 << 20

SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)
PART_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        U8: np.dtype("u1"),
        I8: np.dtype("i1"),
        U16: np.dtype("<u2"),
        I16: np.dtype("<i2"),
        U32: np.dtype("<u4"),
        I32: np.dtype("<i4"),
        F32: np.dtype("<f4"),
        BOOL: np.dtype("?"),
        U64: np.dtype("<u8"),
        I64: np.dtype("<i8"),
        F64: np.dtype("<f8"),
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
TYPE_IDS: Mapping[str, int] = MappingProxyType({block.name: number for number, block in BLOCK_TYPES.items()})


def row_bytes(type: str, columns: int) -> int:  # noqa: A002
    """Bytes of a row of ``columns`` elements. Raises InputError when they are no whole number of blocks."""
    block = BY_NAME[type]
    if columns % block.elements:
        raise InputError(type, f"rows of {columns} elements", f"a multiple of {block.elements}")
    return columns // block.elements * block.nbytes


def tensor_bytes(type: str, shape: Sequence[int]) -> int:  # noqa: A002
    """Bytes of a tensor, ``shape`` slowest axis first. Raises as ``row_bytes``."""
    return math.prod(shape[:-1]) * row_bytes(type, shape[-1] if shape else 1)


def padded(position: int, alignment: int) -> int:
    """The next multiple of ``alignment`` at or after ``position``."""
    return -(-position // alignment) * alignment


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """The value of a key as a file holds it: ``kind`` is its value type; of an ``ARRAY``, ``element`` that of its elements.

    ``value`` is int, float, bool or str; an array of strings is a tuple, any other array 1-D numpy of the element's dtype.
    Values are equal when they are the same bytes in a file.
    """

    kind: int
    value: Any
    element: int | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Value):
            return NotImplemented
        return (self.kind, self.element) == (other.kind, other.element) and _encoded("", self) == _encoded("", other)

    def __hash__(self) -> int:
        return hash((self.kind, self.element))


def u32(value: int) -> Value:
    """A whole number from 0 to 2^32 - 1; ``encode_header`` refuses any other."""
    return Value(U32, int(value))


def u64(value: int) -> Value:
    """A whole number from 0 to 2^64 - 1."""
    return Value(U64, int(value))


def i32(value: int) -> Value:
    """A whole number from -2^31 to 2^31 - 1."""
    return Value(I32, int(value))


def f32(value: float) -> Value:
    """A number, rounded to float32."""
    return Value(F32, float(value))


def boolean(value: bool) -> Value:
    """Yes or no."""
    return Value(BOOL, bool(value))


def text(value: str) -> Value:
    """A string; ``encode_header`` refuses one that UTF-8 cannot hold (lone surrogates)."""
    return Value(STRING, value)


def texts(values: Sequence[str]) -> Value:
    """An array of strings."""
    return Value(ARRAY, tuple(values), STRING)


def array(kind: int, values: Sequence[Any] | NDArray[Any]) -> Value:
    """A 1-D array of scalars of value type ``kind``, or of strings. Raises InputError for whole numbers that ``kind`` cannot hold."""
    if kind == STRING:
        return texts(values)  # type: ignore[arg-type]
    dtype = SCALARS[kind]
    refused = InputError(f"an array of {dtype.name}", "has a value that this type cannot hold", f"values of {dtype.name}")
    try:
        given = np.asarray(values, dtype=None if len(values) else dtype)
        with np.errstate(all="ignore"):
            held = given.astype(dtype)
    except (OverflowError, TypeError, ValueError) as exc:
        raise refused from exc
    if given.ndim != 1 or (dtype.kind != "f" and (held != given).any()):
        raise refused
    return Value(ARRAY, held, kind)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: ``shape`` slowest axis first (as torch has it), ``nbytes`` bytes at ``offset`` of ``file``."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: Path


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a file, or a split model of several, says it holds.

    ``metadata`` values are int, float, bool or str; an array of strings is a tuple, any other array a read-only 1-D numpy
    array of the file's type. ``types`` has the value type of each key, ``element_types`` that of each array's elements.
    ``paths`` are all parts in order; metadata are those of the first, which is ``path``.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    types: Mapping[str, int] = field(default_factory=dict)
    element_types: Mapping[str, int] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()

    def values(self) -> dict[str, Value]:
        """Every key as it stands in the file, to be written again; not those that say how the model was split."""
        items = ((key, value) for key, value in self.metadata.items() if key not in SPLIT_KEYS)
        return {key: Value(self.types[key], value, self.element_types.get(key)) for key, value in items}


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


def _value(cursor: _Cursor, kind: int, where: str) -> Value:
    if kind in SCALARS:
        return Value(kind, cursor.numbers(kind, 1, where)[0].item())
    if kind == STRING:
        return Value(kind, cursor.text(where))
    if kind != ARRAY:
        cursor.fail(where, f"has value type {kind}", "0 to 12")
    element = cursor.integer(4, where)
    if element != STRING and element not in SCALARS:
        cursor.fail(where, "is an array of arrays" if element == ARRAY else f"has element type {element}", "an array of scalars or strings")
    count = cursor.integer(8, where)
    least = STRING_HEAD if element == STRING else SCALARS[element].itemsize
    fits = min(MAX_ARRAY, cursor.remaining // least)
    if count > fits:
        cursor.fail(where, f"states {count} elements", f"at most {fits}: {cursor.remaining} bytes remain")
    return Value(kind, cursor.texts(count, where) if element == STRING else cursor.numbers(element, count, where), element)


def _metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for number in range(count):
        key = cursor.text(f"key {number}", MAX_KEY_BYTES)
        where = f"key {key!r:.100}"
        if not key:
            cursor.fail(f"key {number}", "is empty", "a name")
        if key in found:
            cursor.fail(where, "is there twice", "each key once")
        kind = cursor.integer(4, where)
        if key == ALIGNMENT and kind != U32:
            cursor.fail(where, f"has value type {kind}", f"{U32} (u32)")
        found[key] = value = _value(cursor, kind, where)
        if key == ALIGNMENT and not _is_alignment(value.value):
            cursor.fail(where, f"is {value.value}", f"a power of two up to {MAX_ALIGNMENT}")
    return found


def _is_alignment(value: int) -> bool:
    return 0 < value <= MAX_ALIGNMENT and not value & (value - 1)


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
        expected = padded(info.offset + info.nbytes, alignment)
        infos[info.name] = info
    start = padded(cursor.at, alignment)
    for info in infos.values():
        end = start + info.offset + info.nbytes
        if info.nbytes and end > cursor.size:
            where = f"{cursor.path}: tensor {info.name!r:.100}"
            raise InputError(where, f"ends at byte {end}, the file at {cursor.size}", "a whole file (is it truncated?)")
    return {
        info.name: GgufTensor(info.name, info.type, info.shape, start + info.offset, info.nbytes, cursor.path) for info in infos.values()
    }


# split models


def _read_part(path: Path) -> GgufFile:
    """The header of one file, whatever it says of other parts."""
    cursor = _Cursor(path)
    version, n_tensors, n_keys = _preamble(cursor)
    values = _metadata(cursor, n_keys)
    alignment = values[ALIGNMENT].value if ALIGNMENT in values else DEFAULT_ALIGNMENT
    tensors = _tensors(cursor, n_tensors, alignment)
    return GgufFile(
        path,
        version,
        MappingProxyType({key: value.value for key, value in values.items()}),
        MappingProxyType(tensors),
        MappingProxyType({key: value.kind for key, value in values.items()}),
        MappingProxyType({key: value.element for key, value in values.items() if value.element is not None}),
        (path,),
    )


def part_name(prefix: str, number: int, count: int) -> str:
    """What part ``number`` (from 1) of a split model is called."""
    return f"{prefix}-{number:05d}-of-{count:05d}.gguf"


def is_first_part(name: str) -> bool:
    """Whether a file of this ``name`` is what a model is opened from: not a later part of a split one."""
    found = PART_NAME.fullmatch(name)
    return found is None or int(found["number"]) == 1


def _split_fact(file: GgufFile, key: str, default: int | None, high: int) -> int:
    found = file.metadata.get(key, default)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= high:
        what = "is missing" if found is None else f"is {found!r:.100}"
        raise InputError(f"{file.path}: key {key!r}", what, f"a whole number from 0 to {high}")
    return found


def _prefix(first: GgufFile, count: int) -> str:
    """What the names of all parts begin with. Raises InputError unless ``first`` is the first part, by its keys and its name."""
    path, number = first.path, _split_fact(first, SPLIT_NUMBER, None, MAX_PARTS) + 1
    where, named = f"{path}: key {SPLIT_NUMBER!r}", PART_NAME.fullmatch(path.name)
    prefix = named["prefix"] if named else path.name.removesuffix(".gguf")
    wanted = part_name(prefix, 1, count)
    if number != 1:
        raise InputError(where, f"this is part {number} of {count} of a split model", f"the first part, {wanted!r:.200}")
    if path.name != wanted:
        raise InputError(where, f"this is part 1 of {count} of a split model, and is called {path.name!r:.200}", f"{wanted!r:.200}")
    return prefix


def _joined(first: GgufFile, count: int) -> GgufFile:
    """A split model from its first part, each other part opened and checked. Names come from that of the first alone."""
    prefix, total = _prefix(first, count), _split_fact(first, SPLIT_TENSORS, None, MAX_TENSORS)
    where, tensors, paths = f"{first.path}: key {SPLIT_TENSORS!r}", dict(first.tensors), [first.path]
    for number in range(2, count + 1):
        path = fs.confined(first.path.parent, part_name(prefix, number, count), str(first.path))
        if not path.exists():
            what = f"part {number} of {count}, {path.name!r:.200}, is missing"
            raise InputError(str(first.path), what, "all parts side by side (is the download complete?)")
        part = _read_part(path)
        for key, default, wanted in ((SPLIT_NUMBER, None, number - 1), (SPLIT_COUNT, None, count), (SPLIT_TENSORS, total, total)):
            found = _split_fact(part, key, default, MAX_TENSORS)
            if found != wanted:
                raise InputError(f"{path}: key {key!r}", f"is {found}", f"{wanted}, as the name and the first part say")
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            what = f"is in {tensors[twice].file.name!r:.200} too"
            raise InputError(f"{path}: tensor {twice!r:.100}", what, "each tensor in one part")
        tensors |= part.tensors
        paths.append(path)
        if len(tensors) > total:
            raise InputError(where, f"is {total}, and {number} parts hold {len(tensors)}", "the number of tensors of all parts")
    if len(tensors) != total:
        raise InputError(where, f"is {total}, and all parts hold {len(tensors)}", "the number of tensors of all parts")
    return replace(first, tensors=MappingProxyType(tensors), paths=tuple(paths))


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a little-endian GGUF file of version 2 or 3, and of a split model those of all its parts.

    A split model is opened from its first part, ``PREFIX-00001-of-0000N.gguf``, with the others beside it.
    Raises InputError naming the file, the field and the byte for anything that is not well formed: counts and lengths that
    the file cannot hold, a duplicate key or name, an unknown type, tensors that do not follow one another or end past the
    file's end, another part than the first, and parts that are missing or do not belong together.
    """
    file = _read_part(path)
    count = _split_fact(file, SPLIT_COUNT, 1, MAX_PARTS)
    return file if count < 2 else _joined(file, count)


# writing


def _encoded_text(where: str, value: str) -> bytes:
    try:
        raw = value.encode()
    except UnicodeEncodeError as exc:
        raise InputError(where, "holds half a character, which UTF-8 cannot", "a string of whole characters") from exc
    return struct.pack("<Q", len(raw)) + raw


_CODES: Mapping[int, str] = MappingProxyType(
    {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q", I64: "<q", F64: "<d"}
)


def _encoded(key: str, value: Value) -> bytes:
    """A value as its bytes, without its type. Raises InputError for a number that the type cannot hold."""
    where = f"key {key!r:.100}"
    if value.kind == STRING:
        return _encoded_text(where, value.value)
    if value.kind in SCALARS:
        try:
            return struct.pack(_CODES[value.kind], value.value)
        except (struct.error, OverflowError) as exc:
            raise InputError(where, f"is {value.value!r:.100}", f"a value of {SCALARS[value.kind].name}") from exc
    assert value.kind == ARRAY and value.element is not None, value.kind
    head = struct.pack("<IQ", value.element, len(value.value))
    if value.element == STRING:
        return head + b"".join(_encoded_text(where, item) for item in value.value)
    return head + np.ascontiguousarray(value.value, dtype=SCALARS[value.element]).tobytes()


def encode_header(
    metadata: Mapping[str, Value], tensors: Sequence[tuple[str, str, tuple[int, ...]]], alignment: int = DEFAULT_ALIGNMENT
) -> bytes:
    """The header of a version 3 file, padded: the data of ``tensors`` follow, each padded to ``alignment``.

    ``tensors`` are (name, type, shape slowest axis first), in the order of their data. ``alignment`` is what the metadata say
    (32 where they say nothing). Raises InputError for what the format cannot hold: a number too large for its type, text that
    is no UTF-8, a name of more than 63 bytes, a row that is no whole number of blocks.
    """
    stated = metadata[ALIGNMENT].value if ALIGNMENT in metadata else DEFAULT_ALIGNMENT
    assert stated == alignment and _is_alignment(alignment), (stated, alignment)
    assert len({name for name, _, _ in tensors}) == len(tensors), "a tensor is there twice"
    pieces = [MAGIC, struct.pack("<Iqq", WRITTEN_VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        pieces += [_encoded_text(f"key {key!r:.100}", key), struct.pack("<I", value.kind), _encoded(key, value)]
    offset = 0
    for name, kind, shape in tensors:
        pieces.append(tensor_record(name, kind, shape, offset))
        offset += padded(tensor_bytes(kind, shape), alignment)
    raw = b"".join(pieces)
    return raw + bytes(padded(len(raw), alignment) - len(raw))


def tensor_record(name: str, type: str, shape: Sequence[int], offset: int) -> bytes:  # noqa: A002
    """What a header says of a tensor. Raises InputError for a name or a shape that the format cannot hold."""
    where = f"tensor {name!r:.100}"
    head = _encoded_text(where, name)
    if not name or len(head) - STRING_HEAD > MAX_NAME_BYTES:
        raise InputError(where, f"has a name of {len(head) - STRING_HEAD} bytes", f"1 to {MAX_NAME_BYTES}")
    if len(shape) > MAX_DIMS:
        raise InputError(where, f"has {len(shape)} dimensions", f"at most {MAX_DIMS}")
    return head + struct.pack(f"<I{len(shape)}qIQ", len(shape), *reversed(shape), TYPE_IDS[type], offset)
