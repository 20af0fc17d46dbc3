"""What ``quantkit inspect`` says of a GGUF file, of whatever architecture: metadata, block types and parts, from its header alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quantkit import fs
from quantkit.commands.plan import human
from quantkit.formats.gguf import ALIGNMENT, ARRAY, BY_NAME, DEFAULT_ALIGNMENT, F32, STRING, GgufFile, GgufTensor
from quantkit.geometry import GGML_BLOCKS
from quantkit.mixtures import FILE_TYPE_NAMES
from quantkit.report import Table

FILE_TYPE = "general.file_type"
VALUE_TYPES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")
"""Names of the value types, by id."""
FIRST_ITEMS, ITEM_CHARACTERS, SHOWN_CHARACTERS = 8, 24, 100


def gguf_lines(file: GgufFile) -> tuple[tuple[str, str], ...]:
    """The format, and what the file says its types are."""
    parts = f", {len(file.paths)} parts" if len(file.paths) > 1 else ""
    lines = [("format", f"GGUF version {file.version}, aligned to {_alignment(file)} bytes{parts}")]
    stated = _file_type(file)
    return (*lines, ("file type", str(stated["name"]))) if stated else tuple(lines)


def gguf_tables(file: GgufFile) -> tuple[Table, ...]:
    """Block types with what they take, the parts of a split model, and every key."""
    types = _types(file)
    rows = [
        (name, found["tensors"], f"{found['weights']:,}", human(found["bytes"]), f"{found['bits_per_weight']:.4g}")
        for name, found in types.items()
    ]
    if len(types) > 1:
        whole = _sum(list(file.tensors.values()))
        rows.append(("all", whole["tensors"], f"{whole['weights']:,}", human(whole["bytes"]), f"{whole['bits_per_weight']:.4g}"))
    tables = [Table("Tensors by type", ("type", "tensors", "weights", "size", "bits per weight"), tuple(rows))]
    if len(file.paths) > 1:
        parts = tuple((part["file"], part["tensors"], human(part["bytes"])) for part in _parts(file))
        tables.append(Table("Parts", ("file", "tensors", "size"), parts))
    metadata = tuple((key, _kind(file, key), _shown(file, key)) for key in file.metadata)
    return (*tables, Table("Metadata", ("key", "type", "value"), metadata))


def gguf_warnings(file: GgufFile) -> tuple[str, ...]:
    """What a user should know before serving the file."""
    widened = Counter(t.type for t in file.tensors.values() if BY_NAME[t.type].elements > 1 and t.type not in GGML_BLOCKS)
    listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(widened.items()))
    return (f"tensors of these types become floats as they are loaded, which takes more memory: {listed}",) if widened else ()


def gguf_data(file: GgufFile) -> dict[str, Any]:
    """The same as data; of an array its length and its first items."""
    return {
        "version": file.version,
        "alignment": _alignment(file),
        "file_type": _file_type(file),
        "parts": _parts(file),
        "types": _types(file),
        "bits_per_weight": _sum(list(file.tensors.values()))["bits_per_weight"],
        "metadata": {key: {"type": _kind(file, key), **_plain(file, key)} for key in file.metadata},
    }


def tensor_table(file: GgufFile, names: Mapping[str, Sequence[str]]) -> Table:
    """Every tensor as it is stored; ``names`` are those of the model's tensors that it holds, several where it stacks experts."""
    rows = tuple((t.name, t.type, " x ".join(map(str, t.shape)) or "scalar", t.nbytes, _name(names, t.name)) for t in file.tensors.values())
    return Table("Tensors", ("name", "type", "shape", "bytes", "in the model"), rows)


def tensor_data(file: GgufFile, names: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The same as data."""
    return [
        {
            "name": tensor.name,
            "dtype": tensor.type,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "file": tensor.file.name,
            "model_names": list(names.get(tensor.name, ())),
        }
        for tensor in file.tensors.values()
    ]


def _name(names: Mapping[str, Sequence[str]], tensor: str) -> str | None:
    found = names.get(tensor, ())
    return None if not found else found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"


def _alignment(file: GgufFile) -> int:
    return int(file.metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT))


def _file_type(file: GgufFile) -> dict[str, Any] | None:
    number = file.metadata.get(FILE_TYPE)
    if not isinstance(number, int) or isinstance(number, bool):
        return None
    return {"id": number, "name": FILE_TYPE_NAMES.get(number, f"unknown ({number})")}


def _sum(tensors: Sequence[GgufTensor]) -> dict[str, Any]:
    weights, nbytes = sum(math.prod(tensor.shape) for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    return {"tensors": len(tensors), "weights": weights, "bytes": nbytes, "bits_per_weight": 8 * nbytes / max(weights, 1)}


def _types(file: GgufFile) -> dict[str, dict[str, Any]]:
    """Tensor type -> what it takes, the largest first."""
    by_type: dict[str, list[GgufTensor]] = {}
    for tensor in file.tensors.values():
        by_type.setdefault(tensor.type, []).append(tensor)
    found = {name: _sum(tensors) for name, tensors in by_type.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _parts(file: GgufFile) -> list[dict[str, Any]]:
    held = {path: sum(tensor.file == path for tensor in file.tensors.values()) for path in file.paths}
    return [{"file": path.name, "bytes": fs.file_size(path), "tensors": count} for path, count in held.items()]


def _kind(file: GgufFile, key: str) -> str:
    kind = file.types[key]
    return f"array of {VALUE_TYPES[file.element_types[key]]}" if kind == ARRAY else VALUE_TYPES[kind]


def _number(value: Any, kind: int) -> Any:
    """A number of the file; a float32 as the shortest decimal that is the same float32."""
    return float(str(np.float32(value))) if kind == F32 else value


def _plain(file: GgufFile, key: str) -> dict[str, Any]:
    value, kind = file.metadata[key], file.types[key]
    if kind != ARRAY:
        return {"value": _number(value, kind)}
    element = file.element_types[key]
    first = list(value[:FIRST_ITEMS]) if element == STRING else [_number(item, element) for item in value[:FIRST_ITEMS].tolist()]
    return {"length": len(value), "first": first}


def _shown(file: GgufFile, key: str) -> str:
    plain = _plain(file, key)
    if "value" in plain:
        value = plain["value"]
        if not isinstance(value, str):
            return str(value)
        return _cut(value, SHOWN_CHARACTERS) + (f" ({len(value):,} characters)" if len(value) > SHOWN_CHARACTERS else "")
    items = [repr(_cut(item, ITEM_CHARACTERS)) if isinstance(item, str) else str(item) for item in plain["first"]]
    return f"{plain['length']:,}: {', '.join([*items, *(['...'] if plain['length'] > len(items) else [])])}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
