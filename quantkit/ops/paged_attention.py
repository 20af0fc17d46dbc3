"""Attention over keys and values in blocks, on a GPU: one Triton kernel for prompts in pieces and for decoding, split over the keys.

Triton comes with torch on CUDA and is optional: ``usable`` says whether it is there. Letters as in ARCHITECTURE.md; B sequences.

A program takes ``ROWS`` rows, which are the query heads of one key head for a few neighbouring tokens of one sequence, and walks
over tiles of keys with a running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022). Where there are too few programs to
fill a GPU, the keys are split among several, and a second kernel joins what they found (Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.ops.transfer import upload
from quantkit.plan import KV_BLOCK

_LOG = logging.getLogger("quantkit")
_DTYPES = (torch.float16, torch.bfloat16)
_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ROWS = 64
"""Rows of a program where there are pieces of prompts; decoding makes do with as many as the matrix units take."""
_TILE = 64
_SPLIT_KEYS = 512
"""A split is of no fewer keys."""
_MOST_SPLITS = 32


def usable(q: Tensor, stored: torch.dtype) -> bool:
    """Whether the kernel takes queries like ``q [T, H, D]``: 16-bit floats on a GPU on which it has shown that it works.

    ``stored``: the dtype of keys and values, q's or float8. In Triton's interpreter, any on a CPU.
    """
    if not q.is_cuda:
        return _TRITON and _INTERPRETED
    return _TRITON and q.dtype in _DTYPES and _works(q.device, q.dtype, stored, q.shape[-1])


@cache
def _works(device: torch.device, dtype: torch.dtype, stored: torch.dtype, dim: int) -> bool:
    """Whether the kernel compiles here and says what torch says; if not, a warning. Triton wants a C compiler and a GPU that it knows."""
    try:
        error = self_test(device, dtype, stored, dim)
    except Exception as exc:  # noqa: BLE001  whatever a compiler raises
        reason = (str(exc).splitlines() or [type(exc).__name__])[0]
    else:
        if error < 3e-2:
            return True
        reason = f"its error is {error:.3g}"
    _LOG.warning("warning: the Triton attention of heads of %d does not work on %s (%s): torch's is used", dim, device, reason)
    return False


def self_test(device: torch.device, dtype: torch.dtype, stored: torch.dtype, dim: int) -> float:
    """The largest error of the kernel, as a part of the largest value of a sequence, on a small pass.

    That is a piece of a prompt, and a token behind keys enough to be split.
    """
    spans, kv_heads, group = [(10, 40), (1099, 1100)], 2, 4
    tables = [[70, 3, 71], list(range(4, 73 - 4))[::-1] + list(range(72, 77))]
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2, 80, KV_BLOCK, kv_heads, dim, generator=generator).to(device, stored)
    q = torch.randn(31, kv_heads * group, dim, generator=generator).to(device, dtype)
    pages = make_pages(table_of(tables, device), range(len(tables)), spans, group)
    got = attend(q, pool[0], pool[1], pages, scale=dim**-0.5, window=None, softcap=None).float()
    error, row = 0.0, 0
    for want in reference(q, pool, tables, spans, window=None, softcap=None):
        error = max(error, float((got[row : row + want.shape[0]] - want).abs().max() / want.abs().max()))
        row += want.shape[0]
    return error


def reference(
    q: Tensor,
    pool: Tensor,
    tables: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    *,
    window: int | None,
    softcap: float | None,
) -> Iterator[Tensor]:
    """Each sequence's attention ``[t, H * D]`` in float32, of ``q [T, H, D]`` over ``pool [2, blocks, block, KV, D]``, by torch: what
    kernels are tested against where they run. The scale is that of D."""
    row = 0
    for table, (start, stop) in zip(tables, spans, strict=True):
        keys, values = (x.float()[table].flatten(0, 1)[:stop].repeat_interleave(q.shape[1] // x.shape[2], 1) for x in pool)  # [S, H, D]
        scores = torch.einsum("thd,shd->hts", q[row : row + stop - start].float(), keys) * q.shape[-1] ** -0.5
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        seen = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).tril(start)
        if window is not None:
            seen &= torch.ones_like(seen).triu(start - window + 1)
        yield torch.einsum("hts,shd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values).flatten(1)
        row += stop - start


@dataclass(frozen=True, slots=True)
class Pages:
    """Of a pass: where each sequence's keys are, and which rows each program takes; int32 on the device.

    ``tables [.., N]`` block numbers, of sequence b in row ``rows[b]``; ``lengths [B]`` keys per sequence, those of the pass included;
    ``starts [B + 1]`` first query rows; ``tasks [P, 2]`` (sequence, first token of its queries). ``spans``: of each sequence the tokens of
    this pass, on the host; none in a graph.
    """

    tables: Tensor
    rows: Tensor
    lengths: Tensor
    starts: Tensor
    tasks: Tensor
    longest: int
    """Keys of a sequence at most."""
    height: int
    """Rows of a program, which hold the ``group`` query heads of a key head for some tokens."""
    group: int
    spans: tuple[tuple[int, int], ...] = ()
    singles: int = 0
    """Sequences of one token in this pass, before the first that has more."""
    pieces: int = 0
    """Tokens of the sequences behind those."""

    def alone(self) -> Pages:
        """Of the ``singles`` alone."""
        count = self.singles
        tables = (self.tables, self.rows[:count], self.lengths[:count], self.starts[: count + 1], self.tasks[:count])
        longest = max(stop for _, stop in self.spans[:count])
        return Pages(*tables, longest, _height(self.group, decoding=True), self.group, self.spans[:count], count)


def table_of(blocks: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Block tables of one width, int32 ``[B, N]``."""
    width = max(map(len, blocks))
    return upload([[*row, *[0] * (width - len(row))] for row in blocks], torch.int32, device)


def make_pages(tables: Tensor, rows: Sequence[int], spans: Sequence[tuple[int, int]], group: int) -> Pages:
    """The ``Pages`` of sequences with block tables in ``rows`` of ``tables``, whose tokens from ``span[0]`` to ``span[1]`` are new."""
    height = _height(group, decoding=all(stop - start == 1 for start, stop in spans))
    starts, tasks = [0], []
    for number, (start, stop) in enumerate(spans):
        starts.append(starts[-1] + stop - start)
        tasks += [(number, first) for first in range(0, stop - start, height // group)]
    lengths = [stop for _, stop in spans]
    singles = next((number for number, (start, stop) in enumerate(spans) if stop - start > 1), len(spans))
    packed = upload([*rows, *lengths, *starts, *(x for task in tasks for x in task)], torch.int32, tables.device)  # one transfer
    row, length, first, task = torch.split(packed, [len(rows), len(rows), len(starts), 2 * len(tasks)])
    return Pages(tables, row, length, first, task.view(-1, 2), max(lengths), height, group, tuple(spans), singles, starts[-1] - singles)


def decode_pages(tables: Tensor, rows: Tensor, lengths: Tensor, group: int, longest: int) -> Pages:
    """The ``Pages`` of one token of each of B sequences, for ``rows`` and ``lengths [B]`` int32, whatever they are when a graph runs."""
    starts, tasks = _decode_tasks(rows.shape[0], tables.device)
    return Pages(tables, rows, lengths, starts, tasks, longest, _height(group, decoding=True), group)


@cache
def _decode_tasks(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    starts = torch.arange(count + 1, dtype=torch.int32, device=device)
    return starts, torch.stack([starts[:-1], torch.zeros_like(starts[:-1])], 1)


def _height(group: int, *, decoding: bool) -> int:
    return max(16 if decoding else _ROWS, 1 << (group - 1).bit_length())


@cache
def _kernels() -> Any:
    """``paged_kernel``, once it is needed: importing Triton takes a while."""
    return importlib.import_module("quantkit.ops.paged_kernel")


@cache
def _starts_early(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def attend(q: Tensor, keys: Tensor, values: Tensor, pages: Pages, *, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """``q [T, H, D]`` over ``keys``, ``values [blocks, block, KV, D]`` (of q's dtype or float8 e4m3), causally -> ``[T, H * D]``.

    ``window``: keys that a query sees at most, its own among them. ``softcap`` c: scores pass through ``c * tanh(s / c)``.
    """
    total, heads, dim = q.shape
    block, kv_heads = keys.shape[1:3]
    group = heads // kv_heads
    assert group == pages.group
    q = q.contiguous()
    out = torch.empty_like(q)
    programs = pages.tasks.shape[0] * kv_heads
    seen = pages.longest if window is None else min(pages.longest, window + pages.height)
    splits = max(1, min(_MOST_SPLITS, 2 * _processors(q.device) // programs, -(-seen // _SPLIT_KEYS)))
    splits = 1 << (splits.bit_length() - 1)
    part, peaks, sums = out, out, out
    if splits > 1:
        part = torch.empty(splits, total, heads, dim, dtype=torch.float32, device=q.device)
        peaks, sums = torch.empty(2, splits, total, heads, dtype=torch.float32, device=q.device)
    padded = max(16, 1 << (dim - 1).bit_length())
    early = {"EARLY": True, "launch_pdl": True} if _starts_early(q.device) else {"EARLY": False}
    _kernels().attend[(pages.tasks.shape[0], kv_heads, splits)](
        q,
        keys,
        values,
        part,
        peaks,
        sums,
        pages.tables,
        pages.rows,
        pages.lengths,
        pages.starts,
        pages.tasks,
        scale,
        0.0 if softcap is None else softcap,
        0 if window is None else window,
        total,
        pages.tables.shape[1],
        H=heads,
        KV=kv_heads,
        G=group,
        D=dim,
        DP=padded,
        BLOCK=block,
        TILE=_TILE if padded <= 128 else _TILE // 2,
        ROWS=pages.height,
        SPLITS=splits,
        CAPPED=softcap is not None,
        WINDOWED=window is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=2,
        **early,
    )
    if splits > 1:
        _kernels().join[(total, heads)](part, peaks, sums, out, total, H=heads, D=dim, DP=padded, SPLITS=splits, num_warps=1, **early)
    return out.view(total, heads * dim)
