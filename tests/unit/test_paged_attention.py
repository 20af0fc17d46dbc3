"""The Triton kernel against torch's attention, on a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_fixtures import awq_checkpoint, batch_of, config_of, texts_of
from torch import Tensor

from quantkit.model import attention
from quantkit.model.attention import Attention
from quantkit.model.load import load_decoder
from quantkit.ops import paged_attention
from quantkit.runtime.kv_cache import cache_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32,) if DEVICE == "cpu" else (torch.float16, torch.bfloat16)
BLOCK = 16

pytestmark = pytest.mark.skipif(
    not paged_attention.usable(torch.empty(0, 1, 64, dtype=DTYPES[0], device=DEVICE), DTYPES[0]),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)


def scattered(lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[list[list[int]], Tensor, Tensor]:
    """Block tables in random order, and a pool in which every place that is no token's is NaN."""
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    pool = torch.full((2, len(order), BLOCK, kv_heads, dim), float("nan"), dtype=dtype)
    tables = [[order.pop() for _ in range(count)] for count in counts]
    for table, length in zip(tables, lengths, strict=True):
        for at in range(length):
            pool[:, table[at // BLOCK], at % BLOCK] = torch.randn(2, kv_heads, dim, generator=generator).to(dtype)
    return tables, pool[0].to(DEVICE), pool[1].to(DEVICE)


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("stored", [DTYPES[0], torch.float8_e4m3fn])
def test_the_self_test_passes_and_would_not_let_an_error_pass(dim: int, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    assert paged_attention.self_test(device, DTYPES[0], stored, dim) < (1e-5 if DEVICE == "cpu" else 1e-2)
    before = paged_attention.attend
    monkeypatch.setattr(paged_attention, "attend", lambda *given, **options: before(*given, **{**options, "window": 1090}))
    assert paged_attention.self_test(device, DTYPES[0], stored, dim) > 5e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 5.0), (40, 3.0)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "spans"),
    [
        (4, 4, 16, [(0, 1), (31, 32), (15, 16)]),
        (6, 2, 32, [(0, 23), (40, 41), (16, 35)]),
        (7, 1, 40, [(200, 201)]),
        (8, 1, 64, [(1100, 1101), (3, 4)]),
        (3, 3, 16, [(590, 612)]),
    ],
)
def test_it_is_torch_s_attention(
    heads: int, kv_heads: int, dim: int, spans: list[tuple[int, int]], window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    """Decoding, pieces of prompts and both at once; heads that are no power of two; keys long enough to be split."""
    tables, keys, values = scattered([stop for _, stop in spans], heads, kv_heads, dim, dtype)
    pages = paged_attention.make_pages(paged_attention.table_of(tables, torch.device(DEVICE)), range(len(tables)), spans, heads // kv_heads)
    total = sum(stop - start for start, stop in spans)
    q = torch.randn(total, heads, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    got = paged_attention.attend(q, keys, values, pages, scale=0.3, window=window, softcap=softcap)
    alone, row = Attention(dim, 0.3, window, softcap), 0
    for table, (start, stop) in zip(tables, spans, strict=True):
        held = [x[table].flatten(0, 1)[:stop].double() for x in (keys, values)]
        rows = slice(row, row + stop - start)
        want = alone._over(q[rows].double(), *held)
        assert float((got[rows].double() - want).abs().max()) < {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        row = rows.stop
    assert got.shape == (total, heads * dim)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_model_over_its_blocks(family: str, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts beside each other, in pieces and token by token, in scattered blocks: what torch's attention makes of the same cache."""
    checkpoint: Any = awq_checkpoint(config_of(family) | {"head_dim": 16, "intermediate_size": 96, "tie_word_embeddings": True}, 16)
    decoder = load_decoder(checkpoint, dtype=DTYPES[-1], device=DEVICE)
    texts = texts_of((40, 22))
    steps = [[(0, 19), (0, 7)], [(19, 33), (7, 8)], [(33, 34), (8, 9)], [(34, 40), (9, 22)]]
    found = []
    for kernel in (True, False):
        calls: list[int] = []
        monkeypatch.setattr(attention, "usable", lambda *given, kernel=kernel, calls=calls: calls.append(1) or kernel)
        cache = cache_for(decoder, 7, fp8=fp8)
        cache.extend(0, [5, 1, 3], 0)
        cache.extend(1, [0, 6], 0)
        rows = []
        with torch.inference_mode():
            for now in steps:
                tokens = torch.cat([text[start:stop] for text, (start, stop) in zip(texts, now, strict=True)])
                rows.append(decoder.logits(decoder.forward(tokens, batch_of(now, (0, 1)), cache)))
        assert calls
        found.append(torch.cat(rows).double())
    assert float((found[0] - found[1]).abs().max()) < (1e-4 if DTYPES[-1] == torch.float32 else 0.15) * float(found[1].abs().max())
