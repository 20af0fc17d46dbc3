"""Floats of one width as those of another, BF16 as its bits: to float32, which is exact, and rounded as a file stores them.

Knows arrays of numpy; knows no tensor, no name and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STORED: Mapping[str, np.dtype[Any]] = MappingProxyType({"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")})


def widened(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Floats of any ``dtype`` (BF16 as uint16) as float32, of any shape; exact, but for float64."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # a float64 that leaves float32 is infinite there
        return values.astype(np.float32, copy=False)


def rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Floats as ``dtype`` stores them, BF16 as uint16: to nearest, ties to even; what is too large becomes infinite; a NaN stays one."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return values.astype(_STORED[dtype], copy=False)
        bits = values.astype(np.float32, copy=False).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40  # adding could carry a NaN's payload away
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, nearest).astype(np.uint16)
