"""Matrices of torch as ggml's blocks, on whichever device they are: the bytes are the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.ops.ggml.cuda import available, encode_cuda
from quantkit.ops.ggml.encode import encode


def encode_tensor(values: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """``values [N, K]`` float32 as blocks ``[N, bytes]`` uint8 on the same device; ``importance [K]`` float32.

    A GPU encodes them where its kernels are built, else the processor's threads do. Raises as ``encode``.
    """
    if values.is_cuda and available():
        return encode_cuda(values.contiguous(), kind, None if importance is None else importance.contiguous())
    weights = None if importance is None else importance.cpu().numpy()
    blocks = encode(values.contiguous().cpu().numpy(), kind, weights, threads=torch.get_num_threads())
    return torch.from_numpy(blocks).to(values.device)


def encoder_on(device: str) -> Callable[[NDArray[np.float32], str, NDArray[np.float32] | None], NDArray[np.uint8]]:
    """``encode`` by way of ``device``."""

    def encoded(values: NDArray[np.float32], kind: str, importance: NDArray[np.float32] | None) -> NDArray[np.uint8]:
        weights = None if importance is None else torch.from_numpy(importance).to(device)
        blocks: NDArray[np.uint8] = encode_tensor(torch.from_numpy(values).to(device), kind, weights).cpu().numpy()
        return blocks

    return encoded
