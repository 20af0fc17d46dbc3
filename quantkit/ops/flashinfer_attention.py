"""Attention of pieces of prompts over keys and values in blocks by FlashInfer, where that is installed. Letters as in ARCHITECTURE.md.

It takes what the Triton kernel takes, of keys and values in the queries' 16 bits. FlashInfer plans a pass on the host before its first
layer. Sequences of one token, which a batch begins with, stay the Triton kernel's: it is faster there, and CUDA graphs hold it. FlashInfer
compiles its kernels for a kind of attention when that is first asked for, in a minute or two, and keeps them. Source: Ye et al. 2025,
"FlashInfer".
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.ops import paged_attention
from quantkit.ops.paged_attention import Pages, make_pages, table_of
from quantkit.plan import KV_BLOCK

_LOG = logging.getLogger("quantkit")
_DTYPES = (torch.float16, torch.bfloat16)
_DIMS = (64, 128, 256)
"""Heads that FlashInfer has kernels for."""
_WORKSPACE_BYTES = 128 << 20
"""Of each device, for partial results: what FlashInfer asks for."""
_LEAST_CAPABILITY = (8, 0)
LEAST_TOKENS = 256
"""Tokens in pieces of prompts from which on planning pays, where nobody asked for FlashInfer."""


def installed() -> bool:
    """Whether the package is there; it is imported when it is used."""
    return importlib.util.find_spec("flashinfer") is not None


@cache
def obstacle(device: torch.device, dtype: torch.dtype, stored: torch.dtype, dim: int, *, windowed: bool, capped: bool) -> str | None:
    """Why attention of this kind is not FlashInfer's; None when it is. The first time it compiles, and what does not work is a warning."""
    if not installed():
        return "it is not installed"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or later"
    if dtype not in _DTYPES or stored != dtype:
        return "keys and values are not in 16 bits as queries are"
    if dim not in _DIMS:
        return f"it has no heads of {dim}"
    try:
        error = self_test(device, dtype, dim, window=300 if windowed else None, softcap=20.0 if capped else None)
    except Exception as exc:  # noqa: BLE001  whatever its compiler, or another version of it, raises
        reason = f"it does not run here ({(str(exc).strip().splitlines() or [type(exc).__name__])[0]:.300})"
    else:
        if error < 3e-2:
            return None
        reason = f"its error is {error:.3g}"
    _LOG.warning("warning: FlashInfer is not used for heads of %d on %s: %s", dim, device, reason)
    return reason


def self_test(device: torch.device, dtype: torch.dtype, dim: int, *, window: int | None, softcap: float | None) -> float:
    """The largest error, as a part of the largest value, on pieces of three prompts: from the start, behind many keys, and one token; and
    one token of another sequence before them."""
    spans, kv_heads, group = [(99, 100), (0, 70), (1000, 1100), (40, 41)], 2, 4
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [[order.pop() for _ in range(-(-stop // KV_BLOCK))] for _, stop in spans]
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2, 90, KV_BLOCK, kv_heads, dim, generator=generator).to(device, dtype)
    q = torch.randn(172, kv_heads * group, dim, generator=generator).to(device, dtype)
    pages = make_pages(table_of(tables, device), range(len(tables)), spans, group)
    got = _Planner(device).run(q, pool[0], pool[1], pages, dim**-0.5, window, softcap).flatten(1).float()
    want = torch.cat(list(paged_attention.reference(q, pool, tables, spans, window=window, softcap=softcap)))
    return float((got - want).abs().max() / want.abs().max())


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class _Planner:
    """FlashInfer's plan of the pass at hand, for layers of one kind."""

    def __init__(self, device: torch.device) -> None:
        prefill = importlib.import_module("flashinfer.prefill")
        self._wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "NHD")
        self._pages: Pages | None = None
        self._alone: Pages | None = None
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]

    def run(self, q: Tensor, keys: Tensor, values: Tensor, pages: Pages, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """``q [T, H, D]`` -> ``[T, H, D]``."""
        if pages is not self._pages:
            self._plan(q, keys, pages, scale, window, softcap)
        first = pages.singles
        found: Tensor = self._wrapper.run(q[first:], (keys, values))
        if self._alone is None:
            return found
        alone = paged_attention.attend(q[:first], keys, values, self._alone, scale=scale, window=window, softcap=softcap)
        return torch.cat([alone.view(q[:first].shape), found])

    def _plan(self, q: Tensor, keys: Tensor, pages: Pages, scale: float, window: int | None, softcap: float | None) -> None:
        assert pages.pieces, "a pass with pieces of prompts"
        block, kv_heads = keys.shape[1:3]
        spans = torch.tensor(pages.spans[pages.singles :], dtype=torch.int32)
        counts = (spans[:, 1] + block - 1) // block  # blocks of each sequence
        rows, firsts = (torch.cat([x.new_zeros(1), x.cumsum(0, dtype=torch.int32)]) for x in (spans[:, 1] - spans[:, 0], counts))
        width, total = pages.tables.shape[1], int(firsts[-1])
        shift = torch.arange(len(counts), dtype=torch.int32) * width - firsts[:-1]
        places = torch.repeat_interleave(shift, counts) + torch.arange(total, dtype=torch.int32)  # in the tables' rows of these sequences
        blocks = pages.tables.index_select(0, pages.rows[pages.singles :]).view(-1)[_sent(places, q.device)]
        self._copied.synchronize()  # what the last plan copies from is written again
        self._wrapper.plan(
            rows,
            firsts,
            blocks,
            spans[:, 1] - (counts - 1) * block,
            q.shape[1],
            kv_heads,
            q.shape[2],
            block,
            causal=True,
            sm_scale=scale,
            window_left=-1 if window is None else window - 1,
            logits_soft_cap=softcap,
            q_data_type=q.dtype,
            kv_data_type=keys.dtype,
        )
        self._copied.record(torch.cuda.current_stream(q.device))
        self._pages, self._alone = pages, pages.alone() if pages.singles else None


def _sent(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory().to(device, non_blocking=True)


@cache
def _planner(device: torch.device, *kind: Any) -> _Planner:
    """One for each kind of attention: layers that have the same share what is planned."""
    return _Planner(device)


def attend(q: Tensor, keys: Tensor, values: Tensor, pages: Pages, *, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """``paged_attention.attend``, of a pass whose ``pages`` know their ``spans``, and keys and values of q's dtype."""
    total, heads, dim = q.shape
    planner = _planner(q.device, q.dtype, heads, keys.shape[2], dim, scale, window, softcap)
    return planner.run(q.contiguous(), keys, values, pages, scale, window, softcap).view(total, heads * dim)
