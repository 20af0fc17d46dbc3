"""How long does attention over blocks take for passes with pieces of prompts: by the Triton kernel, and by FlashInfer?

    python benchmarks/attention.py

Llama-3-8B's heads (32 query, 8 key heads of 128), bfloat16, one layer. "plan" is what FlashInfer does on the host once for each pass.
"""

from __future__ import annotations

import time

import torch

from quantkit.ops import flashinfer_attention, paged_attention

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
SCALE, CALLS = DIM**-0.5, 20
CASES: dict[str, list[tuple[int, int]]] = {
    "512 new": [(0, 512)],
    "1024 new": [(0, 1024)],
    "4096 new": [(0, 4096)],
    "1024 new behind 7168": [(7168, 8192)],
    "8 x 128 new": [(0, 128)] * 8,
    "64 decoding at 2000, 960 new": [(1999, 2000)] * 64 + [(0, 960)],
}
"""Each sequence's tokens of the pass: from, to."""


def measure(name: str, spans: list[tuple[int, int]], device: torch.device) -> None:
    counts = [-(-stop // BLOCK) for _, stop in spans]
    order = torch.randperm(sum(counts)).tolist()
    tables = paged_attention.table_of([[order.pop() for _ in range(count)] for count in counts], device)
    pool = torch.randn(2, sum(counts), BLOCK, KV_HEADS, DIM, device=device).bfloat16()
    q = torch.randn(sum(stop - start for start, stop in spans), HEADS, DIM, device=device).bfloat16()
    pages = paged_attention.make_pages(tables, range(len(spans)), spans, HEADS // KV_HEADS)
    times, found = [], []
    for attend in (paged_attention.attend, flashinfer_attention.attend):
        found.append(attend(q, pool[0], pool[1], pages, scale=SCALE, window=None, softcap=None).float())
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            attend(q, pool[0], pool[1], pages, scale=SCALE, window=None, softcap=None)
        stop.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(stop) / CALLS)
    assert float((found[0] - found[1]).abs().max()) < 3e-2
    planner = flashinfer_attention._planner(device, q.dtype, HEADS, KV_HEADS, DIM, SCALE, None, None)
    begin = time.perf_counter()
    for _ in range(CALLS):
        planner._plan(q, pool[0], pages, SCALE, None, None)
    plan = 1e6 * (time.perf_counter() - begin) / CALLS
    print(f"{name:30s} triton {times[0]:7.1f} us   flashinfer {times[1]:7.1f} us   plan {plan:5.0f} us")


if __name__ == "__main__":
    for case, tokens in CASES.items():
        measure(case, tokens, torch.device("cuda", 0))
