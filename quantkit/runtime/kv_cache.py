"""Keys and values of running sequences in blocks of one pool; a table for each sequence says which blocks are its.

Keeps the ``KVCache`` protocol of ``model.attention``. Which block is whose is decided elsewhere (``blocks.py``): this module
knows layers, heads and tokens; no requests, no ranks, no schedule. Sliding layers keep all their tokens too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.model.decoder import Decoder
from quantkit.runtime.blocks import BLOCK, blocks_for

KV_DTYPES = ("auto", "fp8")
_E4M3_MAX = 448.0

Slots = tuple[tuple[int, int], ...]
"""Runs of neighbouring places in the pool, each (first, one past the last); place ``BLOCK * b + i`` is token i of block b."""


@dataclass(slots=True)
class _Table:
    """One sequence: its blocks, the tokens that each layer holds, and, of the pass that runs, what all layers share."""

    blocks: list[int]
    held: list[int]
    span: tuple[int, int] = (0, 0)
    new: Slots = ()
    """Where the tokens of ``span`` go."""
    all: Slots = ()
    """Where the tokens up to the end of ``span`` are."""
    index: Tensor | None = None
    """The blocks of ``all`` when those are not side by side."""


def _runs(blocks: Sequence[int], start: int, stop: int) -> Slots:
    """The places of tokens ``start`` to ``stop`` of a sequence with ``blocks``."""
    runs: list[tuple[int, int]] = []
    for number in range(start // BLOCK, blocks_for(stop)):
        at = BLOCK * (blocks[number] - number)
        first, end = at + max(start, BLOCK * number), at + min(stop, BLOCK * (number + 1))
        if runs and runs[-1][1] == first:
            first = runs.pop()[0]
        runs.append((first, end))
    return tuple(runs)


class PagedCache:
    """A KV cache of ``blocks`` blocks for the KV heads of one rank. ``fp8`` stores float8 e4m3 of scale 1, else ``dtype`` is stored.

    Values beyond 448 become 448 in float8.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, blocks: int, *, fp8: bool = False
    ) -> None:
        self.blocks, self._dtype, self._layers = blocks, dtype, layers
        stored = torch.float8_e4m3fn if fp8 else dtype
        self.pool = torch.empty(layers, 2, blocks, BLOCK, kv_heads, head_dim, dtype=stored, device=device)
        self._places = [(k, v) for k, v in (layer.flatten(1, 2).unbind(0) for layer in self.pool.unbind(0))]  # [blocks * BLOCK, KV, D]
        self._tables: dict[int, _Table] = {}

    @property
    def in_place(self) -> bool:
        """Whether what is stored is what is computed with, so that a kernel can write it."""
        return self.pool.dtype == self._dtype

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that have a table here."""
        return tuple(self._tables)

    def tokens(self, sequence: int) -> int:
        """How many tokens of ``sequence`` every layer holds."""
        return min(self._tables[sequence].held)

    def extend(self, sequence: int, blocks: Sequence[int], held: int) -> None:
        """Give ``sequence`` more blocks; a new one begins with ``held`` tokens, whose keys and values its first blocks hold already."""
        table = self._tables.get(sequence)
        if table is None:
            self._tables[sequence] = _Table(list(blocks), [held] * self._layers)
        else:
            table.blocks += blocks

    def free(self, sequence: int) -> None:
        """Forget the table of ``sequence``, if it has one."""
        self._tables.pop(sequence, None)

    def update(self, layer: int, sequence: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``k``, ``v [t, KV, D]``; return all of the sequence so far: two ``[S, KV, D]``, views of the pool where that can be."""
        if not self.in_place:
            k, v = (x.clamp(-_E4M3_MAX, _E4M3_MAX) for x in (k, v))  # the cast alone makes NaN of what is larger
        start = 0
        for keys, values in self.reserve(layer, sequence, k.shape[0]):
            stop = start + keys.shape[0]
            keys.copy_(k[start:stop])
            values.copy_(v[start:stop])
            start = stop
        return self.held(layer, sequence)

    def reserve(self, layer: int, sequence: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Append ``tokens`` tokens, which the caller writes at once: their places as keys and values ``[t, KV, D]`` run by run."""
        table = self._tables[sequence]
        start = table.held[layer]
        table.held[layer] = start + tokens
        if table.span != (start, start + tokens):
            self._look(table, start, start + tokens)
        keys, values = self._places[layer]
        return [(keys[first:end], values[first:end]) for first, end in table.new]

    def _look(self, table: _Table, start: int, stop: int) -> None:
        """Find the places of a pass once for all layers."""
        assert stop <= BLOCK * len(table.blocks), (stop, table.blocks)
        table.span, table.new, table.all = (start, stop), _runs(table.blocks, start, stop), _runs(table.blocks, 0, stop)
        table.index = None
        if len(table.all) > 1:
            table.index = torch.tensor(table.blocks[: blocks_for(stop)], device=self.pool.device)

    def held(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """All keys and values of ``sequence`` in ``layer``, two ``[S, KV, D]``; the pass that runs has reserved its own."""
        table = self._tables[sequence]
        if table.index is None:
            ((first, end),) = table.all
            keys, values = (x[first:end] for x in self._places[layer])
        else:
            keys, values = (self._gather(half, table.index)[: table.span[1]] for half in self.pool[layer])
        return (keys, values) if self.in_place else (keys.to(self._dtype), values.to(self._dtype))

    def _gather(self, half: Tensor, index: Tensor) -> Tensor:
        """``half [blocks, BLOCK, KV, D]`` at ``index`` -> ``[S, KV, D]``; float8 is moved as bytes."""
        if self.in_place:
            return half.index_select(0, index).flatten(0, 1)
        return half.view(torch.uint8).index_select(0, index).view(half.dtype).flatten(0, 1)


def kv_block_bytes(decoder: Decoder, fp8: bool) -> int:
    """Bytes of one block over all layers, for the KV heads that ``decoder`` holds."""
    return 2 * decoder.spec.layers * BLOCK * decoder.kv_heads * decoder.spec.head_dim * (1 if fp8 else decoder.dtype.itemsize)


def cache_for(decoder: Decoder, blocks: int, *, fp8: bool = False) -> PagedCache:
    """An empty cache for the layers and KV heads that ``decoder`` holds, in its dtype and on its device."""
    return PagedCache(decoder.spec.layers, decoder.kv_heads, decoder.spec.head_dim, decoder.dtype, decoder.device, blocks, fp8=fp8)


def whole_cache(decoder: Decoder, tokens: int, sequences: int = 1) -> PagedCache:
    """A cache for ``decoder`` with blocks side by side for ``tokens`` of each of the sequences 0, 1, ..."""
    each = blocks_for(tokens)
    cache = cache_for(decoder, each * sequences)
    for sequence in range(sequences):
        cache.extend(sequence, range(each * sequence, each * (sequence + 1)), 0)
    return cache
