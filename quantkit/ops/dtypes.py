"""Storage dtypes between files and torch: names as safetensors writes them, bits as numpy reads them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.errors import InputError

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in TORCH_DTYPES.items()})
FLOAT_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
)


def float_dtype(name: str, where: str = "--dtype") -> torch.dtype:
    """The torch dtype of a name such as ``bfloat16``. Raises InputError for any other name."""
    if name not in FLOAT_DTYPES:
        raise InputError(where, f"{name!r} is not a float dtype", f"one of {', '.join(FLOAT_DTYPES)}")
    return FLOAT_DTYPES[name]


def as_tensor(array: NDArray[np.generic], dtype: str) -> Tensor:
    """A tensor over the bits of ``array``, viewed as the safetensors dtype ``dtype``; any shape, no copy when writable."""
    bits = np.ascontiguousarray(array)
    if not bits.flags.writeable:
        bits = bits.copy()
    target = TORCH_DTYPES[dtype]
    if bits.dtype == np.uint16:
        return torch.from_numpy(bits.view(np.int16)).view(target)
    if bits.dtype == np.uint8 and target != torch.uint8:
        return torch.from_numpy(bits).view(target)
    return torch.from_numpy(bits)


def as_bytes(tensor: Tensor) -> memoryview:
    """The little-endian, row-major bytes of ``tensor`` as a flat memoryview."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
