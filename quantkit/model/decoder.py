"""The one decoder: a stack of blocks built from ModelSpec rows, for calibration, evaluation and serving alike.

Tokens are flattened: ``[T]`` of all sequences one after the other. With a plan each rank holds its slices and every rank
gets the same result. This module knows no file, no layout and no architecture by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.arch.spec import ModelSpec
from quantkit.comm import Comm
from quantkit.layouts.base import LinearOp
from quantkit.model.attention import Attention, Batch, KVCache
from quantkit.model.rope import Rotary, rotate
from quantkit.plan import COLUMN, GATHER, ROW

__all__ = ["Batch", "Block", "Decoder", "Embedding", "Head", "KVCache", "ParallelLinear", "RmsNorm", "Tap"]

Tap = Callable[[str, Tensor], None]
"""Called with a linear's role and its input ``x [T, K]`` just before each linear of a block."""

ACTIVATE: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
)


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """``x / rms(x) * (offset + weight)``, the division in float32. Source: Zhang and Sennrich 2019.

    Without an offset the quotient is cast before it is multiplied, with one after (as Llama and Gemma do).
    """

    weight: Tensor
    eps: float
    offset: float

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if not self.offset:
            return self.weight * wide.to(x.dtype)
        return (wide * (self.offset + self.weight.to(torch.float32))).to(x.dtype)


@dataclass(frozen=True, slots=True)
class ParallelLinear:
    """A rank's part of one linear, and what its cut asks of the group.

    "column": this rank's outputs. "row": the outputs summed over the ranks, then the bias. "gather": the input gathered by
    ``in_sizes``, this rank's outputs, those gathered by ``out_sizes``.
    """

    op: LinearOp
    mode: str
    comm: Comm
    in_sizes: tuple[int, ...] = ()
    out_sizes: tuple[int, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, K of this rank]`` -> ``[T, N of this rank]``, or ``[T, N]`` for "row" and "gather"."""
        assert self.mode in (COLUMN, ROW, GATHER)
        if self.mode == GATHER:
            x = self.comm.all_gather(x, self.in_sizes)
        y = self.op(x)
        if self.mode == ROW:
            y = self.comm.all_reduce(y)
        if self.op.bias is not None:
            y = y + self.op.bias
        return self.comm.all_gather(y, self.out_sizes) if self.mode == GATHER else y


class Block:
    """One decoder block: attention and gated MLP, each between its norms and added to the stream."""

    def __init__(
        self,
        layer: int,
        linears: Mapping[str, ParallelLinear],
        norms: Mapping[str, RmsNorm],
        attention: Attention,
        rotary: Rotary,
        activation: str,
    ) -> None:
        self.layer, self.linears, self.norms = layer, linears, norms
        self.attention, self.rotary = attention, rotary
        self._activate = ACTIVATE[activation]

    @property
    def nbytes(self) -> int:
        return sum(linear.op.nbytes for linear in self.linears.values()) + sum(norm.nbytes for norm in self.norms.values())

    def forward(self, x: Tensor, batch: Batch, cache: KVCache | None = None, tap: Tap | None = None) -> Tensor:
        """``x [T, hidden]`` -> ``[T, hidden]``."""
        return self.run(x, batch, self.rotary.angles(batch.positions, batch.lengths), cache, tap)

    def _heads(self, x: Tensor) -> Tensor:
        width = self.attention.head_dim
        return x.reshape(x.shape[0], x.shape[1] // width, width)

    def run(self, x: Tensor, batch: Batch, angles: tuple[Tensor, Tensor], cache: KVCache | None, tap: Tap | None) -> Tensor:
        """``forward`` with the angles of ``batch`` given, so that blocks of one rotary share them."""

        def linear(role: str, value: Tensor) -> Tensor:
            if tap is not None:
                tap(role, value)
            return self.linears[role](value)

        def norm(role: str, value: Tensor) -> Tensor:
            return self.norms[role](value) if role in self.norms else value

        h = norm("pre_attention", x)
        q, k, v = (self._heads(linear(role, h)) for role in ("q", "k", "v"))  # [T, heads, D]
        q, k = rotate(norm("q_norm", q), *angles), rotate(norm("k_norm", k), *angles)
        h = linear("o", self.attention(q, k, v, batch, cache, self.layer))
        x = x + norm("post_attention", h)
        h = norm("pre_ffn", x)
        h = self._activate(linear("gate", h)) * linear("up", h)  # [T, ffn]
        return x + norm("post_ffn", linear("down", h))


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows ``first`` to ``first + len(weight)`` of the vocabulary ``weight [rows, hidden]``, and the factor on what is looked up."""

    weight: Tensor
    first: int
    scale: float | None
    comm: Comm

    def __call__(self, tokens: Tensor) -> Tensor:
        """``tokens [T]`` int64 on any device, each below the vocabulary's size -> ``[T, hidden]``."""
        tokens = tokens.to(self.weight.device)
        if self.comm.size == 1:
            found = functional.embedding(tokens, self.weight)
        else:
            rows = self.weight.shape[0]
            local = tokens - self.first
            inside = (local >= 0) & (local < rows)
            found = self.weight.new_zeros(tokens.shape[0], self.weight.shape[1])
            if rows:
                found = functional.embedding(local.clamp(0, rows - 1), self.weight).masked_fill_(~inside.unsqueeze(-1), 0)
            found = self.comm.all_reduce(found)
        if self.scale is None:
            return found
        # transformers holds the factor in float32 and rounds it to the embedding's dtype.
        return found * torch.tensor(self.scale, dtype=torch.float32).to(found.dtype)


@dataclass(frozen=True, slots=True)
class Head:
    """A rank's vocabulary rows of the head; ``sizes`` per rank, pad rows included; ``vocab`` is the true size."""

    op: LinearOp
    vocab: int
    sizes: tuple[int, ...]
    softcap: float | None
    comm: Comm

    def __call__(self, hidden: Tensor) -> Tensor:
        """``hidden [T', hidden]`` after the final norm -> logits ``[T', vocab]``, float32 (float64 in a float64 model)."""
        logits = self.op(hidden)
        if self.comm.size > 1:
            logits = self.comm.all_gather(logits, self.sizes)
        logits = logits[:, : self.vocab].to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class Decoder:
    """A whole model, or one rank's slices of it. Made by ``model.load``."""

    def __init__(
        self, spec: ModelSpec, embedding: Embedding, blocks: Sequence[Block], norm: RmsNorm, head: Head, comm: Comm, kv_heads: int
    ) -> None:
        self.spec, self.embedding, self.blocks = spec, embedding, tuple(blocks)
        self.norm, self.head, self.comm = norm, head, comm
        self.kv_heads = kv_heads
        """KV heads of this rank: what a cache holds per token and layer."""

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of weights of this rank in memory."""
        head = 0 if self.spec.tied else self.head.op.nbytes
        return self.embedding.weight.nbytes + sum(block.nbytes for block in self.blocks) + self.norm.nbytes + head

    def embed(self, tokens: Tensor) -> Tensor:
        """``tokens [T]`` -> ``[T, hidden]``."""
        return self.embedding(tokens)

    def forward(self, tokens: Tensor, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """``tokens [T]`` int64 -> hidden states ``[T, hidden]`` after the final norm; ``cache`` gets this pass's keys and values.

        Tokens and positions may be on any device; the result is on the decoder's.
        """
        assert tokens.shape == batch.positions.shape and sum(batch.lengths) == tokens.shape[0]
        x = self.embed(tokens)
        angles: dict[int, tuple[Tensor, Tensor]] = {}
        for block in self.blocks:
            key = id(block.rotary)
            if key not in angles:
                angles[key] = block.rotary.angles(batch.positions, batch.lengths)
            x = block.run(x, batch, angles[key], cache, None)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [T', hidden]`` of ``forward`` -> logits ``[T', vocab]`` over the whole vocabulary, on every rank."""
        return self.head(hidden)
