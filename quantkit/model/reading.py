"""The tensors of a checkpoint in the order in which a model takes them, read ahead by several threads into the memory where they stay.

On a CPU that is the tensor's own. For a GPU each thread fills a page-locked buffer, again and again, which is copied on a stream beside
the one on which the model makes of the tensors before what its kernels take. Knows names, slices and bytes; no model.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.checkpoint.reader import NUMPY_DTYPES, Checkpoint
from quantkit.ops.dtypes import TORCH_DTYPES, as_tensor
from quantkit.progress import Progress, silent

READERS = 8
"""Reads in flight."""
CHUNK_BYTES = 8 << 20
"""The most that is read at once, of one tensor or of several small ones. To lock as much memory for each reader takes 0.6 ms per MiB."""
AHEAD_BYTES = 256 << 20
"""Of tensors that are being read, or have been, before they are taken."""
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor as the checkpoint must hold it, and the part of it that is read, then ``pad_rows`` rows of zeros.

    ``shape`` None: its length depends on its content, and it is read whole. ``view`` is the shape that ``index`` is of, where the
    tensor lies flattened.
    """

    name: str
    shape: tuple[int, ...] | None
    dtypes: frozenset[str]
    index: tuple[slice, ...]
    pad_rows: int = 0
    view: tuple[int, ...] | None = None

    def part(self, checkpoint: Checkpoint) -> tuple[slice, ...]:
        """What is read of it."""
        return self.index if self.shape is not None else tuple(slice(0, size) for size in checkpoint.tensors[self.name].shape)

    def nbytes(self, checkpoint: Checkpoint) -> int:
        """Of what is read of it."""
        return int(math.prod(s.stop - s.start for s in self.part(checkpoint))) * NUMPY_DTYPES[checkpoint.dtype(self.name)].itemsize


def pieces(index: tuple[slice, ...], item: int, limit: int) -> Iterator[tuple[tuple[slice, ...], int, int]]:
    """``index`` of a tensor whose values are ``item`` bytes long, in pieces of at most ``limit`` bytes that lie one after the other in
    what is read: each its own index, where it begins, and its bytes."""
    shape = [s.stop - s.start for s in index]
    total = math.prod(shape) * item
    if total <= limit or not index:
        if total:
            yield index, 0, total
        return
    row = total // shape[0]
    step = max(1, limit // row)
    for start in range(0, shape[0], step):
        rows = slice(index[0].start + start, index[0].start + min(start + step, shape[0]))
        if row > limit and len(index) > 1:
            yield from (((rows, *inner), start * row + begin, nbytes) for inner, begin, nbytes in pieces(index[1:], item, limit))
        else:
            yield (rows, *index[1:]), start * row, (rows.stop - rows.start) * row


@dataclass(slots=True)
class _Batch:
    """What one read fills: pieces of tensors, CHUNK_BYTES at most. ``ready``: when the device lets their memory be written."""

    pieces: list[tuple[_Started, tuple[slice, ...], int, int]] = field(default_factory=list)
    nbytes: int = 0
    ready: torch.cuda.Event | None = None
    future: Future[None] | None = None


@dataclass(slots=True)
class _Started:
    """A tensor on its way, and its bytes: an array on a CPU, a tensor on a GPU."""

    want: Wanted
    tensor: Tensor
    flat: Any
    kind: np.dtype[Any]
    nbytes: int
    batches: list[tuple[_Batch, int]] = field(default_factory=list)
    """Which reads bring how many bytes of it."""


class ReadAhead:
    """``wanted`` of ``checkpoint`` on ``device``, to be taken in that order, within ``with``: after it no thread reads any more.

    ``progress("weights", bytes, of all)``. At most AHEAD_BYTES and one tensor are held that were not taken; for a GPU they are there, and
    READERS * CHUNK_BYTES here.
    """

    def __init__(self, checkpoint: Checkpoint, wanted: Iterable[Wanted], device: str = "cpu", progress: Progress = silent) -> None:
        self._checkpoint, self._device, self._progress = checkpoint, torch.device(device), progress
        self._left = deque(wanted)
        self._started: deque[_Started] = deque()
        self._open = _Batch()
        self._ahead = self._done = self._told = 0
        self._total = sum(want.nbytes(checkpoint) for want in self._left)
        self._pool = ThreadPoolExecutor(READERS, "read")
        progress("weights", 0, self._total)
        self._own = threading.local()
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def take(self, want: Wanted) -> Tensor:
        """The next tensor, in its stored dtype, a scalar as ``[1]``: on a GPU, for what is asked of the current stream from now on.

        Raises InputError when the file has become shorter since it was opened, and whatever else reading raises.
        """
        self._go_on()
        found = self._started.popleft()
        assert found.want == want, (found.want.name, want.name)
        self._ahead -= found.nbytes
        self._go_on()
        for batch, nbytes in found.batches:
            assert batch.future is not None
            batch.future.result()
            self._done += nbytes
            if self._done - self._told >= CHUNK_BYTES or self._done == self._total:
                self._told = self._done
                self._progress("weights", self._done, self._total)
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        return found.tensor

    def _go_on(self) -> None:
        """Start what may be read by now; many at once, so that small ones share a read."""
        if self._started and self._ahead > AHEAD_BYTES // 2:
            return
        while self._left and (not self._started or self._ahead < AHEAD_BYTES):
            self._start(self._left.popleft())
        self._submit()

    def _start(self, want: Wanted) -> None:
        index, dtype = want.part(self._checkpoint), self._checkpoint.dtype(want.name)
        shape = [s.stop - s.start for s in index] or [1]
        kind, padded = NUMPY_DTYPES[dtype], [shape[0] + want.pad_rows, *shape[1:]]
        nbytes = math.prod(shape) * kind.itemsize
        if self._side is None:
            array = np.empty(padded, kind)
            found = _Started(want, as_tensor(array, dtype), array.reshape(-1).view(np.uint8), kind, nbytes)
        else:
            tensor = torch.empty(padded, dtype=TORCH_DTYPES[dtype], device=self._device)
            found = _Started(want, tensor, tensor.reshape(-1).view(torch.uint8), kind, nbytes)
        if want.pad_rows:
            found.flat[nbytes:] = 0
        for piece in pieces(index, kind.itemsize, CHUNK_BYTES):
            if self._open.nbytes + piece[2] > CHUNK_BYTES:
                self._submit()
            self._open.pieces.append((found, *piece))
            self._open.nbytes += -(-piece[2] // ALIGNMENT) * ALIGNMENT
            found.batches.append((self._open, piece[2]))
        self._started.append(found)
        self._ahead += nbytes

    def _submit(self) -> None:
        batch, self._open = self._open, _Batch()
        if not batch.pieces:
            return
        if self._side is None:
            batch.future = self._pool.submit(self._read, batch)
            return
        batch.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        batch.ready.record(torch.cuda.current_stream(self._device))
        batch.future = self._pool.submit(self._send, batch)

    def _read(self, batch: _Batch) -> None:
        """Fill the pieces where they are."""
        for found, index, begin, nbytes in batch.pieces:
            self._fill(found, index, found.flat[begin : begin + nbytes])

    def _fill(self, found: _Started, index: tuple[slice, ...], out: NDArray[np.uint8]) -> None:
        shaped = out.view(found.kind).reshape([s.stop - s.start for s in index])
        self._checkpoint.fill(shaped, found.want.name, index, found.want.view)

    @torch.inference_mode()
    def _send(self, batch: _Batch) -> None:
        """Fill this thread's buffer and send it to the device."""
        assert self._side is not None and batch.ready is not None
        with torch.cuda.stream(self._side):  # and its device, for this thread
            if not hasattr(self._own, "buffer"):
                self._own.buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
                self._own.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            buffer, sent, places, at = self._own.buffer, self._own.sent, [], 0
            sent.synchronize()
            host = buffer.numpy()
            for found, index, _, nbytes in batch.pieces:
                self._fill(found, index, host[at : at + nbytes])
                places.append(at)
                at += -(-nbytes // ALIGNMENT) * ALIGNMENT
            self._side.wait_event(batch.ready)
            for at, (found, _, begin, nbytes) in zip(places, batch.pieces, strict=True):
                found.flat[begin : begin + nbytes].copy_(buffer[at : at + nbytes], non_blocking=True)
            sent.record(self._side)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._side is not None:
            self._side.synchronize()
            torch._C._host_emptyCache()  # page-locked memory is the machine's, and this is no longer needed
