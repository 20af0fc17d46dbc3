"""GPTQ in ggml's blocks: scales by ggml's own search, codes that make up for each other's errors. Knows tensors only.

The search sees the importance of the columns, as with an importance matrix, and its scales stay; so the bytes are those of a type that
every reader of GGUF knows, and only the choice of the codes is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.ops.ggml.decode import decode
from quantkit.ops.ggml.encode import encode
from quantkit.ops.ggml.recode import ZEROS, grid, recode
from quantkit.quantizers.base import InputStats
from quantkit.quantizers.gptq_solver import SolverOptions, solve_on_grid

Encoder = Callable[[NDArray[np.float32], str, NDArray[np.float32] | None], NDArray[np.uint8]]
"""As ``encode``."""
SHRINK = 0.3
"""This part of what inputs have in common is left out of account. All of it is right for the calibration text alone: of another text's
loss with importance, Q3_K left 1.05 of it in a ``down``, and leaves 0.80 so (0.27 and 0.33 on the calibration text)."""
ROWS = 1 << 22
"""Weights whose loss is taken at a time."""


@dataclass(frozen=True, slots=True)
class GridFit:
    """``blocks [N, bytes]`` uint8 on the CPU, as they are stored.

    The losses are tr(D H D^T) for D = W - What and H = gram / tokens: the squared output error of a mean token, summed over the outputs;
    ``loss`` of ``blocks``, ``weighed`` of the search with importance, ``total`` tr(W H W^T). ``solved`` is the part of the rows whose
    codes are the solver's: the others lost less as the search left them.
    """

    blocks: NDArray[np.uint8]
    loss: float
    weighed: float
    total: float
    solved: float


def row_losses(weight: Tensor, blocks: NDArray[np.uint8], kind: str, gram: Tensor, tokens: int) -> Tensor:
    """Of each row of ``weight [N, K]`` what ``blocks [N, bytes]`` lose of it: float64 ``[N]``."""
    found = []
    some = max(1, ROWS // weight.shape[1])
    for first in range(0, weight.shape[0], some):
        rows = slice(first, first + some)
        error = weight[rows] - decode(torch.from_numpy(blocks[rows]).to(weight.device), kind)
        found.append(((error @ gram) * error).sum(1, dtype=torch.float64))
    return torch.cat(found).clamp_(min=0).div_(tokens)


def fit(weight: Tensor, stats: InputStats, kind: str, options: SolverOptions, where: str, encoder: Encoder = encode) -> GridFit:
    """``weight [N, K]`` float32 as blocks of ``kind``, so that little of its outputs on the inputs of ``stats`` is lost.

    Each row keeps whichever lost less: the solver's codes or the search's. With ``stats.cross`` (``solve``'s ``gram_cross``) the aim is
    another, and all are the solver's. The levels of IQ4_NL and IQ4_XS are uneven: those types are only searched. Of ``options``, ``damp``,
    ``block`` and ``sweeps`` count. Raises InputError as ``encode`` and ``solve`` do.
    """
    gram, tokens = stats.gram, stats.tokens
    importance = gram.diagonal().div(tokens)
    seen = importance.cpu().numpy() if bool(importance.any()) else None
    searched = encoder(np.ascontiguousarray(weight.cpu().numpy()), kind, seen)
    before = row_losses(weight, searched, kind, gram, tokens)
    total = float(((weight @ gram) * weight).sum(dtype=torch.float64)) / tokens
    if kind not in ZEROS:
        return GridFit(searched, float(before.sum()), float(before.sum()), total, 0.0)
    data = torch.from_numpy(searched).to(weight.device)
    believed = gram
    if stats.cross is None:  # which says how two kinds of inputs go together, and would no longer be of these
        believed = gram * (1 - SHRINK)
        believed.diagonal().copy_(gram.diagonal())
    found = solve_on_grid(weight, believed, tokens, grid(data, kind), options, where, stats.cross)
    solved = recode(data, kind, found).cpu().numpy()
    after = row_losses(weight, solved, kind, gram, tokens)
    better = torch.ones_like(after, dtype=torch.bool) if stats.cross is not None else after < before
    blocks = np.where(better.cpu().numpy()[:, None], solved, searched)
    return GridFit(blocks, float(torch.where(better, after, before).sum()), float(before.sum()), total, float(better.double().mean()))
