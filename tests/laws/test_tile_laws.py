"""Tiles hold what was packed, bit for bit, and give the weights of the references, for every format, shape and cut.

``word_fragments`` reads the words as ``kernels/tiles.cuh`` documents them and multiplies as mma.m16n8k16 does: the layout that the
CUDA kernels rely on, written a second time.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.geometry import BNB_BLOCKS, GGML_BLOCKS
from quantkit.ops import tiles as ops
from quantkit.ops.codebook import CODEBOOKS, NESTED_MAP, dequantize_4bit, dequantize_absmax
from quantkit.ops.ggml.decode import decode
from quantkit.ops.grouped import dequantize
from quantkit.ops.tiles import Format, Tiles

SEEDS = st.integers(0, 2**31)
SIZES = st.one_of(st.sampled_from([1, 8, 63, 64, 65, 128]), st.integers(1, 200))


def same(got: Tensor, want: Tensor) -> bool:
    """Equal bits of numbers; a NaN may be any other, and 0 may be -0 (padding has no sign)."""
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(got.nan_to_num(), want.nan_to_num())


def drawn(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def integers(n: int, k: int, group: int, symmetric: bool, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.randn(n, k // group, generator=g).to(dtype)
    zeros = drawn(0, 17, scales.shape, g)
    return drawn(0, 16, (n, k), g), scales, torch.full_like(zeros, 8) if symmetric else zeros


def random_blocks(kind: str, n: int, k: int, seed: int) -> Tensor:
    """Any codes and scales; half floats that are finite."""
    block, g = GGML_BLOCKS[kind], torch.Generator().manual_seed(seed)
    blocks = drawn(0, 256, (n * k // block.elements, block.nbytes), g)
    for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        blocks[:, at : at + 2] = torch.randn(len(blocks), 1, generator=g).half().view(torch.uint8)
    return blocks.reshape(n, -1)


def make(form: Format, n: int, k: int, seed: int, group: int = 128) -> Tiles:
    """Tiles of random content."""
    g = torch.Generator().manual_seed(seed)
    if form in (Format.INT4, Format.INT4Z):
        return ops.pack_int4(*integers(n, k, group, form == Format.INT4, torch.float16, seed))
    if form == Format.NF4:
        absmax = torch.rand(n * k // group, generator=g)
        return ops.pack_codebook(drawn(0, 16, (n, k), g), absmax, CODEBOOKS["nf4"], group)
    if form == Format.NF4N:
        absmax, absmax2 = drawn(0, 256, (n, k // 64), g), torch.rand(n * k // 64 // 256 + 1, generator=g)
        return ops.pack_nested(drawn(0, 16, (n, k), g), absmax, CODEBOOKS["nf4"], NESTED_MAP, absmax2, 1.5, 0, k // 64)
    return ops.pack_ggml(random_blocks(form.name, n, k, seed), form.name)


@settings(max_examples=60, deadline=None)
@given(
    SIZES, st.integers(1, 6), st.sampled_from([32, 64, 128, 256, 384, -1]), st.booleans(), st.sampled_from(["float16", "bfloat16"]), SEEDS
)
def test_integers(n: int, groups: int, group: int, symmetric: bool, dtype: str, seed: int) -> None:
    k, group = (groups * 40, groups * 40) if group == -1 else (groups * group, group)
    codes, scales, zeros = integers(n, k, group, symmetric, getattr(torch, dtype), seed)
    tiles = ops.pack_int4(codes, scales, zeros)
    got = ops.unpack(tiles)
    assert torch.equal(got.codes, codes) and torch.equal(got.scales, scales)
    assert (got.second is None and bool((zeros == 8).all())) or torch.equal(got.second, zeros)
    for out in (torch.float32, torch.float16, torch.bfloat16):
        assert same(ops.dequantize(tiles, out), dequantize(codes, scales, zeros, out))


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 5), st.sampled_from(BNB_BLOCKS), st.sampled_from(["nf4", "fp4"]), SEEDS)
def test_codebooks(n: int, groups: int, block: int, kind: str, seed: int) -> None:
    g, k = torch.Generator().manual_seed(seed), groups * min(block, 128)
    codes, absmax = drawn(0, 16, (n, k), g), torch.rand(math.ceil(n * k / block), generator=g)
    tiles = ops.pack_codebook(codes, absmax, CODEBOOKS[kind], block)
    want = dequantize_4bit(codes.reshape(-1), absmax, CODEBOOKS[kind], block, torch.float32).reshape(n, k)
    assert torch.equal(ops.unpack(tiles).codes, codes)
    assert same(ops.dequantize(tiles), want)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, st.integers(1, 9), st.integers(0, 3), st.integers(0, 40), SEEDS)
def test_nested_scales_of_a_cut(n: int, above: int, blocks: int, before: int, after: int, seed: int) -> None:
    g, stride, k = torch.Generator().manual_seed(seed), before + blocks + after, blocks * 64
    block0 = above * stride + before
    codes, absmax = drawn(0, 16, (n, k), g), drawn(0, 256, (n, blocks), g)
    absmax2 = torch.rand((above + n) * stride // 256 + 1, generator=g)
    tiles = ops.pack_nested(codes, absmax, CODEBOOKS["nf4"], NESTED_MAP, absmax2, 0.75, block0, stride)
    got = ops.unpack(tiles)
    assert torch.equal(got.codes, codes) and torch.equal(got.scales, absmax)
    index = block0 + torch.arange(n).unsqueeze(1) * stride + torch.arange(blocks)
    floats = dequantize_absmax(absmax, absmax2, torch.tensor(0.75), NESTED_MAP, index)
    want = dequantize_4bit(codes.reshape(-1), floats.reshape(-1), CODEBOOKS["nf4"], 64, torch.bfloat16).reshape(n, k)
    assert same(ops.dequantize(tiles, torch.bfloat16), want)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(ops.GGML_KINDS)), SIZES, st.integers(1, 6), SEEDS)
def test_blocks_of_ggml(kind: str, n: int, blocks: int, seed: int) -> None:
    k = blocks * GGML_BLOCKS[kind].elements
    packed = random_blocks(kind, n, k, seed)
    tiles = ops.pack_ggml(packed, kind)
    for out in (torch.float32, torch.float16, torch.bfloat16):
        assert same(ops.dequantize(tiles, out), decode(packed, kind, out))
    if kind in Format.__members__:
        want, got = ops.ggml_values(packed, kind), ops.unpack(tiles)
        assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
        assert want.second is None or torch.equal(got.second, want.second)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(Format)), st.integers(0, 130), st.integers(1, 130), st.integers(0, 2), st.integers(1, 2), SEEDS)
def test_a_cut_is_packed_as_itself(form: Format, n0: int, rows: int, k0: int, blocks: int, seed: int) -> None:
    """Packing a slice of a weight gives the slice of the weight: what a rank of a tensor-parallel group does."""
    n, k = n0 + rows + 3, (k0 + blocks + 1) * 256
    whole, cut = make(form, n, k, seed), slice(k0 * 256, (k0 + blocks) * 256)
    values = ops.unpack(whole)
    own = slice(n0, n0 + rows)

    def part(each: Tensor) -> Tensor:
        per = k // each.shape[1]
        return each[own, cut.start // per : cut.stop // per]

    codes = values.codes[own, cut].contiguous()
    if form in (Format.INT4, Format.INT4Z):
        zeros = torch.full_like(values.scales, 8, dtype=torch.uint8) if values.second is None else values.second
        tiles = ops.pack_int4(codes, part(values.scales), part(zeros))
    elif form == Format.NF4:
        tiles = ops.pack_codebook(codes, part(values.scales), CODEBOOKS["nf4"], 128)
    elif form == Format.NF4N:
        first = whole.block0 + n0 * whole.block_stride + cut.start // 64
        assert whole.table is not None and whole.code is not None and whole.absmax2 is not None
        scales = part(values.scales)
        tiles = ops.pack_nested(codes, scales, whole.table, whole.code, whole.absmax2, 1.5, first, whole.block_stride)
    else:
        block = GGML_BLOCKS[form.name]
        packed = random_blocks(form.name, n, k, seed).reshape(n, -1, block.nbytes)
        per = 256 // block.elements
        tiles = ops.pack_ggml(packed[own, k0 * per : (k0 + blocks) * per].reshape(rows, -1), form.name)
    assert same(ops.dequantize(tiles), ops.dequantize(whole)[own, cut])


@pytest.mark.parametrize("form", list(Format))
def test_padding_is_zero(form: Format) -> None:
    """Rows and columns past the weight are weights of exactly 0."""
    tiles = make(form, 3, 256, 1)
    padded = Tiles(tiles.data, form, 64, 256, tiles.group, *side(tiles))
    assert not ops.dequantize(padded)[3:].any()
    if form in (Format.INT4, Format.INT4Z, Format.NF4, Format.NF4N, Format.Q8_0):
        tiles = make(form, 3, 64, 1, 64)
        padded = Tiles(tiles.data, form, 64, 128, tiles.group, *side(tiles))
        assert not ops.dequantize(padded)[:, 64:].any()


def side(tiles: Tiles) -> tuple[torch.dtype, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    return tiles.scale_dtype, tiles.table, tiles.code, tiles.absmax2, tiles.offsets


def word_fragments(tiles: Tiles, strip: int, tile: int, w: int, column: int, lane: int) -> list[tuple[int, int, int]]:
    """(row, column, code) of the eight elements of a lane's fragment of A: rows 16w on, columns ``column`` on, in register order."""
    width, form = ops.columns(tiles.format), tiles.format
    chunk = tiles.data[strip, tile].contiguous()
    words = chunk.view(torch.int32).tolist()
    h, s = column // 64, column % 64 // 16
    base = (w * (width // 64) + h) * 32 + lane
    r0, k0 = 16 * w + lane // 4, column + 2 * (lane % 4)
    found = []
    for pair in range(4):
        row, first = r0 + 8 * (pair % 2), k0 + 8 * (pair // 2)
        for e in range(2):
            if form == Format.Q8_0:
                at = (((w * 2 + h) * 2 + s // 2) * 32 + lane) * 16 + 8 * (s % 2) + 2 * pair + e
                code = int(chunk[at].view(torch.int8))
            else:
                at = 8 * pair + 4 * e if form in (Format.NF4, Format.NF4N) else 4 * pair + 16 * e
                code = words[base * 4 + s] >> at & 15
                plane = 64 * width // 8  # in words
                if form == Format.Q5_K:
                    code |= (words[plane + base] >> (4 * pair + s + 16 * e) & 1) << 4
                elif form == Format.Q6_K:
                    code |= (words[plane + 2 * base + s // 2] >> (4 * pair + 2 * (s % 2) + 16 * e) & 3) << 4
            found.append((row, first + e, code))
    return found


@pytest.mark.parametrize("form", list(Format))
def test_words_are_fragments(form: Format) -> None:
    """Multiplying 16 x 16 fragments taken from the words as they are documented gives ``codes @ x``."""
    tiles = make(form, 128, 256, 3)
    width, codes = ops.columns(form), ops.unpack(tiles).codes.double()
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    got, seen = torch.zeros(128, 8, dtype=torch.float64), torch.zeros(128, 256, dtype=torch.int64)
    for strip in range(2):
        for tile in range(256 // width):
            for w in range(4):
                for column in range(0, width, 16):
                    a = torch.zeros(16, 16, dtype=torch.float64)
                    for lane in range(32):
                        for row, k, code in word_fragments(tiles, strip, tile, w, column, lane):
                            a[row - 16 * w, k - column] = code
                            seen[64 * strip + row, tile * width + k] += 1
                    rows, at = slice(64 * strip + 16 * w, 64 * strip + 16 * w + 16), tile * width + column
                    got[rows] += a @ x[at : at + 16]
    assert bool((seen == 1).all())
    assert torch.allclose(got, codes @ x, rtol=1e-12)


@pytest.mark.parametrize("form", [Format.INT4Z, Format.Q4_K, Format.Q6_K])
def test_row_order(form: Format) -> None:
    """A lane finds the values of its two rows side by side, at ``16w + 2 (lane / 4)`` of each section."""
    tiles = make(form, 64, 256, 5)
    values = ops.unpack(tiles)
    assert values.second is not None
    chunk = tiles.data[0, 0]
    for row in range(64):
        at = row // 16 * 16 + 2 * (row % 8) + row % 16 // 8
        if form == Format.INT4Z:
            assert torch.equal(chunk[4096 + 2 * at :][:2].view(torch.float16), values.scales[row, :1])
            assert int(chunk[4096 + 128 + at]) == int(values.second[row, 0])
        else:
            scales = 8192 if form == Format.Q4_K else 12288
            size = 4 if form == Format.Q4_K else 2
            assert torch.equal(chunk[scales + 16 * at :][:16].view(values.scales.dtype), values.scales[row].flatten()[:16])
            assert torch.equal(chunk[scales + 1024 + size * at :][:size].view(torch.float16), values.second[row].flatten()[: size // 2])
