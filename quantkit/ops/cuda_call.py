"""Calls of the functions in ``kernels/``: on the current stream of a device, at little cost on the host."""

from __future__ import annotations

from typing import Any

import torch

from quantkit.errors import MachineError
from quantkit.ops.cuda_library import HINT


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


def checked(name: str, code: int, device: torch.device) -> None:
    """Raise MachineError for CUDA's error ``code`` of the function ``name``."""
    if code:
        raise MachineError(f"{name} on {device}", f"the kernel did not start (error {code})", "a GPU that it was built for", HINT)
