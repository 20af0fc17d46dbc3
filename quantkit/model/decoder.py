"""The one decoder: a stack of blocks built from ModelSpec rows, for calibration, evaluation and serving alike.

Tokens are flattened: ``[T]`` of all sequences one after the other. With a plan each rank holds its slices and every rank
gets the same result. This module knows no file, no layout and no architecture by name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.arch.spec import ModelSpec, Moe
from quantkit.comm import Comm
from quantkit.layouts.base import LinearOp
from quantkit.layouts.table import PackedTable
from quantkit.model.attention import Attention, Batch, BlockCache, KVCache
from quantkit.model.moe import Steps, mix
from quantkit.model.rope import Rotary
from quantkit.ops import fused
from quantkit.plan import COLUMN, COPY, GATHER, ROW

__all__ = ["Batch", "Block", "Decoder", "Embedding", "Head", "KVCache", "LayerNorm", "Norm", "ParallelLinear", "RmsNorm", "Tap"]

Tap = Callable[[str, Tensor], None]
"""Called with a linear's role and its input ``x [T, K]`` just before each linear of a block. Of an expert T are the tokens that
reach it, and it is not called when there are none."""
Angles = tuple[Tensor, Tensor]
_BlockSteps = Generator[tuple[str, Tensor], Tensor, tuple[Tensor, Tensor]]

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
        return fused.rms_norm_reference(x, self.weight, self.eps, self.offset)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """``(x - mean) / deviation * weight + bias``. Source: Ba et al. 2016."""

    weight: Tensor
    bias: Tensor
    eps: float

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


Norm = RmsNorm | LayerNorm


@dataclass(frozen=True, slots=True)
class ParallelLinear:
    """A rank's part of one linear, and what its cut asks of the group.

    "copy": all of it. "column": this rank's outputs. "row": the outputs summed over the ranks, then the bias. "gather": the input
    gathered by ``in_sizes``, this rank's outputs, those gathered by ``out_sizes``.
    """

    op: LinearOp
    mode: str
    comm: Comm
    in_sizes: tuple[int, ...] = ()
    out_sizes: tuple[int, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, K of this rank]`` -> ``[T, N of this rank]``, or ``[T, N]`` for "row" and "gather"."""
        assert self.mode in (COLUMN, ROW, GATHER, COPY)
        if self.mode == GATHER:
            x = self.comm.all_gather(x, self.in_sizes)
        y = self.op(x)
        if self.mode == ROW:
            y = self.comm.all_reduce(y)
        if self.op.bias is not None:
            y = y + self.op.bias
        return self.comm.all_gather(y, self.out_sizes) if self.mode == GATHER else y


class Block:
    """One decoder block: attention, then an MLP or experts, each between its norms and added to the stream.

    Its computation is a generator that asks for its linears one after the other, so that a pass can look at each input, or stop.
    """

    def __init__(
        self,
        layer: int,
        linears: Mapping[str, ParallelLinear],
        norms: Mapping[str, Norm],
        attention: Attention,
        rotary: Rotary | None,
        activation: str,
        moe: Moe | None = None,
    ) -> None:
        self.layer, self.linears, self.norms, self.moe = layer, dict(linears), norms, moe
        self.attention, self.rotary = attention, rotary
        self._activate = ACTIVATE[activation]
        self._merged: dict[str, tuple[int, ...]] = {}

    @property
    def nbytes(self) -> int:
        return sum(linear.op.nbytes for linear in self.linears.values()) + sum(norm.nbytes for norm in self.norms.values())

    def replace(self, role: str, op: LinearOp) -> None:
        """Put another linear in the place of ``role``."""
        self.linears[role] = replace(self.linears[role], op=op)

    def merge(self, roles: Sequence[str], op: LinearOp, sizes: Sequence[int]) -> None:
        """Put ``op``, whose outputs are those of ``roles`` one behind the other, ``sizes`` of each, in their place: one product for all."""
        linears = [self.linears.pop(role) for role in roles]
        assert all(linear.mode == COLUMN for linear in linears)
        name = "_".join(roles)
        self.linears[name], self._merged[name] = replace(linears[0], op=op), tuple(sizes)

    def forward(self, x: Tensor, batch: Batch, cache: KVCache | None = None, tap: Tap | None = None) -> Tensor:
        """``x [T, hidden]`` -> ``[T, hidden]``."""
        x, more = self.run(x, None, batch, self.angles(batch), cache, tap)
        return x + more

    def observe(self, x: Tensor, batch: Batch, tap: Tap, until: frozenset[str]) -> None:
        """Run only as far as every linear of ``until`` has had its input tapped; to the end when one is an expert without tokens."""
        self._drive(self._steps(x, None, batch, self.angles(batch), None), tap, set(until))

    def angles(self, batch: Batch) -> Angles | None:
        """The rotary angles of ``batch``; None with learned positions."""
        return None if self.rotary is None else self.rotary.angles(batch.positions, batch.lengths, batch.reach)

    def _heads(self, x: Tensor) -> Tensor:
        width = self.attention.head_dim
        return x.reshape(x.shape[0], x.shape[1] // width, width)

    def run(
        self, x: Tensor, more: Tensor | None, batch: Batch, angles: Angles | None, cache: KVCache | None, tap: Tap | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x + more [T, hidden]`` -> two of that shape, whose sum it is: the norm that comes next adds them.

        ``angles`` are those of ``batch``, so that blocks of one rotary share them.
        """
        out = self._drive(self._steps(x, more, batch, angles, cache), tap, None)
        assert out is not None
        return out

    def _drive(self, steps: _BlockSteps, tap: Tap | None, missing: set[str] | None) -> tuple[Tensor, Tensor] | None:
        """What ``steps`` returns; None as soon as every role in ``missing`` has been tapped, whose linear is not run any more."""
        try:
            role, value = next(steps)
            while True:
                if tap is not None:
                    tap(role, value)
                if missing is not None:
                    missing.discard(role)
                    if not missing:
                        return None
                role, value = steps.send(self.linears[role](value))
        except StopIteration as done:
            out: tuple[Tensor, Tensor] = done.value
            return out

    def _steps(self, x: Tensor, more: Tensor | None, batch: Batch, angles: Angles | None, cache: KVCache | None) -> _BlockSteps:
        """Yields each linear's role and input, is sent its output, and returns the block's."""
        fuse = _fused(x, cache)
        x, h = _added(x, more, self.norms.get("pre_attention"), fuse)
        q, k, v = map(self._heads, (yield from self._outputs(("q", "k", "v"), h)))  # [T, heads, D]
        q, k = self._norm("q_norm", q, fuse), self._norm("k_norm", k, fuse)
        if fuse and angles is not None and isinstance(cache, BlockCache):  # one kernel rotates and writes the cache
            q = fused.rotary_write(q, k, v, *angles, cache.slots(batch), *cache.places(self.layer))
            h = self.attention.over_held(q, batch, cache, self.layer)
        else:
            if angles is not None:
                q, k = fused.rotate(q, *angles), fused.rotate(k, *angles)
            h = self.attention(q, k, v, batch, cache, self.layer)
        h = yield "o", h
        x, h = _added(x, self._norm("post_attention", h, fuse), self.norms.get("pre_ffn"), fuse)
        h = yield from self._mlp(h, fuse)
        return x, self._norm("post_ffn", h, fuse)

    def _outputs(self, roles: tuple[str, ...], h: Tensor) -> Generator[tuple[str, Tensor], Tensor, Sequence[Tensor]]:
        """What the linears ``roles`` make of ``h``, by one product where they are merged."""
        name = "_".join(roles)
        if name in self._merged:
            return torch.split((yield name, h), list(self._merged[name]), -1)
        found = []
        for role in roles:
            found.append((yield role, h))  # noqa: PERF401  a comprehension cannot yield
        return found

    def _norm(self, role: str, x: Tensor, fuse: bool) -> Tensor:
        return _normed(self.norms[role], x, fuse) if role in self.norms else x

    def _mlp(self, h: Tensor, fuse: bool) -> Steps:
        """``h [T, hidden]`` -> ``[T, hidden]``: experts, a gated MLP or a plain one."""
        if self.moe is not None:
            return (yield from mix(h, self.moe, self._activate))
        if "gate" in self.linears or "gate_up" in self._merged:
            gate, up = yield from self._outputs(("gate", "up"), h)
            silu = fuse and self._activate is functional.silu
            return (yield "down", fused.silu_mul(gate, up) if silu else self._activate(gate) * up)
        up = yield "up", h
        return (yield "down", self._activate(up))


def _fused(x: Tensor, cache: KVCache | None) -> bool:
    """Whether a pass takes the fused kernels: where it serves. Calibration has no cache, and its bytes depend on no library of ours."""
    return cache is not None and fused.usable(x)


def _added(x: Tensor, more: Tensor | None, norm: Norm | None, fuse: bool) -> tuple[Tensor, Tensor]:
    """``x + more``, and its norm."""
    if more is not None and fuse and isinstance(norm, RmsNorm):
        total, normed = fused.add_rms_norm(x, more, norm.weight, norm.eps, norm.offset)
        return total, normed
    x = x if more is None else x + more
    return x, x if norm is None else _normed(norm, x, fuse)


def _normed(norm: Norm, x: Tensor, fuse: bool) -> Tensor:
    if fuse and isinstance(norm, RmsNorm):
        found: Tensor = fused.rms_norm(x, norm.weight, norm.eps, norm.offset)
        return found
    return norm(x)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows ``first`` to ``first + rows`` of the vocabulary ``weight [rows, hidden]``, and the factor on what is looked up.

    A quantized ``weight`` stays packed: what is looked up is dequantized. ``table [max_positions, hidden]`` are learned positions,
    which are added.
    """

    weight: Tensor | PackedTable
    first: int
    scale: float | None
    comm: Comm
    table: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.table is None else self.table.nbytes)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """``tokens``, ``positions [T]`` int64 on any device, each below the vocabulary's and the table's size -> ``[T, hidden]``."""
        found = self._rows(tokens.to(self.weight.device))
        return found if self.table is None else found + functional.embedding(positions.to(self.table.device), self.table)

    def _rows(self, tokens: Tensor) -> Tensor:
        if self.comm.size == 1:
            found = self._look_up(tokens)
        else:
            rows = self.weight.shape[0]
            local = tokens - self.first
            inside = (local >= 0) & (local < rows)
            found = torch.zeros(tokens.shape[0], self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
            if rows:
                found = self._look_up(local.clamp(0, rows - 1)).masked_fill_(~inside.unsqueeze(-1), 0)
            found = self.comm.all_reduce(found)
        if self.scale is None:
            return found
        # transformers holds the factor in float32 and rounds it to the embedding's dtype.
        return found * torch.tensor(self.scale, dtype=torch.float32).to(found.dtype)

    def _look_up(self, rows: Tensor) -> Tensor:
        return self.weight(rows) if isinstance(self.weight, PackedTable) else functional.embedding(rows, self.weight)


@dataclass(frozen=True, slots=True)
class Head:
    """A rank's vocabulary rows of the head; ``sizes`` per rank, pad rows included; ``vocab`` is the true size.

    ``own``: its weight is memory of its own, not the embedding's.
    """

    op: LinearOp
    vocab: int
    sizes: tuple[int, ...]
    softcap: float | None
    comm: Comm
    own: bool = True

    def __call__(self, hidden: Tensor) -> Tensor:
        """``hidden [T', hidden]`` after the final norm -> logits ``[T', vocab]``, float32 (float64 in a float64 model)."""
        logits = self.op(hidden)
        if self.comm.size > 1:
            logits = self.comm.all_gather(logits, self.sizes)
        return self._finished(logits[:, : self.vocab])

    @property
    def columns(self) -> range:
        """The tokens whose logits this rank makes; pad rows are none."""
        first = sum(self.sizes[: self.comm.rank])
        return range(min(first, self.vocab), min(first + self.sizes[self.comm.rank], self.vocab))

    def local(self, hidden: Tensor) -> Tensor:
        """This rank's ``columns`` of the logits of ``hidden [T', hidden]``; one of minus infinity where it has none. Exchanges nothing."""
        width = len(self.columns)
        if not width:
            return torch.full((hidden.shape[0], 1), -torch.inf, dtype=torch.float32, device=hidden.device)
        return self._finished(self.op(hidden)[:, :width])

    def _finished(self, logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class Decoder:
    """A whole model, or one rank's slices of it. Made by ``model.load``."""

    def __init__(
        self, spec: ModelSpec, embedding: Embedding, blocks: Sequence[Block], norm: Norm, head: Head, comm: Comm, kv_heads: int
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
        head = self.head.op.nbytes if self.head.own else 0
        return self.embedding.nbytes + sum(block.nbytes for block in self.blocks) + self.norm.nbytes + head

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """``tokens``, ``positions [T]`` -> ``[T, hidden]``."""
        return self.embedding(tokens, positions)

    def forward(self, tokens: Tensor, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """``tokens [T]`` int64 -> hidden states ``[T, hidden]`` after the final norm; ``cache`` gets this pass's keys and values.

        Tokens and positions may be on any device; the result is on the decoder's.
        """
        assert tokens.shape == batch.positions.shape and sum(batch.lengths) == tokens.shape[0]
        x, more = self.embed(tokens, batch.positions), None
        angles: dict[int, Angles | None] = {}
        for block in self.blocks:
            key = id(block.rotary)
            if key not in angles:
                angles[key] = block.angles(batch)
            x, more = block.run(x, more, batch, angles[key], cache)
        return _added(x, more, self.norm, _fused(x, cache))[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [T', hidden]`` of ``forward`` -> logits ``[T', vocab]`` over the whole vocabulary, on every rank."""
        return self.head(hidden)
