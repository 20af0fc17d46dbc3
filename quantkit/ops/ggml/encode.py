"""float32 matrices -> the bytes of ggml's block types, byte for byte those of ggml built for x86-64 without fused multiply-add.

Block types code a row of a matrix in blocks of 32 or 256 consecutive elements. Every type but Q8_0 can weigh the error of a column by its
importance, the mean square of the activation that the column meets. The formulas are in ``gguf.md`` 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from quantkit.errors import InputError, MachineError

Floats = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "Q4_0": (32, 18),
        "Q4_1": (32, 20),
        "Q5_0": (32, 22),
        "Q5_1": (32, 24),
        "Q8_0": (32, 34),
        "IQ4_NL": (32, 18),
        "Q2_K": (256, 84),
        "Q3_K": (256, 110),
        "Q4_K": (256, 144),
        "Q5_K": (256, 176),
        "Q6_K": (256, 210),
        "IQ4_XS": (256, 136),
    }
)
"""Kind -> elements and bytes of one block."""
_HALVES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "Q4_0": (0,),
        "Q4_1": (0, 2),
        "Q5_0": (0,),
        "Q5_1": (0, 2),
        "Q8_0": (0,),
        "IQ4_NL": (0,),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
        "IQ4_XS": (0,),
    }
)
"""Kind -> offsets of the float16 scales in a block."""


class RowRefused(InputError):
    """A row that its type cannot hold. ``finite``: its values are numbers, and too large."""

    def __init__(self, where: str, row: int, *, finite: bool) -> None:
        self.row, self.finite = row, finite
        what = f"the scale of a block of row {row} does not fit in float16" if finite else f"row {row} is not finite"
        super().__init__(where, what, "smaller values or importance" if finite else "finite values")


Encoder = Callable[[Floats, Floats, Bytes], int]
"""Fills a part of the answer; gives its first block that has a value which is not finite or a scale beyond float16, -1 if none has."""


def _encoder(kind: str, weighed: bool) -> Encoder:
    """The compiled encoder of a kind. Imports numba here, since that takes longer than all the rest of the command line."""
    try:
        from quantkit.ops.ggml import kernels, rounded
    except ImportError as error:
        raise MachineError("numba", f"cannot be imported ({error})", "what compiles the encoders of GGUF", "pip install numba") from error
    except RuntimeError as error:
        raise MachineError("numba", f"{error}", "a writable directory for compiled code", "set NUMBA_CACHE_DIR") from error

    def checked(kernel: Callable[[Floats, Floats, Bytes], None]) -> Encoder:
        def run(values: Floats, importance: Floats, out: Bytes) -> int:
            bad: int = kernels.first_not_finite(values)
            if bad < 0:
                kernel(values, importance, out)
                found = [kernels.first_infinite(out, offset) for offset in _HALVES[kind]]
                bad = min((block for block in found if block >= 0), default=-1)
            return bad

        return run

    legacy = {"Q4_0": (False, False), "Q4_1": (False, True), "Q5_0": (True, False), "Q5_1": (True, True)}
    if kind in legacy:
        if not weighed:
            return lambda values, importance, out: rounded.encode_legacy_plain(values, out, *legacy[kind])
        return checked(lambda values, importance, out: kernels.encode_legacy(values, importance, out, *legacy[kind]))
    table: dict[str, Callable[[Floats, Floats, Bytes], None]] = {
        "Q8_0": lambda values, importance, out: rounded.encode_q8_0(values, out),
        "Q2_K": lambda values, importance, out: kernels.encode_min(values, importance, out, 2),
        "Q3_K": kernels.encode_q3_k,
        "Q4_K": lambda values, importance, out: kernels.encode_min(values, importance, out, 4),
        "Q5_K": lambda values, importance, out: kernels.encode_min(values, importance, out, 5),
        "Q6_K": kernels.encode_q6_k,
        "IQ4_NL": kernels.encode_iq4,
        "IQ4_XS": kernels.encode_iq4,
    }
    return checked(table[kind])


def encode(values: Floats, kind: str, importance: Floats | None = None, threads: int = 1) -> Bytes:
    """Encode a matrix by rows.

    ``values``: float32 [rows, columns], C-contiguous, finite. ``kind``: a key of ``BLOCKS``. ``importance``: float32 [columns], finite and
    not negative; Q8_0 rounds each element alone, so it comes out the same with any. ``threads`` share the rows; their number does not
    change a byte. Returns uint8 [rows, columns // elements * bytes]. Raises ``InputError`` for any other input, ``RowRefused`` for values
    that are not finite or whose scale does not fit in float16; ``MachineError`` without numba.
    """
    if kind not in BLOCKS:
        raise InputError(kind, "unknown block type", f"one of {', '.join(BLOCKS)}")
    elements, size = BLOCKS[kind]
    if values.ndim != 2 or values.dtype != np.float32 or not values.flags.c_contiguous:
        raise InputError(f"{kind} values", f"{values.dtype} of shape {values.shape}", "a C-contiguous float32 matrix")
    rows, columns = values.shape
    if columns % elements:
        raise InputError(f"{kind} values", f"{columns} columns", f"a multiple of {elements}")
    if threads < 1:
        raise InputError("threads", str(threads), "at least 1")
    weights = np.empty((0, elements), np.float32)
    if importance is not None:
        if importance.shape != (columns,) or importance.dtype != np.float32:
            raise InputError("importance", f"{importance.dtype} of shape {importance.shape}", f"float32 of shape ({columns},)")
        if not (np.isfinite(importance) & (importance >= 0)).all():
            raise InputError("importance", "has a value that is negative or not finite", "finite values, 0 or more")
        weights = np.ascontiguousarray(importance).reshape(-1, elements)
    out = np.empty((rows, columns // elements * size), np.uint8)
    if out.size == 0:
        return out
    encoder = _encoder(kind, importance is not None)
    edges = [rows * i // threads for i in range(threads + 1)]

    def part(first: int, last: int) -> int:
        """The first row that cannot be encoded, -1 if all can."""
        bad = encoder(values[first:last].reshape(-1, elements), weights, out[first:last].reshape(-1, size))
        return -1 if bad < 0 else first + bad // (columns // elements)

    parts = [(first, last) for first, last in pairwise(edges) if first < last]
    if len(parts) == 1:
        found = [part(*parts[0])]
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            found = [task.result() for task in [pool.submit(part, *span) for span in parts]]
    bad = next((row for row in found if row >= 0), None)
    if bad is not None:
        raise RowRefused(f"{kind} values", bad, finite=bool(np.isfinite(values[bad]).all()))
    return out
