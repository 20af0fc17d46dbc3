"""``model.safetensors.index.json``: which file of a sharded checkpoint holds which tensor (``formats.md`` 1.2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from quantkit import fs
from quantkit.errors import InputError
from quantkit.formats.jsonfile import read_object

INDEX_LIMIT = 256 << 20
MAX_FILES = 100_000


def encode_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The index of ``weight_map`` (tensor -> file); ``total_size`` in tensor bytes, headers not counted."""
    data = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_index(path: Path) -> dict[str, Path]:
    """Tensor -> file beside ``path``. Raises InputError for anything but an index of plain file names in the same directory."""
    where = str(path)
    weights = read_object(path, INDEX_LIMIT, "an index of safetensors files").get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise InputError(where, "has no weight_map", "a map from tensors to files")
    names = set(weights.values())
    if len(names) > MAX_FILES:
        raise InputError(where, f"names {len(names)} files", f"at most {MAX_FILES}")
    files = {name: fs.confined(path.parent, name, where) for name in sorted(names)}
    return {tensor: files[name] for tensor, name in weights.items()}
