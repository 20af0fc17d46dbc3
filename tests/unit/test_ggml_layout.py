"""Blocks of ggml as a layout: decoded bit for bit, packed only from blocks, and run as they are."""

from __future__ import annotations

import hashlib
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from quantkit.errors import InputError
from quantkit.formats.gguf import BY_NAME
from quantkit.geometry import GGML_BLOCKS, geometry_of, ggml_scheme
from quantkit.layouts.base import SuperBlock, stacked
from quantkit.layouts.registry import UnpackingLinear, codec, load_linear
from quantkit.ops.ggml.decode import FOUR_BITS, LEVELS, decode, four_bits, infinite_blocks
from quantkit.ops.ggml.encode import BLOCKS, encode
from quantkit.ops.ggml.linear import DENSE_ROWS, BlockCpuLinear, _shared

KINDS = tuple(GGML_BLOCKS)
DECODED = {
    "Q8_0": "62b870ef5b25cacf",
    "Q4_0": "3d953262ad8cc34c",
    "Q4_1": "6634bfd464f60ac4",
    "Q5_0": "c560a18b8ed91dfa",
    "Q5_1": "6a4edfaf1f17d00a",
    "Q2_K": "5bcc28cee0ab1c91",
    "Q3_K": "50fb4df8c06647f0",
    "Q4_K": "2720631d1622afa1",
    "Q5_K": "410926b9931a65ce",
    "Q6_K": "5ca1b2242bbcefce",
    "IQ4_NL": "3bb7cbe2fa38b00f",
    "IQ4_XS": "c65325d583bd95cb",
}
"""The first digits of the sha256 of what ggml decodes of its golden input (``gguf.md`` 3.7)."""


def golden() -> np.ndarray:
    """The golden input ``[64, 512]``: sums of four values of a linear congruential generator, every 97th times 20."""
    state, values = 42, []
    for _ in range(4 * 64 * 512):
        state = (1664525 * state + 1013904223) % (1 << 32)
        values.append(state >> 8)
    sums = np.array(values, dtype=np.float64).reshape(-1, 4).sum(1)
    found = (sums - (1 << 25)) * 2.0**-24 * 0.05
    found[::97] *= 20
    return found.astype(np.float32).reshape(64, 512)


def random_blocks(kind: str, rows: int, seed: int = 0) -> np.ndarray:
    """Any bytes at all, 512 weights a row: scales may be infinite or no number."""
    block = GGML_BLOCKS[kind]
    return np.random.default_rng(seed).integers(0, 256, (rows, 512 // block.elements * block.nbytes), dtype=np.uint8)


def test_the_blocks_of_geometry_encoder_and_reader_agree() -> None:
    assert {kind: (block.elements, block.nbytes) for kind, block in GGML_BLOCKS.items()} == dict(BLOCKS)
    assert all((BY_NAME[kind].elements, BY_NAME[kind].nbytes) == BLOCKS[kind] for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_blocks_decode_to_the_bits_of_ggml(kind: str) -> None:
    blocks = torch.from_numpy(encode(golden(), kind))
    assert hashlib.sha256(decode(blocks, kind).numpy().tobytes()).hexdigest()[:16] == DECODED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_decode_as_the_gguf_package_decodes_them(kind: str) -> None:
    blocks = random_blocks(kind, 300)
    with np.errstate(all="ignore"):
        want = dequantize(blocks, gguf.GGMLQuantizationType[kind])
    got = decode(torch.from_numpy(blocks), kind).numpy()
    numbers = ~np.isnan(want)
    assert np.array_equal(numbers, ~np.isnan(got))
    assert np.array_equal(got.view(np.uint32)[numbers], want.view(np.uint32)[numbers])


@pytest.mark.parametrize("kind", KINDS)
def test_zero_bytes_are_zeros(kind: str) -> None:
    """So a vocabulary can be padded with them."""
    assert not decode(torch.zeros(2, random_blocks(kind, 1).shape[1], dtype=torch.uint8), kind).any()


def test_more_than_a_chunk_is_decoded_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.from_numpy(encode(golden(), "Q6_K"))
    whole = decode(blocks, "Q6_K", torch.bfloat16)
    monkeypatch.setattr("quantkit.ops.ggml.decode.CHUNK_ELEMENTS", {"cpu": 3 * 256})
    assert torch.equal(decode(blocks, "Q6_K", torch.bfloat16), whole)
    assert torch.equal(whole, decode(blocks, "Q6_K").to(torch.bfloat16))


def test_the_levels_are_those_of_the_encoder() -> None:
    from quantkit.ops.ggml import kernels

    assert LEVELS == kernels.LEVELS


# the codec


def test_blocks_are_packed_and_unpacked_as_they_are() -> None:
    blocks, bias = torch.from_numpy(random_blocks("Q4_K", 6)), torch.arange(6.0)
    geometry = geometry_of(ggml_scheme("Q4_K"), 6, 512, dtype="F32", bias=True)
    parts = codec("ggml").pack(SuperBlock(blocks, "Q4_K", bias), geometry)
    assert geometry.shape(geometry.part("weight")) == tuple(parts["weight"].shape) == (6, 288)
    found = codec("ggml").unpack(parts, geometry)
    assert isinstance(found, SuperBlock) and found.kind == "Q4_K"
    assert torch.equal(found.blocks, blocks) and found.bias is not None and torch.equal(found.bias, bias)


def test_blocks_of_another_type_are_refused() -> None:
    geometry = geometry_of(ggml_scheme("Q4_K"), 2, 512, dtype="F32")
    with pytest.raises(InputError, match="cannot hold blocks of Q6_K"):
        codec("ggml").pack(SuperBlock(torch.from_numpy(random_blocks("Q6_K", 2)), "Q6_K"), geometry)
    with pytest.raises(InputError, match="cannot hold a Tensor"):
        codec("ggml").pack(torch.zeros(2, 512), geometry)  # type: ignore[arg-type]


def test_fused_linears_are_stacked_by_rows_and_only_of_one_type() -> None:
    one, two = (SuperBlock(torch.from_numpy(random_blocks("Q5_K", rows)), "Q5_K") for rows in (2, 3))
    found = stacked([one, two])
    assert isinstance(found, SuperBlock) and torch.equal(found.blocks, torch.cat([one.blocks, two.blocks]))
    with pytest.raises(InputError, match="fused linear"):
        stacked([one, SuperBlock(torch.from_numpy(random_blocks("Q6_K", 2)), "Q6_K")])


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_a_linear_stays_in_blocks_and_multiplies_by_what_they_decode_to(kind: str) -> None:
    blocks = torch.from_numpy(encode(golden(), kind))
    geometry = geometry_of(ggml_scheme(kind), 64, 512, dtype="F32")
    linear = load_linear(geometry, {"weight": blocks}, dtype=torch.float32, parity=True)
    assert isinstance(linear, UnpackingLinear)
    assert linear.nbytes == blocks.nbytes == geometry.total_bytes
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear(x), torch.nn.functional.linear(x, decode(blocks, kind)))


# the kernel of a CPU


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_multiplied_on_a_cpu_by_the_weights_that_ggml_decodes(kind: str) -> None:
    blocks = torch.from_numpy(encode(golden(), kind))
    linear = BlockCpuLinear(blocks, kind, torch.float32)
    dense = decode(blocks, kind)
    assert torch.equal(linear.weight(), dense) and linear.nbytes == blocks.nbytes
    x = torch.randn(DENSE_ROWS, 512, generator=torch.Generator().manual_seed(2))
    for tokens in (x[:1], x[:3], x):
        want = tokens.double() @ dense.double().T
        assert float((linear(tokens).double() - want).abs().max()) < 1e-5
    assert linear(x[:0]).shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations_meet_unrounded_weights(dtype: torch.dtype) -> None:
    blocks = torch.from_numpy(encode(golden(), "Q5_K"))
    linear, dense = BlockCpuLinear(blocks, "Q5_K", dtype), decode(blocks, "Q5_K")
    assert torch.equal(linear.weight(), dense.to(dtype))
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.allclose(linear(x), (x.double() @ dense.double().T).to(dtype), atol=1e-3, rtol=1e-2) and linear(x).dtype == dtype


def test_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.from_numpy(encode(golden(), "Q8_0"))
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(4))
    linear = BlockCpuLinear(blocks, "Q8_0", torch.bfloat16)
    alone, weight = linear(x), linear.weight()
    seen = set()

    def shared(rows: int, weights: int, run: Any) -> None:
        _shared(rows, weights, lambda first, last: (seen.add((first, last)), run(first, last)))

    monkeypatch.setattr("quantkit.ops.ggml.linear.THREAD_WEIGHTS", 64 * 512 // 3)
    monkeypatch.setattr("quantkit.ops.ggml.linear.TILE_WEIGHTS", 40 * 512)
    monkeypatch.setattr("quantkit.ops.ggml.linear._shared", shared)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    assert torch.equal(linear(x), alone) and seen == {(0, 21), (21, 42), (42, 64)}
    assert torch.equal(linear.weight(), weight)


@pytest.mark.parametrize("kind", sorted(FOUR_BITS))
def test_four_bit_types_are_what_the_int4_kernel_takes(kind: str) -> None:
    blocks = torch.from_numpy(encode(golden(), kind))
    codes, scales, middles = four_bits(blocks, kind)
    found = (codes.float().reshape(64, 16, 32) - 8) * scales.unsqueeze(-1) + middles.unsqueeze(-1)
    assert torch.allclose(found.reshape(64, 512), decode(blocks, kind), atol=1e-6)


def test_blocks_with_scales_that_are_not_finite_are_counted() -> None:
    blocks = torch.from_numpy(encode(golden(), "Q4_1"))
    assert infinite_blocks(blocks, "Q4_1") == 0
    blocks[3, 2:4] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # an infinite offset
    blocks[9, 20:22] = torch.tensor([1, 0x7C], dtype=torch.uint8)  # no number
    assert infinite_blocks(blocks, "Q4_1") == 2


# a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_decodes_to_the_same_bits(kind: str) -> None:
    blocks = torch.from_numpy(random_blocks(kind, 300))
    want, got = decode(blocks, kind), decode(blocks.cuda(), kind).cpu()
    numbers = ~want.isnan()
    assert torch.equal(numbers, ~got.isnan()) and torch.equal(got[numbers].view(torch.int32), want[numbers].view(torch.int32))
