"""Keys and values of running sequences in blocks of one pool; a table for each sequence says which blocks are its.

Keeps the ``KVCache`` protocol of ``model.attention``. Which block is whose is decided elsewhere (``blocks.py``): this module
knows layers, heads and tokens; no requests, no ranks, no schedule. Sliding layers keep all their tokens too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.model.attention import Batch, spans
from quantkit.model.decoder import Decoder
from quantkit.ops.paged_attention import Pages, decode_pages, make_pages
from quantkit.ops.transfer import upload
from quantkit.runtime.blocks import BLOCK, blocks_for

_E4M3_MAX = 448.0

Slots = tuple[tuple[int, int], ...]
"""Runs of neighbouring places in the pool, each (first, one past the last); place ``BLOCK * b + i`` is token i of block b."""


@dataclass(slots=True)
class _Table:
    """One sequence: its row in the table on the device, its blocks, the tokens that it had before the pass that runs and has with it, and
    where they are."""

    row: int
    blocks: list[int]
    start: int
    stop: int
    shown: int = 0
    """Blocks that the table on the device has."""
    all: Slots = ()
    """Where all of its tokens are, once that was needed."""
    index: Tensor | None = None
    """The blocks when those are not side by side, once they were needed."""


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


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float8 e4m3 as ``dtype``, exactly; on a CPU from its bits, in a quarter of the time of torch's cast (which alone keeps NaN)."""
    if x.device.type != "cpu":
        return x.to(dtype)
    bits = (x.view(torch.int8).to(torch.int16) << 4) & -0x7810  # where bfloat16 has sign, exponent and mantissa, but for the bias
    return (bits.view(torch.bfloat16) * 2.0**120).to(dtype)


class PagedCache:
    """A KV cache of ``blocks`` blocks for the KV heads of one rank. ``fp8`` stores float8 e4m3 of scale 1, else ``dtype`` is stored.

    Values beyond 448 become 448 in float8. ``table`` int32 ``[rows, blocks of a text]`` is what kernels read. Its row 0 and the pool's last
    block are nobody's: what a graph does for sequences that are not there goes there.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        blocks: int,
        *,
        fp8: bool = False,
        sequences: int = 1,
        longest: int | None = None,
    ) -> None:
        self._dtype = dtype
        stored = torch.float8_e4m3fn if fp8 else dtype
        self.pool = torch.empty(layers, 2, blocks + 1, BLOCK, kv_heads, head_dim, dtype=stored, device=device)
        self._places = [(k, v) for k, v in (layer.flatten(1, 2).unbind(0) for layer in self.pool.unbind(0))]  # [places, KV, D]
        self.nowhere = BLOCK * blocks
        self.table = torch.zeros(
            sequences + 1, max(1, min(blocks, blocks_for(longest or BLOCK * blocks))), dtype=torch.int32, device=device
        )
        self._rows = list(range(sequences, 0, -1))
        self._tables: dict[int, _Table] = {}
        self._batch: Batch | None = None
        self._new: Slots = ()  # where the tokens of the batch go, one sequence after the other
        self._slots: Tensor | None = None  # the same, once it was needed
        self._pages: Pages | None = None
        self._staged: tuple[Tensor, Tensor] | None = None

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
        """How many tokens of ``sequence`` are held."""
        return self._tables[sequence].stop

    def extend(self, sequence: int, blocks: Sequence[int], held: int) -> None:
        """Give ``sequence`` more blocks; a new one begins with ``held`` tokens, whose keys and values its first blocks hold already."""
        table = self._tables.get(sequence)
        if table is None:
            self._tables[sequence] = _Table(self._row(), list(blocks), held, held)
        else:
            table.blocks += blocks

    def _row(self) -> int:
        """A row of the table that no sequence has; there are more when there is none."""
        if not self._rows:
            rows = self.table.shape[0]
            self.table = torch.cat([self.table, torch.zeros_like(self.table)])
            self._rows = list(range(2 * rows - 1, rows - 1, -1))
        return self._rows.pop()

    def free(self, sequence: int) -> None:
        """Forget the table of ``sequence``, if it has one."""
        table = self._tables.pop(sequence, None)
        if table is not None:
            self._rows.append(table.row)

    def row(self, sequence: int) -> int:
        """The row of ``sequence``, which no other that is here has; from 1 on."""
        return self._tables[sequence].row

    def decode(self, sequences: Sequence[int]) -> list[tuple[int, int, int, int, int, int]] | None:
        """One more token of each of ``sequences``: its position and place, the keys there are with it, the row, and a block that the table
        lacks, behind its place in the flat table (0 and 0 when it lacks none). None, and nothing has changed, where one lacks several.
        """
        tables = [self._tables[sequence] for sequence in sequences]
        if any(len(table.blocks) > table.shown + 1 for table in tables):
            return None
        found = []
        for table in tables:
            table.start, table.stop, table.all, table.index = table.stop, table.stop + 1, (), None
            place = BLOCK * table.blocks[table.start // BLOCK] + table.start % BLOCK
            new = (table.row * self.table.shape[1] + table.shown, table.blocks[-1]) if len(table.blocks) > table.shown else (0, 0)
            table.shown = len(table.blocks)
            found.append((table.start, place, table.stop, table.row, *new))
        return found

    def stage(self, batch: Batch, slots: Tensor, rows: Tensor, lengths: Tensor) -> None:
        """Have the pass of ``batch``, a token of each sequence, write to ``slots [T]`` int64 and read ``lengths [T]`` keys that ``rows
        [T]`` of the table say, both int32, whatever they are when it runs: for a graph.
        """
        self._batch, self._slots, self._pages, self._staged = batch, slots, None, (rows, lengths)

    def _begin(self, batch: Batch) -> None:
        """Find the places of a pass, once for all layers."""
        if batch is self._batch:
            return
        new: list[tuple[int, int]] = []
        for _, length, sequence in spans(batch):
            table = self._tables[sequence]
            table.start, table.stop, table.all, table.index = table.stop, table.stop + length, (), None
            assert table.stop <= BLOCK * len(table.blocks), (table.stop, table.blocks)
            new += _runs(table.blocks, table.start, table.stop)
        self._batch, self._new, self._slots, self._pages, self._staged = batch, tuple(new), None, None, None

    def write(self, layer: int, batch: Batch, k: Tensor, v: Tensor) -> None:
        """Append ``k``, ``v [T, KV, D]`` of the sequences of ``batch``."""
        if not self.in_place:
            k, v = (x.clamp(-_E4M3_MAX, _E4M3_MAX).to(self.pool.dtype) for x in (k, v))  # the cast alone makes NaN of what is larger
        self._begin(batch)
        if k.device.type == "cpu":
            start = 0
            for first, end in self._new:
                stop = start + end - first
                for half, x in zip(self._places[layer], (k, v), strict=True):
                    half[first:end].copy_(x[start:stop])
                start = stop
            return
        slots = self.slots(batch)
        for half, x in zip(self._places[layer], (k, v), strict=True):
            half.view(self._moved).index_copy_(0, slots, x.contiguous().view(self._moved))

    def slots(self, batch: Batch) -> Tensor:
        """Where the tokens of ``batch`` go, for a kernel that writes them: places ``[T]`` int64 in ``places``."""
        self._begin(batch)
        if self._slots is None:
            self._slots = upload([at for first, end in self._new for at in range(first, end)], torch.int64, self.pool.device)
        return self._slots

    def places(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and all values of ``layer``, ``[places, KV, D]``, as stored."""
        return self._places[layer]

    def held(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """All keys and values of ``sequence`` in ``layer``, two ``[S, KV, D]``, views of the pool where its blocks are side by side."""
        table = self._tables[sequence]
        table.all = table.all or _runs(table.blocks, 0, table.stop)
        if len(table.all) == 1:
            ((first, end),) = table.all
            keys, values = (x[first:end] for x in self._places[layer])
        else:
            if table.index is None:
                table.index = torch.tensor(table.blocks[: blocks_for(table.stop)], device=self.pool.device)
            keys, values = (self._gather(half, table.index)[: table.stop] for half in self.pool[layer])
        return (keys, values) if self.in_place else (_widened(keys, self._dtype), _widened(values, self._dtype))

    @property
    def _moved(self) -> torch.dtype:
        """What is moved as: float8 is moved as bytes."""
        return self._dtype if self.in_place else torch.uint8

    def _gather(self, half: Tensor, index: Tensor) -> Tensor:
        """``half [blocks, BLOCK, KV, D]`` at ``index`` -> ``[S, KV, D]``."""
        return half.view(self._moved).index_select(0, index).view(half.dtype).flatten(0, 1)

    def pages(self, batch: Batch, group: int) -> Pages:
        """Where everything is that a pass with ``group`` query heads a key head reads."""
        self._begin(batch)
        if self._pages is not None and self._pages.group == group:
            return self._pages
        if self._staged is not None:
            self._pages = decode_pages(self.table, *self._staged, group, BLOCK * self.table.shape[1])
        else:
            tables = [self._tables[sequence] for _, _, sequence in spans(batch)]
            self._show(tables)
            self._pages = make_pages(self.table, [table.row for table in tables], [(table.start, table.stop) for table in tables], group)
        return self._pages

    def _show(self, tables: Sequence[_Table]) -> None:
        """Bring the table on the device up to date."""
        new: list[tuple[int, int]] = []
        for table in tables:
            first = table.row * self.table.shape[1]
            new += [(first + number, table.blocks[number]) for number in range(table.shown, len(table.blocks))]
            table.shown = len(table.blocks)
        if new:
            where, blocks = upload(list(zip(*new, strict=True)), torch.int64, self.table.device)
            self.table.view(-1).index_copy_(0, where, blocks.int())

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and all values of ``layer``, ``[blocks, BLOCK, KV, D]``, as stored."""
        keys, values = self.pool[layer]
        return keys, values


def kv_block_bytes(decoder: Decoder, fp8: bool) -> int:
    """Bytes of one block over all layers, for the KV heads that ``decoder`` holds."""
    return 2 * decoder.spec.layers * BLOCK * decoder.kv_heads * decoder.spec.head_dim * (1 if fp8 else decoder.dtype.itemsize)


def cache_for(decoder: Decoder, blocks: int, *, fp8: bool = False, sequences: int = 1) -> PagedCache:
    """An empty cache for the layers and KV heads that ``decoder`` holds, in its dtype and on its device."""
    spec = decoder.spec
    shape = (spec.layers, decoder.kv_heads, spec.head_dim, decoder.dtype, decoder.device, blocks)
    return PagedCache(*shape, fp8=fp8, sequences=sequences, longest=None if spec.stretches else spec.max_positions)


def whole_cache(decoder: Decoder, tokens: int, sequences: int = 1) -> PagedCache:
    """A cache for ``decoder`` with blocks side by side for ``tokens`` of each of the sequences 0, 1, ..."""
    each = blocks_for(tokens)
    cache = cache_for(decoder, each * sequences, sequences=sequences)
    for sequence in range(sequences):
        cache.extend(sequence, range(each * sequence, each * (sequence + 1)), 0)
    return cache
