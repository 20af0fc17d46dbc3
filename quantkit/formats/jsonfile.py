"""JSON objects that come from a stranger: bounded, each name once, and one error for whatever is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from quantkit import fs
from quantkit.errors import InputError

JSON_LIMIT = 64 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def parse_object(data: bytes, where: str, expected: str = "a JSON object") -> dict[str, Any]:
    """The object that ``data`` (UTF-8) holds.

    Raises InputError, blaming ``where``, for anything else, a name that is there twice, or half a surrogate pair.
    """
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        if _SURROGATE.search(data):
            json.dumps(found, ensure_ascii=False).encode()  # half a pair is no character: no file, name or line could hold it
    except (ValueError, RecursionError) as exc:
        raise InputError(where, f"is not JSON ({exc!s:.100})", expected) from exc
    if not isinstance(found, dict):
        raise InputError(where, f"holds {type(found).__name__}", expected)
    return found


def read_object(path: Path, limit: int = JSON_LIMIT, expected: str = "a JSON object") -> dict[str, Any]:
    """The object in the file at ``path``, of at most ``limit`` bytes. Raises InputError as ``parse_object`` does."""
    return parse_object(fs.read_bytes(path, limit), str(path), expected)
