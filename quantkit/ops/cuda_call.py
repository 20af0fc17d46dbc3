"""Calls of the functions in ``kernels/``: on the current stream of a device, at little cost on the host."""

from __future__ import annotations

from typing import Any

import torch


def call(function: Any, device: torch.device, *arguments: Any) -> int:
    """``function(*arguments, stream)`` with ``device`` current: 0, the library's UNSUPPORTED, or CUDA's error.

    A switch of device takes 2 µs and the object that ``torch.cuda.current_stream`` makes 5, so neither is done where it need not be.
    """
    index = device.index
    if index == torch._C._cuda_getDevice():
        found: int = function(*arguments, torch._C._cuda_getCurrentRawStream(index))
        return found
    with torch.cuda.device(device):
        return call(function, device, *arguments)
