"""Decoding as CUDA graphs: one token of each of up to so many sequences, from the tokens to the likeliest next ones, in one launch.

A graph is made for a few batch sizes; a batch takes the smallest that holds it, and the rows that are left over do again what the first
does, and write where nobody looks. What changes from pass to pass is one small tensor. Knows decoders and caches; knows no requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import RuntimeDied
from quantkit.model.attention import Batch
from quantkit.model.decoder import Decoder
from quantkit.ops.transfer import upload
from quantkit.runtime.kv_cache import PagedCache, cache_for
from quantkit.runtime.sampler import Sampler
from quantkit.runtime.scheduler import Chunk

_LOG = logging.getLogger("quantkit")
_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_WARM_UP = 2


def sizes_for(sequences: int) -> tuple[int, ...]:
    """The batch sizes that graphs are made for, so that up to ``sequences`` find one (up to 512)."""
    return tuple(size for size in _SIZES if size < sequences) + ((sequences,) if sequences <= _SIZES[-1] else ())


def obstacle(decoder: Decoder, cache: PagedCache) -> str | None:
    """Why passes of ``decoder`` cannot be graphs; None when they can be."""
    if decoder.device.type != "cuda":
        return "it is not on a GPU"
    if decoder.spec.moe is not None:
        return "which experts run is known on the device alone"
    if decoder.spec.stretches:
        return "its rotary frequencies depend on each length"
    heads = torch.empty(0, 1, decoder.spec.head_dim, dtype=decoder.dtype, device=decoder.device)
    if not decoder.kv_heads or not all(block.attention.reads_blocks(heads, cache.pool.dtype) for block in decoder.blocks):
        return "its attention does not read blocks where they lie"
    return None


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are captured: one stream for all, since cuBLAS keeps a workspace for each that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


@dataclass(frozen=True, slots=True)
class _Captured:
    """``inputs`` int64 ``[7, size]``: token, position, place in the pool, keys, row, and a block of the table behind its place there."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor
    winners: Tensor


class DecodeGraphs:
    """Graphs over ``cache`` for batches of ``sizes``. ``last [rows]`` int64 holds what each row of the cache's table sampled last.

    Every rank makes and replays the same.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, sampler: Sampler, last: Tensor, sizes: Sequence[int]) -> None:
        self._decoder, self._cache, self._sampler, self._last = decoder, cache, sampler, last
        self._pool: Any = None
        self._captured = {size: self._capture(size) for size in sorted(sizes, reverse=True)}  # the smaller fit into the largest's memory
        self._sizes = sorted(sizes)

    @torch.inference_mode()
    def _capture(self, size: int) -> _Captured:
        decoder, cache, device = self._decoder, self._cache, self._decoder.device
        inputs = torch.zeros(7, size, dtype=torch.int64, device=device)
        inputs[2] = cache.nowhere
        token, position, place, keys, row, where, block = inputs.unbind()
        batch = Batch(position, (1,) * size, tuple(range(size)))

        def once() -> tuple[Tensor, Tensor]:
            cache.table.view(-1).index_copy_(0, where, block.int())
            cache.stage(batch, place, row.int(), keys.int())
            tokens = torch.where(token < 0, self._last.index_select(0, row), token)
            logits = decoder.head.local(decoder.forward(tokens, batch, cache))
            winners = self._sampler.winners(logits)
            self._last.index_copy_(0, row.masked_fill(place == cache.nowhere, 0), winners[:, 1].long())  # spare rows write nobody's
            return logits, winners

        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                once()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            logits, winners = once()
        self._pool = graph.pool()
        return _Captured(graph, inputs, logits, winners)

    def run(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor] | None:
        """The logits of this rank and the winners of a pass of ``chunks``; None, and nothing has happened, where no graph can do it.

        Both are overwritten by the next pass.
        """
        if len(chunks) > self._sizes[-1] or any(len(chunk.tokens) > 1 or not chunk.sample for chunk in chunks):
            return None
        rows = self._cache.decode([chunk.sequence for chunk in chunks])
        if rows is None:
            return None
        found = self._captured[next(size for size in self._sizes if size >= len(chunks))]
        spare = found.inputs.shape[1] - len(chunks)
        columns = [(chunk.tokens[0], *row) for chunk, row in zip(chunks, rows, strict=True)]
        token, position, _, keys, row, *_ = columns[0]  # no row brings what the batch has not: LLM.int8's outliers are of all rows
        columns += [(token, position, self._cache.nowhere, keys, row, 0, 0)] * spare
        found.inputs.copy_(upload(list(zip(*columns, strict=True)), torch.int64, found.inputs.device))
        found.graph.replay()
        return found.logits[: len(chunks)], found.winners[: len(chunks)]


def _agreed(decoder: Decoder, reason: str | None) -> str | None:
    """``reason``, or that another rank has one: a pass must be of the same shapes on all. A collective, on GPUs."""
    if decoder.device.type != "cuda":
        return reason
    return None if decoder.comm.agree(reason is None) else reason or "another rank cannot"


def _made(decoder: Decoder, cache: PagedCache, sampler: Sampler, last: Tensor, sizes: Sequence[int]) -> DecodeGraphs | str:
    """Graphs, or why there are none. Among ranks a capture that fails ends the engine: the others are in the middle of theirs."""
    try:
        return DecodeGraphs(decoder, cache, sampler, last, sizes)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0]
        if decoder.comm.size > 1:
            raise RuntimeDied(f"rank {decoder.comm.rank}", f"cannot capture CUDA graphs ({reason})", "what the other ranks can") from exc
        return reason


def make_graphs(decoder: Decoder, cache: PagedCache, sampler: Sampler, last: Tensor, sequences: int) -> DecodeGraphs | None:
    """Graphs for up to ``sequences`` at once; None where there can be none on some rank, with a warning where that is no property of the
    model. A collective, on GPUs."""
    reason = _agreed(decoder, obstacle(decoder, cache))
    if reason is None:
        made = _made(decoder, cache, sampler, last, sizes_for(sequences))
        if isinstance(made, DecodeGraphs):
            return made
        reason = made
        _LOG.warning("warning: decoding is not captured as CUDA graphs (%s), and slower for it", reason)
    _LOG.info("decoding runs without CUDA graphs: %s", reason)
    return None


def graph_bytes(decoder: Decoder, sequences: int, *, fp8: bool) -> int:
    """Bytes of a GPU that the graphs for up to ``sequences`` take: two are made to see. A collective."""
    cache = cache_for(decoder, 1, fp8=fp8, sequences=sequences)
    sizes = sizes_for(sequences)
    if not sizes or _agreed(decoder, obstacle(decoder, cache)) is not None:
        return 0
    sampler = Sampler(decoder.head.columns, decoder.head.vocab, decoder.comm, decoder.device)
    last = torch.zeros(cache.table.shape[0], dtype=torch.int64, device=decoder.device)
    free = []
    kept = []
    for some in ((), sizes[-1:], sizes[:1]):
        if some:
            kept.append(_made(decoder, cache, sampler, last, some))
            if isinstance(kept[-1], str):
                return 0  # make_graphs will say so
        torch.cuda.synchronize(decoder.device)
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info(decoder.device)[0])
    return max(0, free[0] - free[1]) + (len(sizes) - 1) * max(0, free[1] - free[2])
