"""safetensors headers: bytes to entries and back, with every number checked before it is used (``formats.md`` 1.1).

Knows names, dtypes and offsets; never the data, and no model. A header comes from a stranger: nothing is allocated from a
length that it states before that length is compared with the bytes there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantkit import fs
from quantkit.errors import InputError
from quantkit.formats.jsonfile import parse_object

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 8
METADATA = "__metadata__"
DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "U64": 8,
        "I64": 8,
        "F64": 8,
        "C64": 8,
        "F32": 4,
        "U32": 4,
        "I32": 4,
        "BF16": 2,
        "F16": 2,
        "U16": 2,
        "I16": 2,
        "F8_E8M0": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "I8": 1,
        "U8": 1,
        "BOOL": 1,
    }
)
"""Bytes per element, in the order in which the reference writer places dtypes in a file."""
_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_BYTES)}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: bytes ``begin`` to ``end`` of its data area."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds. ``data_start`` is where the data area begins in the file."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def data_bytes(self) -> int:
        return max((entry.end for entry in self.entries.values()), default=0)


def _entry(name: str, value: Any, where: str) -> TensorEntry:
    at = f"{where}: {name!r:.200}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError(at, "is not a tensor entry", "dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(at, f"has dtype {dtype!r:.50}", f"one of {', '.join(DTYPE_BYTES)}")
    if not _counts(shape) or len(shape) > MAX_RANK:
        raise InputError(at, f"has shape {shape!r:.100}", f"at most {MAX_RANK} whole numbers")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(at, f"has data_offsets {offsets!r:.100}", "where it begins and where it ends")
    begin, end = offsets
    needs = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != needs:
        raise InputError(at, f"has {end - begin} bytes of data", f"{needs} for {dtype} {shape}")
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in value)


def _header_length(first: bytes, size: int, where: str) -> int:
    """The length of the JSON from the first eight bytes of a file of ``size`` bytes."""
    if size < LENGTH_BYTES or len(first) < LENGTH_BYTES:
        raise InputError(where, f"is {size} bytes long", f"a safetensors file, which has at least {LENGTH_BYTES}")
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(where, f"states a header of {length} bytes", f"at most {MAX_HEADER_BYTES} (is this a safetensors file?)")
    if length > size - LENGTH_BYTES:
        raise InputError(
            where, f"states a header of {length} bytes and has {size - LENGTH_BYTES} after it", "a whole file (is it truncated?)"
        )
    return length


def parse_header(raw: bytes, where: str) -> Header:
    """The header in ``raw``, the first bytes of a file up to its data; ``where`` names the file in errors.

    Raises InputError for anything but a well-formed header whose tensors lie one after the other without gap or overlap.
    """
    length = _header_length(raw, len(raw), where)
    text = raw[LENGTH_BYTES : LENGTH_BYTES + length]
    if text[:1] != b"{":
        raise InputError(f"{where}: header", f"begins with {text[:1]!r}", "a JSON object, as in every safetensors file")
    data = parse_object(text, f"{where}: header")
    metadata = data.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{where}: {METADATA}", "is not a map of strings", "string values")
    entries = {name: _entry(name, value, where) for name, value in data.items()}
    position = 0
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise InputError(f"{where}: {entry.name!r:.200}", f"begins at byte {entry.begin} and {kind}", f"byte {position}")
        position = entry.end
    return Header(MappingProxyType(entries), MappingProxyType(metadata), LENGTH_BYTES + length)


def read_header(path: Path) -> Header:
    """The header of the file at ``path``. Raises InputError as ``parse_header`` does, and for a file of another length than it says."""
    size, where = fs.file_size(path), str(path)
    first = b"".join(fs.read_range(path, 0, min(size, LENGTH_BYTES)))
    length = _header_length(first, size, where)
    header = parse_header(first + b"".join(fs.read_range(path, LENGTH_BYTES, length)), where)
    expected = header.data_start + header.data_bytes
    if size != expected:
        kind = "is truncated" if size < expected else "has bytes after its last tensor"
        raise InputError(where, f"is {size} bytes long: it {kind}", f"{expected} bytes")
    return header


def encode_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str], align: int = LENGTH_BYTES) -> bytes:
    """The first bytes of a file with ``entries`` in the order given, padded so that the data starts at a multiple of ``align``."""
    assert align % LENGTH_BYTES == 0, align
    head: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for entry in entries:
        head[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % align)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def canonical_order(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """``entries`` as the reference writer places them: by dtype, widest first, then by name."""
    return sorted(entries, key=lambda entry: (_ORDER[entry.dtype], entry.name))
