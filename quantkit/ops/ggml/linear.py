"""A linear on ggml's blocks on a CPU: the blocks stay as they are, a row is decoded where it is multiplied.

The reference is ``decode``: ``weight`` has its bits. Knows bytes and torch's threads; knows no file and no layout.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import MachineError
from quantkit.geometry import GGML_BLOCKS

Floats = np.ndarray[Any, np.dtype[np.float32]]
BLOCK_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What activations may be; a float64 model is dequantized in full."""
DENSE_ROWS = 16
"""From this many tokens on, decoding the weight once and a matrix product beat a dot product for each token."""
THREAD_WEIGHTS = 1 << 17
"""Weights that a thread of its own is worth."""
TILE_WEIGHTS = 1 << 20
"""Weights that are decoded to float32 at a time on their way to a narrower dtype."""


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="blocks")


def _shared(rows: int, weights: int, run: Callable[[int, int], None]) -> None:
    """``run`` over ``rows`` in ranges, on as many threads as torch may use and ``weights`` are worth; this one is one of them."""
    count = max(1, min(torch.get_num_threads(), weights // THREAD_WEIGHTS))
    edges = [rows * i // count for i in range(count + 1)]
    first, *others = pairwise(edges)
    waiting = [_pool(torch.get_num_threads()).submit(run, *part) for part in others]
    run(*first)
    for done in waiting:
        done.result()


class BlockCpuLinear:
    """``blocks [N, K / elements * bytes]`` uint8 of type ``kind``, multiplied in float32; the caller adds ``bias``.

    A few tokens are multiplied by the weights as ggml decodes them; many by the dense weight in ``dtype``, made for the call.
    Raises MachineError without numba.
    """

    def __init__(self, blocks: Tensor, kind: str, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        assert dtype in BLOCK_DTYPES and blocks.is_contiguous(), dtype
        block = GGML_BLOCKS[kind]
        self.bias, self._blocks, self._dtype = bias, blocks, dtype
        self.n, self.k = blocks.shape[0], blocks.shape[1] // block.nbytes * block.elements
        try:
            from quantkit.ops.ggml.rows import READERS
        except ImportError as error:
            raise MachineError("numba", f"cannot be imported ({error})", "what compiles readers of blocks", "pip install numba") from error
        except RuntimeError as error:
            raise MachineError("numba", f"{error}", "a writable directory for compiled code", "set NUMBA_CACHE_DIR") from error
        self._read = READERS[kind]
        self._bytes = blocks.numpy().reshape(self.n, -1, block.nbytes)
        self._none = np.empty((0, self.k // block.elements, block.elements), np.float32)
        self._read(self._bytes, self._none, self._none[:, 0], self._none, 0, 0)  # compiles it

    @property
    def nbytes(self) -> int:
        """Bytes held: the blocks and the bias."""
        return self._blocks.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def _in_blocks(self, matrix: Tensor) -> Floats:
        """``[rows, K]`` float32, contiguous -> the same memory as ``[rows, blocks, elements]``."""
        found: Floats = matrix.numpy().reshape(-1, *self._none.shape[1:])
        return found

    def weight(self) -> Tensor:
        """The dense weight ``[N, K]`` in the compute dtype: as ggml decodes it, then cast."""
        dense = torch.empty(self.n, self.k, dtype=self._dtype)
        step = max(1, TILE_WEIGHTS // max(self.k, 1))
        tile = torch.empty(min(step, self.n), self.k)
        values = self._in_blocks(tile)
        for start in range(0, self.n, step):
            blocks = self._bytes[start : start + step]
            run = partial(self._read, blocks, self._none, self._none[:, 0], values)
            _shared(len(blocks), len(blocks) * self.k, run)
            dense[start : start + step] = tile[: len(blocks)]
        return dense

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, K]`` -> ``[T, N]`` in the dtype of ``x``."""
        if x.shape[0] >= DENSE_ROWS:
            return torch.nn.functional.linear(x, self.weight())
        out = torch.empty(x.shape[0], self.n)
        tokens = self._in_blocks(x.float().contiguous())
        _shared(self.n, self.n * self.k, partial(self._read, self._bytes, tokens, out.numpy(), self._none))
        return out.to(x.dtype)
