"""Small tensors to a device and back without waiting for it: a GPU goes on with what it has been given while the next is prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values``, numbers nested as torch.tensor takes them, on ``device``; a GPU gets them in their turn, behind what it has to do."""
    here = torch.tensor(values, dtype=dtype)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


class Download:
    """Tensors on their way to the CPU. They are copied when the device comes to that; ``wait`` returns them then."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors: tuple[Tensor, ...] = tensors
        self._done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
            self._done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, whose memory the CPU may read. From any thread."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors
