"""``gptq_solver.round_columns`` as one Triton kernel: a block of columns in one launch. Imported only where Triton is installed.

Each program holds all columns of some outputs in registers and rounds them one after the other: outputs do not know of each other.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

from torch import Tensor

triton: Any = importlib.import_module("triton")  # installed with torch for CUDA, and without stubs
tl: Any = importlib.import_module("triton.language")

COLUMNS = 128
"""Columns that fit into the registers of a program."""
TILE = 32
"""Outputs to a program of one warp, a thread to each: no thread waits for another."""


def _round_columns(
    x: tl.tensor,
    weight: tl.tensor,
    feed: tl.tensor,
    scales: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    columns: tl.tensor,
    outputs: tl.tensor,
    grid_stride: tl.tensor,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    n = tl.program_id(0) * tile + tl.arange(0, tile)
    k = tl.arange(0, width)
    inside = n < outputs
    held = tl.load(x + k[:, None] * outputs + n[None, :], mask=(k[:, None] < columns) & inside[None, :], other=0.0)
    for j in range(columns):
        here = j * outputs + n
        grid = j * grid_stride + n
        scale = tl.load(scales + grid, mask=inside, other=1.0)
        least = tl.load(low + grid, mask=inside, other=0.0)
        most = tl.load(high + grid, mask=inside, other=0.0)
        column = tl.sum(tl.where(k[:, None] == j, held, 0.0), axis=0)
        # The bounds are whole numbers, so that rounding may follow them; adding 1.5 * 2^23 rounds half to even.
        column = tl.minimum(tl.maximum(tl.div_rn(column, scale), least), most)
        column = (column + 12582912.0) - 12582912.0
        error = tl.load(weight + here, mask=inside, other=0.0) - column * scale
        tl.store(x + here, column, mask=inside)
        tl.store(weight + here, error, mask=inside)
        onward = tl.load(feed + j * columns + k, mask=(k > j) & (k < columns), other=0.0)
        held += onward[:, None] * error[None, :]


_kernel = triton.jit(_round_columns)
_launching = threading.Lock()
"""The first launch on a device compiles, which the threads of several devices do one after the other."""


def round_columns(x: Tensor, weight: Tensor, feed: Tensor, scales: Tensor, low: Tensor, high: Tensor) -> None:
    """As ``gptq_solver.round_columns``, for at most ``COLUMNS`` columns. The sums of errors are taken in another order."""
    columns, outputs = x.shape
    assert columns <= COLUMNS and x.is_contiguous() and weight.is_contiguous(), x.shape
    assert scales.stride() == low.stride() == high.stride() and scales.stride(1) == 1, scales.stride()
    if outputs:
        programs = (triton.cdiv(outputs, TILE),)
        width = max(16, triton.next_power_of_2(columns))
        across = feed.mT.contiguous()
        stride = scales.stride(0)
        with _launching:
            _kernel[programs](x, weight, across, scales, low, high, columns, outputs, stride, width=width, tile=TILE, num_warps=1)
