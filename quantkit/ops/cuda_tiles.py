"""A linear on tiles on a GPU, and the torch operators that it is made of: ``quantkit::tiles_dequantize``, ``quantkit::tiles_matmul``.

The kernels are in ``kernels/``; ``tiles.py`` is their reference, and what the operators run on a CPU. Each has a fake, so CUDA graphs and
torch.compile take them. One stream of a device may multiply at a time: the products share a workspace.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.errors import MachineError
from quantkit.ops import kernel_select
from quantkit.ops.cuda_call import call, checked
from quantkit.ops.cuda_library import HINT, find_library, load_library
from quantkit.ops.tiles import GROUPS, Format, Tiles, dequantize

TYPES = {torch.float16: 0, torch.bfloat16: 1}
"""What activations and dense weights may be; the numbers are those of ``kernels/quantkit.h``."""
UNSUPPORTED = -1
"""What the library answers where no kernel takes a product, or a dense one is faster."""
WORKSPACE = 64 << 20
"""Bytes of each device's workspace: counters, and partial sums of products that are cut along K."""

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class Weight(ctypes.Structure):
    """``QkWeight`` of ``kernels/quantkit.h``."""

    _fields_ = (
        *((name, _POINTER) for name in ("tiles", "table", "code", "absmax2", "offsets")),
        *((name, ctypes.c_int32) for name in ("format", "scale_type", "group")),
        *((name, _LONG) for name in ("n", "k", "block0", "block_row_stride")),
    )


class Config(ctypes.Structure):
    """``QkConfig`` of ``kernels/quantkit.h``."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("kernel", "a", "b", "c", "d"))


_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "quantkit_dequantize": (ctypes.POINTER(Weight), _POINTER, _INT, _POINTER),
    "quantkit_matmul": (
        *(ctypes.POINTER(Weight), _POINTER, _LONG, _LONG, _INT, _POINTER, _POINTER),
        *(_POINTER, _LONG, ctypes.POINTER(Config), _POINTER),
    ),
}


@cache
def _function(name: str) -> Any:
    """A function of the library, typed. Raises MachineError when the library is not built, or is of other sources."""
    library = load_library()
    try:
        found = getattr(library, name)
    except AttributeError as error:
        raise MachineError("CUDA kernels", f"lack a function ({error})", "a library of this version of quantkit", HINT) from error
    found.argtypes, found.restype = _ARGUMENTS[name], ctypes.c_int
    return found


def available(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Whether linears on tiles run on ``device`` in ``dtype``: a GPU of compute capability 8.0 or later, and kernels that are built.

    Raises MachineError when ``QUANTKIT_KERNELS`` names no file.
    """
    where = torch.device(device)
    return where.type == "cuda" and dtype in TYPES and torch.cuda.get_device_capability(where) >= (8, 0) and find_library() is not None


@cache
def workspace(device: torch.device) -> Tensor:
    """The workspace of a device, all zeros at first. It must exist before a graph is captured: ``TiledLinear`` sees to that."""
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def facts(tiles: Tiles) -> list[int]:
    """The numbers of ``tiles`` as the operators take them."""
    group = tiles.group if tiles.group in GROUPS or tiles.format == Format.Q6_K else 128
    return [int(tiles.format), TYPES[tiles.scale_dtype], group, tiles.n, tiles.k, tiles.block0, tiles.block_stride]


def _tiles(
    data: Tensor, table: Tensor | None, code: Tensor | None, absmax2: Tensor | None, offsets: Tensor | None, numbers: list[int]
) -> Tiles:
    form, scale, group, n, k, block0, stride = numbers
    scales = next(dtype for dtype, number in TYPES.items() if number == scale)
    # A row of 128 columns or less may have one scale for all of it; unpacking asks for the group's true length.
    whole = min(group, k) if group == 128 else group
    return Tiles(data, Format(form), n, k, whole, scales, table, code, absmax2, offsets, block0, stride)


def _weight(
    data: Tensor, table: Tensor | None, code: Tensor | None, absmax2: Tensor | None, offsets: Tensor | None, numbers: list[int]
) -> Weight:
    side = (None if part is None else part.data_ptr() for part in (table, code, absmax2, offsets))
    return _described(data.data_ptr(), *side, *numbers)


@lru_cache(maxsize=1 << 14)
def _described(*fields: int | None) -> Weight:
    """The same numbers are the same weight: a struct is filled once for each linear, not at each call."""
    return Weight(*fields)


_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_WEIGHT = "Tensor data, Tensor? table, Tensor? code, Tensor? absmax2, Tensor? offsets, int[] facts"
_LIBRARY.define(f"tiles_dequantize({_WEIGHT}, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"tiles_matmul(Tensor x, {_WEIGHT}, Tensor? bias, int[] config) -> Tensor")  # type: ignore[no-untyped-call]

Part = Tensor | None


def _dequantize_cpu(data: Tensor, table: Part, code: Part, absmax2: Part, offsets: Part, facts: list[int], dtype: torch.dtype) -> Tensor:
    return dequantize(_tiles(data, table, code, absmax2, offsets, facts), dtype)


def _dequantize_cuda(data: Tensor, table: Part, code: Part, absmax2: Part, offsets: Part, facts: list[int], dtype: torch.dtype) -> Tensor:
    out = torch.empty(facts[3], facts[4], dtype=dtype, device=data.device)
    weight = _weight(data, table, code, absmax2, offsets, facts)
    checked("quantkit_dequantize", call(_function("quantkit_dequantize"), data.device, weight, out.data_ptr(), TYPES[dtype]), data.device)
    return out


def _matmul_cpu(
    x: Tensor, data: Tensor, table: Part, code: Part, absmax2: Part, offsets: Part, facts: list[int], bias: Part, config: list[int]
) -> Tensor:
    dense = dequantize(_tiles(data, table, code, absmax2, offsets, facts))
    return functional.linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)


def _matmul_cuda(
    x: Tensor, data: Tensor, table: Part, code: Part, absmax2: Part, offsets: Part, facts: list[int], bias: Part, config: list[int]
) -> Tensor:
    out = torch.empty(x.shape[0], facts[3], dtype=x.dtype, device=x.device)
    if not x.shape[0]:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    choice = kernel_select.Config(*config) if config else kernel_select.chosen(x.device, facts[0], facts[3], facts[4], x.shape[0])
    found = UNSUPPORTED
    if choice.kernel != kernel_select.DENSE:
        weight, scratch = _weight(data, table, code, absmax2, offsets, facts), workspace(x.device)
        given = (
            *(_function("quantkit_matmul"), x.device, weight, x.data_ptr(), x.shape[0], x.stride(0), TYPES[x.dtype]),
            *(None if bias is None else bias.data_ptr(), out.data_ptr(), scratch.data_ptr(), scratch.numel()),
        )
        found = call(*given, Config(*choice))
        if found == UNSUPPORTED and choice.kernel != kernel_select.RULE:  # a table of other groups or another dtype
            found = call(*given, None)
    if found == UNSUPPORTED:
        return functional.linear(x, _dequantize_cuda(data, table, code, absmax2, offsets, facts, x.dtype), bias)
    checked("quantkit_matmul", found, x.device)
    return out


def _dequantize_fake(data: Tensor, table: Part, code: Part, absmax2: Part, offsets: Part, facts: list[int], dtype: torch.dtype) -> Tensor:
    return data.new_empty(facts[3], facts[4], dtype=dtype)


def _matmul_fake(
    x: Tensor, data: Tensor, table: Part, code: Part, absmax2: Part, offsets: Part, facts: list[int], bias: Part, config: list[int]
) -> Tensor:
    return x.new_empty(x.shape[0], facts[3])


for _name, _cpu, _cuda, _fake in (
    ("tiles_dequantize", _dequantize_cpu, _dequantize_cuda, _dequantize_fake),
    ("tiles_matmul", _matmul_cpu, _matmul_cuda, _matmul_fake),
):
    _LIBRARY.impl(_name, _cpu, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"quantkit::{_name}", _fake, lib=_LIBRARY)


class TiledLinear:
    """``y [T, N] = x [T, K] W^T`` on the tiles of W, in float16 or bfloat16, sums in float32; the caller adds ``bias``.

    The weight is what the tiles hold, rounded once to the linear's dtype (bitsandbytes rounds to the dtype that it quantized first). Which
    kernel runs is ``kernel_select``'s to say; where none takes the product the weight is dequantized for the call.
    """

    def __init__(self, tiles: Tiles, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        assert dtype in TYPES, dtype
        self.bias, self.tiles, self.dtype = bias, tiles, dtype
        self._arguments = (tiles.data, tiles.table, tiles.code, tiles.absmax2, tiles.offsets, facts(tiles))
        if tiles.data.is_cuda:
            workspace(tiles.data.device)
            # Kernels read weights before the one ahead of them has ended: whatever made these has to have.
            torch.cuda.current_stream(tiles.data.device).synchronize()

    @property
    def nbytes(self) -> int:
        """Bytes held: tiles, their side tables, and the bias."""
        return self.tiles.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def weight(self) -> Tensor:
        """The dense weight ``[N, K]``, in the order of the inputs."""
        dense: Tensor = torch.ops.quantkit.tiles_dequantize(*self._arguments, self.dtype)
        return dense if self.tiles.perm is None else dense[:, self.tiles.perm.argsort()]

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, K]`` of the linear's dtype -> ``[T, N]``."""
        assert x.dtype == self.dtype, x.dtype
        if self.tiles.perm is not None:
            x = x.index_select(1, self.tiles.perm)
        y: Tensor = torch.ops.quantkit.tiles_matmul(x, *self._arguments, None, [])
        return y
