"""The kernels of ``paged_attention`` in Triton, which says what goes in; importing this needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["window", "total", "width"])
def attend(
    q,
    keys,
    values,
    out,
    peaks,
    sums,
    tables,
    rows,
    lengths,
    starts,
    tasks,
    scale,
    softcap,
    window,
    total,
    width,
    H: tl.constexpr,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:  # the kernel behind this one starts under it, as this one did under the one ahead, whose results are there from here on
        gdc_launch_dependents()
        gdc_wait()
    task, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first = tl.load(tasks + 2 * task), tl.load(tasks + 2 * task + 1)
    start, stop, length = tl.load(starts + sequence), tl.load(starts + sequence + 1), tl.load(lengths + sequence)
    table = tables + tl.load(rows + sequence).to(tl.int64) * width
    queries = stop - start
    row = tl.arange(0, ROWS)
    token = first + row // G
    head = kv * G + row % G
    live = (row < ROWS // G * G) & (token < queries)
    d = tl.arange(0, DP)
    at = ((start + token) * H + head).to(tl.int64) * D
    x = tl.load(q + at[:, None] + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0)
    place = length - queries + token  # of each query in its sequence

    end = tl.minimum(length, length - queries + first + ROWS // G)  # no query here sees more keys
    low = 0
    if WINDOWED:
        low = tl.maximum(0, length - queries + first - window + 1) // TILE * TILE
    tiles = (end - low + TILE - 1) // TILE
    each = (tiles + SPLITS - 1) // SPLITS
    low += split * each * TILE
    end = tl.minimum(end, low + each * TILE)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total_weight = tl.zeros([ROWS], tl.float32)
    sum_ = tl.zeros([ROWS, DP], tl.float32)
    for tile in range(low, end, TILE):
        key = tile + tl.arange(0, TILE)
        inside = key < end
        block = tl.load(table + key // BLOCK, mask=inside, other=0).to(tl.int64)
        slot = ((block * BLOCK + key % BLOCK) * KV + kv) * D
        k = tl.load(keys + slot[None, :] + d[:, None], mask=inside[None, :] & (d[:, None] < D), other=0.0).to(x.dtype)
        s = tl.dot(x, k, input_precision=PRECISION) * scale
        if CAPPED:
            s = softcap * (2.0 / (1.0 + tl.exp(-2.0 * s / softcap)) - 1.0)  # tanh
        sees = inside[None, :] & (key[None, :] <= place[:, None])
        if WINDOWED:
            sees = sees & (key[None, :] > place[:, None] - window)
        s = tl.where(sees, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        weight = tl.exp(s - base[:, None])
        shrink = tl.exp(peak - base)
        v = tl.load(values + slot[:, None] + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0).to(x.dtype)
        sum_ = sum_ * shrink[:, None] + tl.dot(weight.to(x.dtype), v, input_precision=PRECISION)
        total_weight = total_weight * shrink + tl.sum(weight, 1)
        peak = higher

    mask = live[:, None] & (d[None, :] < D)
    if SPLITS == 1:
        total_weight = tl.where(total_weight == 0.0, 1.0, total_weight)  # of a row that no sequence has, in a graph
        tl.store(out + at[:, None] + d[None, :], (sum_ / total_weight[:, None]).to(x.dtype), mask=mask)
    else:
        index = (split.to(tl.int64) * total + start + token) * H + head
        tl.store(out + index[:, None] * D + d[None, :], sum_, mask=mask)
        tl.store(peaks + index, peak, mask=live)
        tl.store(sums + index, total_weight, mask=live)


@triton.jit(do_not_specialize=["total"])
def join(part, peaks, sums, out, total, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * H + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    index = split.to(tl.int64) * total * H + row
    peak = tl.load(peaks + index)
    highest = tl.max(peak, 0)
    share = tl.exp(peak - tl.where(highest == float("-inf"), 0.0, highest))  # of a split that saw no key: 0
    d = tl.arange(0, DP)
    x = tl.load(part + index[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
    weight = tl.sum(tl.load(sums + index) * share, 0)
    y = tl.sum(x * share[:, None], 0) / tl.where(weight == 0.0, 1.0, weight)
    tl.store(out + row * D + d, y.to(out.dtype.element_ty), mask=d < D)
