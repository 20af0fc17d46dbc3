"""The journal of an unfinished artifact: which units are committed, what they hold, and what made them.

One line per fact, ``<sha256 of the rest>  <JSON>``, appended and synced. The file lies in a directory that anyone may
have changed, so every field is checked; only its last line may be torn. Knows no spool data and no model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import fs
from quantkit.errors import InputError
from quantkit.formats.safetensors import TensorEntry
from quantkit.geometry import DTYPE_BYTES

VERSION = 1
JOURNAL_LIMIT = 256 << 20
MAX_BYTES = 1 << 60
MAX_RANK = 8
START_OVER = "--overwrite starts over"


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes in a file of their own."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Unit:
    """One committed unit. ``tensors`` lie in its spool file one after the other, ``begin`` to ``end``."""

    name: str
    spool: Blob
    tensors: tuple[TensorEntry, ...]
    facts: Mapping[str, Any]
    carry: Blob | None


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal file says. ``length`` is where its last good line ends; ``sums`` the hash of a SHA256SUMS about to be published."""

    identity: Mapping[str, Any]
    units: tuple[Unit, ...]
    sums: str | None
    length: int


def encode_line(data: Mapping[str, Any]) -> bytes:
    """One journal line. Raises ValueError for what strict JSON cannot hold (NaN, infinity)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return hashlib.sha256(text).hexdigest().encode() + b"  " + text + b"\n"


def first_line(identity: Mapping[str, Any]) -> bytes:
    """The line that says what the work is made from."""
    return encode_line({"journal": VERSION, "identity": identity})


def unit_line(unit: Unit) -> bytes:
    """The line that commits a unit."""
    return encode_line(
        {
            "unit": unit.name,
            "spool": [unit.spool.size, unit.spool.sha256],
            "tensors": [[t.name, t.dtype, list(t.shape)] for t in unit.tensors],
            "facts": unit.facts,
            "carry": None if unit.carry is None else [unit.carry.size, unit.carry.sha256],
        }
    )


def sums_line(sums_sha256: str) -> bytes:
    """The line that says which SHA256SUMS is about to be published."""
    return encode_line({"sums": sums_sha256})


def layout(tensors: list[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorEntry, ...]:
    """Entries of (name, dtype, shape) laid one after the other from byte 0."""
    entries, end = [], 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        entries.append(TensorEntry(name, dtype, shape, begin, end))
    return tuple(entries)


def _is_count(value: Any, limit: int = MAX_BYTES) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)


def _line(raw: bytes) -> dict[str, Any] | None:
    """The data of a line, or None when it is torn or altered."""
    digest, _, text = raw.partition(b"  ")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _blob(value: Any, where: str) -> Blob:
    if not isinstance(value, list) or len(value) != 2 or not _is_count(value[0]) or not _is_digest(value[1]):
        raise InputError(where, "a file entry is malformed", "a size and a sha256", START_OVER)
    return Blob(value[0], value[1])


def _tensor(value: Any, where: str) -> tuple[str, str, tuple[int, ...]]:
    if not isinstance(value, list) or len(value) != 3:
        raise InputError(where, "a tensor entry is malformed", "name, dtype and shape", START_OVER)
    name, dtype, shape = value
    if not isinstance(name, str) or not name or not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(where, f"tensor {name!r:.100} of dtype {dtype!r:.20}", "a name and a safetensors dtype", START_OVER)
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_count(size) for size in shape):
        raise InputError(where, f"tensor {name:.100} of shape {shape!r:.100}", f"at most {MAX_RANK} sizes", START_OVER)
    return name, dtype, tuple(shape)


def _unit(data: Mapping[str, Any], where: str) -> Unit:
    name, tensors, facts, carry = data.get("unit"), data.get("tensors"), data.get("facts"), data.get("carry")
    if not isinstance(name, str) or not isinstance(tensors, list) or not isinstance(facts, dict):
        raise InputError(where, "a unit line is malformed", "unit, tensors and facts", START_OVER)
    spool, entries = _blob(data.get("spool"), where), layout([_tensor(tensor, where) for tensor in tensors])
    total = entries[-1].end if entries else 0
    if total != spool.size:
        raise InputError(where, f"the tensors of unit {name!r:.100} take {total} bytes", f"the {spool.size} of its file", START_OVER)
    return Unit(name, spool, entries, facts, None if carry is None else _blob(carry, where))


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its number from 1, its data, and where it ends in the file."""

    number: int
    data: Mapping[str, Any]
    end: int


def read_lines(path: Path) -> tuple[Line, ...]:
    """The lines of a journal, each as it was written, the first of this version and with an identity; () for what `read_journal` says.

    A torn last line was never committed and is left out. Raises InputError for any other damage.
    """
    if not path.exists() and not path.is_symlink():
        return ()
    where = str(path)
    if path.is_symlink():
        raise InputError(where, "is a link", "the journal of an unfinished run", START_OVER)
    raw = fs.read_bytes(path, JOURNAL_LIMIT)
    *lines, _torn = raw.split(b"\n")
    parsed = [_line(line) for line in lines]
    if parsed and parsed[-1] is None:
        parsed.pop()  # after a power failure the last line may have its length but not its content
    found, end = list[Line](), 0
    for number, (line, data) in enumerate(zip(lines, parsed, strict=False), 1):
        if data is None:
            raise InputError(where, f"line {number} was changed after it was written", "an intact journal", START_OVER)
        end += len(line) + 1
        if number == 1 and (data.get("journal") != VERSION or not isinstance(data.get("identity"), dict)):
            expected = f"version {VERSION} and an identity"
            raise InputError(f"{where}: line 1", "is not a journal of this version", expected, START_OVER)
        found.append(Line(number, data, end))
    return tuple(found)


def read_journal(path: Path) -> Journal | None:
    """Read and check a journal of units; None when there is none, or not even its first line was written whole. Raises as `read_lines`."""
    lines = read_lines(path)
    if not lines:
        return None
    units, sums, seen = list[Unit](), None, set[str]()
    for line in lines[1:]:
        data, at = line.data, f"{path}: line {line.number}"
        if "sums" in data:
            sums = data["sums"]
            if not _is_digest(sums):
                raise InputError(at, "names no sha256", "64 hex digits", START_OVER)
        else:
            unit = _unit(data, at)
            names = [unit.name, *(f"tensor {t.name}" for t in unit.tensors)]
            if len(set(names)) != len(names) or seen & set(names):
                raise InputError(at, f"unit {unit.name!r:.100} or a tensor of it is there twice", "each once", START_OVER)
            seen |= set(names)
            units.append(unit)
            sums = None
    return Journal(lines[0].data["identity"], tuple(units), sums, lines[-1].end)


def changed_field(then: Any, now: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ: (dotted path, then, now); None when they are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            found = changed_field(then.get(key), now.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    # 4 and 4.0, 1 and True are equal to Python and not the same recipe.
    return None if type(then) is type(now) and then == now else (path, then, now)
