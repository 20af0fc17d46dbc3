"""Causal attention over flattened sequences: grouped heads, sliding windows, softcap, with and without a KV cache.

Shapes: T tokens of all sequences one after the other, H query heads and KV key heads of this rank, D head_dim, t query
tokens and S key tokens of one sequence. This module knows no weights and no ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantkit.errors import MachineError
from quantkit.ops import flashinfer_attention
from quantkit.ops.paged_attention import Pages, attend, usable

BACKENDS = ("auto", "triton", "flashinfer", "torch")
"""Whose attention over a cache: "flashinfer" takes pieces of prompts and leaves decoding to Triton's kernel, "triton" takes both; "auto" is
the best of them that works, and where none does torch's."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Which tokens a forward pass is over: all sequences one after the other, T in all.

    ``positions [T]`` int64, each token's place in its sequence; ``lengths``, query tokens per sequence (their sum is T);
    ``sequences``, the cache's ids of the sequences, or None without a cache. ``reach [T]`` int64, how long each token's sequence is taken
    for where frequencies depend on it (its prompt whole, then as far as it has come); None: up to its last position here.
    """

    positions: Tensor
    lengths: tuple[int, ...]
    sequences: tuple[int, ...] | None
    reach: Tensor | None = None


class KVCache(Protocol):
    """Keys and values of earlier tokens. Every block of every rank writes those of a pass once, then reads."""

    def write(self, layer: int, batch: Batch, k: Tensor, v: Tensor) -> None:
        """Append ``k``, ``v [T, KV, D]`` of the sequences of ``batch`` (KV of this rank, may be 0)."""

    def held(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a sequence of the pass, its own tokens included: two ``[S, KV, D]``."""


@runtime_checkable
class BlockCache(KVCache, Protocol):
    """A cache in blocks, which kernels may write and read where they lie."""

    def places(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and all values, ``[places, KV, D]``, of the dtype that is computed with or float8."""

    def slots(self, batch: Batch) -> Tensor:
        """In place of ``write``, for a kernel that writes at once: the place of each token, ``[T]`` int64."""

    def pages(self, batch: Batch, group: int) -> Pages:
        """Where everything is that a pass with ``group`` query heads a key head reads."""

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and all values, ``[blocks, tokens of a block, KV, D]``, as stored."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The facts of one layer's attention. ``kv_index`` gives each query head's key head where they are not equal groups."""

    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    kv_index: tuple[int, ...] | None = None
    backend: str = "auto"

    def require(self, dtype: torch.dtype, stored: torch.dtype, device: torch.device) -> None:
        """Have ``backend`` tried for queries of ``dtype`` over keys and values of dtype ``stored``. Raises MachineError when it was named
        and cannot be used."""
        q = torch.empty(0, 1, self.head_dim, dtype=dtype, device=device)
        reads, reason = self.reads_blocks(q, stored), None
        if self.backend in ("triton", "flashinfer") and not reads:
            reason = "Triton's kernel does not run here" if self.kv_index is None else "this rank's query heads are no equal groups"
        elif reads and self.backend in ("auto", "flashinfer"):
            reason = self._obstacle(q, stored)
        if reason is not None and self.backend != "auto":
            raise MachineError("--attention-backend", f"is {self.backend}, and {reason}", "one that works here", "auto chooses among those")

    def _obstacle(self, q: Tensor, stored: torch.dtype) -> str | None:
        """Why FlashInfer does not take pieces of prompts; None when it does."""
        windowed, capped = self.window is not None, self.softcap is not None
        return flashinfer_attention.obstacle(q.device, q.dtype, stored, q.shape[-1], windowed=windowed, capped=capped)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, cache: KVCache | None, layer: int) -> Tensor:
        """``q [T, H, D]``, ``k``, ``v [T, KV, D]`` -> ``[T, H * D]``."""
        if cache is None:
            return self._joined([self._heads(*run) for run in _runs(q, k, v, batch.lengths)], q)
        cache.write(layer, batch, k, v)
        return self.over_held(q, batch, cache, layer)

    def over_held(self, q: Tensor, batch: Batch, cache: KVCache, layer: int) -> Tensor:
        """``q [T, H, D]`` of the sequences of ``batch`` over all that ``cache`` holds of them -> ``[T, H * D]``."""
        if isinstance(cache, BlockCache) and q.shape[0] and q.shape[1]:
            keys, values = cache.blocks(layer)
            if self.reads_blocks(q, keys.dtype):
                pages = cache.pages(batch, q.shape[1] // keys.shape[2])
                least = {"auto": flashinfer_attention.LEAST_TOKENS, "flashinfer": 1}.get(self.backend)
                flash = least is not None and pages.pieces >= least and self._obstacle(q, keys.dtype) is None
                run = flashinfer_attention.attend if flash else attend
                return run(q, keys, values, pages, scale=self.scale, window=self.window, softcap=self.softcap)
        parts = [self._over(q[start : start + length], *cache.held(layer, sequence)) for start, length, sequence in spans(batch)]
        return self._joined(parts, q)

    def reads_blocks(self, q: Tensor, stored: torch.dtype) -> bool:
        """Whether keys and values for queries like ``q``, stored as ``stored``, are read where they lie."""
        return self.kv_index is None and self.backend != "torch" and usable(q, stored)

    def _joined(self, parts: list[Tensor], q: Tensor) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else q.new_empty(0, q.shape[1] * self.head_dim)

    def _over(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``q [t, H, D]``, the last t tokens of one sequence, over all of its keys and values."""
        if self.window is not None:
            seen = max(0, keys.shape[0] - q.shape[0] - self.window + 1)
            keys, values = keys[seen:], values[seen:]
        return self._heads(q.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0))

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [B, t, H, D]`` over ``k``, ``v [B, S, KV, D]``, the last S tokens of B sequences -> ``[B * t, H * D]``."""
        batch, length, heads, width = q.shape
        if not heads or not batch:
            return q.reshape(batch * length, heads * width)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.kv_index is not None:
            index = torch.tensor(self.kv_index, device=k.device)
            k, v = k[:, index], v[:, index]
        out = self._capped(q, k, v) if self.softcap is not None else self._plain(q, k, v)
        return out.transpose(1, 2).reshape(batch * length, heads * width)

    def _mask(self, length: int, keys: int, device: torch.device) -> Tensor | None:
        """Which keys each of the last ``length`` tokens sees ``[t, S]``; None when plain causality says it all."""
        if length == 1 or (length == keys and (self.window is None or keys <= self.window)):
            return None
        query = torch.arange(keys - length, keys, device=device).unsqueeze(1)
        key = torch.arange(keys, device=device)
        mask = key <= query
        return mask if self.window is None else mask & (key > query - self.window)

    def _plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, width = q.shape
        kv = k.shape[1]
        if length == 1:  # the query heads of a key head are its queries: nothing is repeated
            grouped = q.reshape(batch, kv, heads // kv, width)
            return scaled_dot_product_attention(grouped, k, v, scale=self.scale).reshape(batch, heads, 1, width)
        mask = self._mask(length, k.shape[2], q.device)
        if mask is not None and heads != kv:  # with a mask, enable_gqa leaves the fast kernels
            k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
        grouped_heads = heads != k.shape[1]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped_heads)

    def _capped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scores pass through ``c * tanh(s / c)`` before the mask (Gemma 2, section 2)."""
        assert self.softcap is not None
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)).mul_(self.scale)
        scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        length, keys = scores.shape[-2:]
        if length > 1:
            mask = self._mask(length, keys, q.device)
            seen = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril() if mask is None else mask
            scores = scores.masked_fill_(~seen, float("-inf"))
        work = torch.promote_types(scores.dtype, torch.float32)
        return torch.matmul(scores.softmax(-1, dtype=work).to(q.dtype), v)


def _runs(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Neighbouring sequences of one length as ``[B, t, heads, D]`` views: one attention call each."""
    start = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        rows = slice(start, start + count * length)
        start = rows.stop
        if length:
            first, second, third = (x[rows].view(count, length, *x.shape[1:]) for x in (q, k, v))
            yield first, second, third


def spans(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """``(first row, rows, cache id)`` of each sequence that has rows."""
    start = 0
    for length, sequence in zip(batch.lengths, batch.sequences or (), strict=True):
        if length:
            yield start, length, sequence
        start += length


def kv_index(heads: range, kv_heads: range, group: int) -> tuple[int, ...] | None:
    """Each query head's key head among ``kv_heads`` of a rank; None when they are equal groups in order."""
    if not heads:
        return None
    index = tuple(head // group - kv_heads.start for head in heads)
    each, rest = divmod(len(heads), len(kv_heads))
    return None if not rest and index == tuple(i // each for i in range(len(heads))) else index
