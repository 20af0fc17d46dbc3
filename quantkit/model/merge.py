"""Linears that read the same input as one product: q, k, v, and gate, up. For serving on a GPU, where each launch costs time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit.layouts.base import LinearOp
from quantkit.layouts.plain import DenseLinear
from quantkit.model.decoder import Block
from quantkit.ops.cuda_tiles import TiledLinear
from quantkit.ops.tiles import concatenate
from quantkit.plan import COLUMN

TOGETHER = (("q", "k", "v"), ("gate", "up"))


def merge_linears(block: Block) -> None:
    """Merge what of ``block`` can be: linears of one kind whose outputs this rank has a part of. Their old memory is free then."""
    for roles in TOGETHER:
        linears = [block.linears[role] for role in roles if role in block.linears]
        if len(linears) < len(roles) or any(linear.mode != COLUMN for linear in linears):
            continue
        ops = [linear.op for linear in linears]
        merged = _merged(ops)
        if merged is not None:
            block.merge(roles, merged, [op.tiles.n if isinstance(op, TiledLinear) else op.weight().shape[0] for op in ops])


def _merged(ops: Sequence[LinearOp]) -> LinearOp | None:
    """One linear with the outputs of ``ops`` one behind the other; None when they are stored in ways that differ."""
    biases = [op.bias for op in ops if op.bias is not None]
    if len(biases) not in (0, len(ops)):
        return None
    bias = torch.cat(biases) if biases else None
    dense = [op for op in ops if isinstance(op, DenseLinear)]
    tiled = [op for op in ops if isinstance(op, TiledLinear)]
    if len(dense) == len(ops):
        return DenseLinear(torch.cat([op.weight() for op in dense]), bias)
    tiles = concatenate([op.tiles for op in tiled]) if len(tiled) == len(ops) else None
    return None if tiles is None else TiledLinear(tiles, tiled[0].dtype, bias)
