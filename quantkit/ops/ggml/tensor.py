"""Matrices of torch as ggml's blocks, on whichever device they are: the bytes are the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.ops.ggml.cuda import available, encode_cuda
from quantkit.ops.ggml.encode import RowRefused, encode

CHUNK_WEIGHTS = 1 << 24
"""Weights that ``encode_q8_0`` widens at a time."""


def encode_tensor(values: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """``values [N, K]`` float32 as blocks ``[N, bytes]`` uint8 on the same device; ``importance [K]`` float32.

    A GPU encodes them where its kernels are built, else the processor's threads do. Raises as ``encode``.
    """
    if values.is_cuda and available():
        return encode_cuda(values.contiguous(), kind, None if importance is None else importance.contiguous())
    weights = None if importance is None else importance.cpu().numpy()
    blocks = encode(values.contiguous().cpu().numpy(), kind, weights, threads=torch.get_num_threads())
    return torch.from_numpy(blocks).to(values.device)


def encode_q8_0(values: Tensor) -> Tensor:
    """``values [N, K]`` of any float dtype, K a multiple of 32, as blocks of Q8_0 ``[N, K / 32 * 34]`` uint8 on the same device.

    A processor encodes them by ``encode``; a GPU by operations of torch, whether or not its kernels are built, to the same bytes. Raises
    RowRefused for a row that is not finite, or too large for a float16 scale.
    """
    rows, columns = values.shape
    out = torch.empty(rows, columns // 32 * 34, dtype=torch.uint8, device=values.device)
    step = max(1, CHUNK_WEIGHTS // max(columns, 1))
    for first in range(0, rows, step):
        some = values[first : first + step]
        try:
            out[first : first + step] = _q8_0(some.float()) if values.is_cuda else encode_tensor(some.float(), "Q8_0")
        except RowRefused as refused:
            finite = bool(some[refused.row].isfinite().all())
            raise RowRefused(refused.where, first + refused.row, finite=finite) from refused
    return out


def _q8_0(values: Tensor) -> Tensor:
    """``encode_q8_0`` of float32 in operations of torch: a block's scale is its greatest magnitude / 127, and halves round away from 0."""
    rows = values.shape[0]
    blocks = values.reshape(-1, 32)
    peaks = blocks.abs().amax(1, keepdim=True)
    scales = peaks / torch.full_like(peaks, 127)  # by a number, torch multiplies by its inverse on a GPU
    halves = scales.to(torch.float16)
    if not bool(halves.isfinite().all()):
        row = int((~halves.isfinite()).reshape(rows, -1).any(1).nonzero()[0])
        raise RowRefused("Q8_0 values", row, finite=bool(values[row].isfinite().all()))
    exact = blocks * torch.where(scales == 0, scales, 1 / scales)
    whole = exact.trunc()
    codes = torch.where((exact - whole).abs() >= 0.5, whole + exact.sign(), whole)
    codes = torch.where(exact.abs() < 128, codes, 0).to(torch.int8)  # infinite where the inverse of a denormal scale is
    return torch.cat([halves.view(torch.uint8), codes.view(torch.uint8)], 1).reshape(rows, -1)


def encoder_on(device: str) -> Callable[[NDArray[np.float32], str, NDArray[np.float32] | None], NDArray[np.uint8]]:
    """``encode`` by way of ``device``."""

    def encoded(values: NDArray[np.float32], kind: str, importance: NDArray[np.float32] | None) -> NDArray[np.uint8]:
        weights = None if importance is None else torch.from_numpy(importance).to(device)
        blocks: NDArray[np.uint8] = encode_tensor(torch.from_numpy(values).to(device), kind, weights).cpu().numpy()
        return blocks

    return encoded
