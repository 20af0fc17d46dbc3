"""Importance matrices: what calibration saw at the input of each weight, as files that llama.cpp writes and reads (``gguf.md`` 6).

Two forms: GGUF, and the older ``.dat``. Every number of a foreign file is compared with the bytes that remain before anything is
allocated. Knows names and numbers; knows no model and no torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from quantkit import fs
from quantkit.errors import InputError
from quantkit.formats import gguf
from quantkit.formats.gguf import GgufFile, GgufTensor, read_gguf

TYPE, IMATRIX = "general.type", "imatrix"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
MAX_BYTES = 8 << 30
"""The largest models of today have a matrix of about 2 GB."""
MAX_ENTRIES, MAX_DATASET_BYTES, MAX_CHUNKS = 1 << 16, 1 << 16, (1 << 31) - 1
MIN_RECORD = 17
"""Bytes of the smallest entry of a .dat file: three lengths, a name of one byte and one value."""
WINDOW = 1 << 20
F32 = np.dtype("<f4")
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
"""Rows are looked up in them and nothing is multiplied: an entry of another size is no reason to stop."""


@dataclass(frozen=True, slots=True)
class ImatrixEntry:
    """What was seen at the input of one weight, or of each matrix of a stack of experts.

    ``sums [n_mat, columns]`` float32 are sums of squares over ``counts [n_mat]`` float32 tokens. Finite, and none below 0.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]

    def importance(self) -> NDArray[np.float32]:
        """The mean square of each column, ``[n_mat, columns]`` float32; of a matrix that no token reached, ones."""
        seen = self.counts > 0
        counts = np.where(seen, self.counts, np.float32(1))[:, None]
        return np.where(seen[:, None], self.sums / counts, np.float32(1))


@dataclass(frozen=True, slots=True)
class Imatrix:
    """Entries by tensor name as GGUF files have it, and what they were gathered from.

    ``chunks`` windows of ``chunk_size`` tokens; None where the file does not say (a ``.dat`` file never states the size, and
    counts windows where the GGUF form counts tokens).
    """

    entries: Mapping[str, ImatrixEntry]
    datasets: tuple[str, ...] = ()
    chunks: int | None = None
    chunk_size: int | None = None


def importance_for(imatrix: Imatrix, name: str, n_mat: int, columns: int, where: str) -> NDArray[np.float32] | None:
    """The importance of the columns of tensor ``name``, ``[n_mat, columns]`` float32; None when the matrix has nothing on it.

    ``n_mat`` is 1, or the experts of a stack. Raises InputError, blaming ``where``, for an entry of another size; an embedding's
    is passed over instead (``gguf.md`` 4.7).
    """
    entry = imatrix.entries.get(name)
    if entry is None:
        return None
    if entry.sums.size != n_mat * columns:
        if name in EMBEDDINGS:
            return None
        what = f"has {entry.sums.size} values for {name}"
        raise InputError(where, what, f"{n_mat * columns}: {n_mat} x {columns} columns", "use a matrix made from the same model")
    return entry.importance().reshape(n_mat, columns)


# reading


def read_imatrix(path: Path) -> Imatrix:
    """Read and check an importance matrix, in the form that its first bytes say.

    Raises InputError naming the file, the field and the byte: for counts and lengths that the file cannot hold, names that are
    there twice, values that are not finite or are negative, and what is no importance matrix at all.
    """
    size = fs.file_size(path)
    if size > MAX_BYTES:
        raise InputError(str(path), f"is {size} bytes long", f"an importance matrix of at most {MAX_BYTES}")
    head = b"".join(fs.read_range(path, 0, min(size, len(gguf.MAGIC))))
    return _read_gguf(path) if head == gguf.MAGIC else _read_dat(path, size)


def _checked(values: NDArray[np.float32], where: str, what: str) -> NDArray[np.float32]:
    """``values``, which may be any bits, when they can be sums of squares or counts."""
    if not np.isfinite(values).all():
        raise InputError(where, f"holds {what} that is not finite", "finite numbers")
    if (values < 0).any():
        raise InputError(where, f"holds {what} below 0", "numbers of at least 0")
    return values


def _read_gguf(path: Path) -> Imatrix:
    file = read_gguf(path)
    if len(file.paths) > 1:
        raise InputError(str(path), f"is one of {len(file.paths)} parts", "a matrix in one file")
    kind = file.metadata.get(TYPE, IMATRIX)  # what llama.cpp always writes and never reads
    if kind != IMATRIX:
        raise InputError(f"{path}: key {TYPE!r}", f"is {kind!r:.100}", f"{IMATRIX!r}: this is no importance matrix")
    datasets, chunks, size = _facts(file)
    pairs: dict[str, dict[str, GgufTensor]] = {}
    for name, tensor in file.tensors.items():
        for suffix in (SUMS, COUNTS):  # what else a file holds (sums of another kind) is not for us
            if name.endswith(suffix):
                pairs.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    if not pairs:
        raise InputError(str(path), f"has no tensor that ends in {SUMS}", "an importance matrix with entries")
    entries = {name: _pair(path, name, found) for name, found in pairs.items()}
    return Imatrix(MappingProxyType(entries), datasets, chunks, size)


def _facts(file: GgufFile) -> tuple[tuple[str, ...], int, int]:
    """Data sets, chunks and their size: llama.cpp quantizes with no GGUF matrix that lacks one of them."""
    found: list[Any] = []
    for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE):
        value = file.metadata.get(key)
        good = isinstance(value, tuple) if key == DATASETS else type(value) is int and 0 <= value <= MAX_CHUNKS
        if key == DATASETS and isinstance(value, np.ndarray) and not value.size:  # an empty array is of no type
            value, good = (), True
        if not good:
            what = "is missing" if value is None else f"is {value!r:.100}"
            right = "strings" if key == DATASETS else f"a number up to {MAX_CHUNKS}"
            raise InputError(f"{file.path}: key {key!r}", what, f"{right}, as every importance matrix has")
        found.append(value)
    return found[0], found[1], found[2]


def _pair(path: Path, name: str, found: Mapping[str, GgufTensor]) -> ImatrixEntry:
    """The two tensors of one entry; sums of several matrices may have one count in common."""
    for suffix, other in ((SUMS, COUNTS), (COUNTS, SUMS)):
        if suffix not in found:
            raise InputError(f"{path}: {name}{other}", f"has no {name}{suffix} beside it", "both")
    for suffix, tensor in found.items():
        where = f"{path}: {name}{suffix}"
        if tensor.type != "F32":
            raise InputError(where, f"is of type {tensor.type}", "F32")
        if not tensor.nbytes:
            raise InputError(where, f"has shape {list(tensor.shape)}", "at least one value")
    sums = _values(path, found[SUMS], f"{path}: {name}{SUMS}", "a sum")
    counts = _values(path, found[COUNTS], f"{path}: {name}{COUNTS}", "a count")
    shape, where = found[SUMS].shape, f"{path}: {name}{COUNTS}"
    rows = sums.size // (shape[-1] if shape else 1)
    if counts.size not in (1, rows):
        raise InputError(where, f"has {counts.size} counts for sums of shape {list(shape)}", f"{rows}, or 1 for all")
    if (counts != np.rint(counts)).any():
        raise InputError(where, "holds a count that is no whole number", "numbers of tokens")
    return ImatrixEntry(sums.reshape(counts.size, -1), counts)


def _values(path: Path, tensor: GgufTensor, where: str, what: str) -> NDArray[np.float32]:
    raw = b"".join(fs.read_range(path, tensor.offset, tensor.nbytes))
    return _checked(np.frombuffer(raw, F32), where, what)


class _Cursor:
    """A position in a .dat file, and a window of the bytes that follow it."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self._start, self._window = 0, b""

    def fail(self, field: str, what: str, expected: str) -> NoReturn:
        raise InputError(f"{self.path}: {field}", f"{what} (at byte {self.at})", expected)

    @property
    def remaining(self) -> int:
        return self.size - self.at

    def take(self, nbytes: int, field: str) -> bytes:
        if nbytes > self.remaining:
            self.fail(field, f"needs {nbytes} bytes, {self.remaining} remain", "a whole file (is it truncated?)")
        if self.at + nbytes > self._start + len(self._window):
            want = min(self.remaining, max(nbytes, WINDOW))
            self._start, self._window = self.at, b"".join(fs.read_range(self.path, self.at, want))
        first = self.at - self._start
        self.at += nbytes
        return self._window[first : first + nbytes]

    def number(self, field: str) -> int:
        """A signed 32-bit number that counts something."""
        value = int.from_bytes(self.take(4, field), "little", signed=True)
        if value < 0:
            self.at -= 4
            self.fail(field, f"is {value}", f"0 to {MAX_CHUNKS}")
        return value

    def length(self, field: str, low: int, limit: int, record: int) -> int:
        """A signed 32-bit number, ``low`` to ``limit``, of records of at least ``record`` bytes that follow."""
        value = int.from_bytes(self.take(4, field), "little", signed=True)
        fits, remaining = min(limit, self.remaining // record), self.remaining
        if not low <= value <= fits:
            self.at -= 4
            self.fail(field, f"is {value}", f"{low} to {max(low, fits)}: {remaining} bytes follow")
        return value


def _read_dat(path: Path, size: int) -> Imatrix:
    if size < 4 + MIN_RECORD:
        raise InputError(str(path), f"is {size} bytes long, and no GGUF file", "an importance matrix, as GGUF or .dat")
    cursor = _Cursor(path, size)
    entries: dict[str, ImatrixEntry] = {}
    for number in range(cursor.length("number of entries", 1, MAX_ENTRIES, MIN_RECORD)):
        name = _name(cursor, number)
        field = f"entry {name!r}"
        if name in entries:
            cursor.fail(field, "is there twice", "each name once")
        calls = cursor.number(f"{field}, calls")
        columns = cursor.length(f"{field}, values", 1, MAX_BYTES, F32.itemsize)
        values = np.frombuffer(cursor.take(columns * F32.itemsize, field), F32)
        sums = _checked(values, f"{path}: {field}", "a value").reshape(1, -1)
        # A value is the mean square times the calls, and without calls the mean square itself.
        entries[name] = ImatrixEntry(sums, np.array([calls or 1], np.float32))
    chunks, dataset = None, ""
    if cursor.remaining:
        chunks = cursor.number("chunk count")
        raw = cursor.take(cursor.length("data set", 0, MAX_DATASET_BYTES, 1), "data set")
        dataset = raw.decode(errors="replace")  # a path, in whatever encoding its file system had
    if cursor.remaining:
        cursor.fail("end", f"{cursor.remaining} more bytes follow", "the end of the file")
    return Imatrix(MappingProxyType(entries), (dataset,) if dataset else (), chunks, None)


def _name(cursor: _Cursor, number: int) -> str:
    field = f"name of entry {number}"
    raw = cursor.take(cursor.length(field, 1, gguf.MAX_NAME_BYTES, 1), field)
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        cursor.fail(field, f"is {raw!r}", "a UTF-8 name")
    if not name.isprintable():
        cursor.fail(field, f"is {name!r}", "a name of printable characters")
    return name


# writing


def encode_gguf(imatrix: Imatrix) -> bytes:
    """The GGUF form, entries by name: the same matrix always gives the same bytes.

    Trailing sizes of 1 are left out of shapes, as llama.cpp writes them. Where ``chunk_size`` is not known it is 1: what is counted
    are chunks then.
    """
    metadata = {
        TYPE: gguf.text(IMATRIX),
        DATASETS: gguf.texts(imatrix.datasets),
        CHUNK_COUNT: gguf.u32(imatrix.chunks or 0),
        CHUNK_SIZE: gguf.u32(imatrix.chunk_size or 1),
    }
    shapes: list[tuple[str, str, tuple[int, ...]]] = []
    pieces: list[bytes] = []
    for name, entry in sorted(imatrix.entries.items()):
        n_mat, columns = entry.sums.shape
        shapes.append((f"{name}{SUMS}", "F32", (columns,) if n_mat == 1 else (n_mat, columns)))
        shapes.append((f"{name}{COUNTS}", "F32", (1,) if n_mat == 1 else (n_mat, 1)))
        for values in (entry.sums, entry.counts):
            raw = np.ascontiguousarray(values, F32).tobytes()
            pieces.append(raw + bytes(-len(raw) % gguf.DEFAULT_ALIGNMENT))
    return b"".join((gguf.encode_header(metadata, shapes), *pieces))


def encode_dat(imatrix: Imatrix) -> bytes:
    """The older form, entries by name. Matrices of a stack that no token reached get ones, as nothing can say so there; an entry that
    no token reached at all is left out, and so is the size of a chunk.

    Raises InputError when nothing is left to write.
    """
    reached = {name: entry for name, entry in sorted(imatrix.entries.items()) if (entry.counts > 0).any()}
    if not reached:
        raise InputError("importance matrix", "has no entry that a token reached", "at least one")
    pieces = [struct.pack("<i", len(reached))]
    for name, entry in reached.items():
        calls = math.ceil(float(entry.counts.max()) / (imatrix.chunk_size or 1))
        counts = np.where(entry.counts > 0, entry.counts, np.float32(1))[:, None]
        means = np.where(entry.counts[:, None] > 0, entry.sums, np.float32(1)) / counts
        # What was read from such a file goes back as it was.
        values = np.where(entry.counts[:, None] == calls, entry.sums, means * np.float32(calls))
        raw = name.encode()
        pieces += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, values.size), np.ascontiguousarray(values, F32).tobytes()]
    dataset = (imatrix.datasets[-1] if imatrix.datasets else "").encode()[:MAX_DATASET_BYTES]
    return b"".join((*pieces, struct.pack("<ii", imatrix.chunks or 0, len(dataset)), dataset))
