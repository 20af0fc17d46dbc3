"""Mixture of experts: each token goes through the few experts that its router weighs highest. Source: Shazeer et al. 2017.

Knows roles and tensors; knows no file, no layout and no rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from quantkit.arch.spec import Moe

Steps = Generator[tuple[str, Tensor], Tensor, Tensor]
"""A computation that asks for linears: it yields a role and an input ``[T, K]``, and is sent ``[T, N]``."""


def route(logits: Tensor, moe: Moe) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights: two ``[T, top_k]``, the weights in the dtype of ``logits [T, E]``.

    Probabilities are float32 whatever the compute dtype, as in transformers, and made to sum to 1 over the chosen ones where the
    model says so.
    """
    weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(moe.top_k, -1)
    if moe.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights.to(logits.dtype)


def mix(h: Tensor, moe: Moe, activate: Callable[[Tensor], Tensor]) -> Steps:
    """``h [T, hidden]`` through the experts -> ``[T, hidden]``.

    Experts are summed in their order, and one without tokens is not run. Every rank asks for the same experts in the same order:
    the router is whole on each, and its input is the same bits.
    """

    def mlp(x: Tensor, prefix: str) -> Steps:
        gate = yield f"{prefix}.gate", x
        up = yield f"{prefix}.up", x
        return (yield f"{prefix}.down", activate(gate) * up)

    chosen, weights = route((yield "router", h), moe)
    out = torch.zeros_like(h)
    for expert in torch.unique(chosen).tolist():
        tokens, place = torch.where(chosen == expert)
        y = yield from mlp(h[tokens], f"experts.{expert}")
        out.index_add_(0, tokens, y * weights[tokens, place].unsqueeze(-1))
    if moe.shared:
        gate = torch.sigmoid((yield "shared_gate", h))
        y = yield from mlp(h, "shared")
        out = out + gate * y
    return out
