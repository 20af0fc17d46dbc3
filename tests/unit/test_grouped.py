"""Group quantization arithmetic and the AWQ words, against the format's own vectors and plain definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.geometry import Geometry, geometry_of
from quantkit.layouts.awq import pack_words, unpack_words
from quantkit.layouts.base import GroupedInt
from quantkit.layouts.registry import codec, load_linear
from quantkit.ops.grouped import dequantize, encode, fake_quantize, group_range, scales_and_zeros
from quantkit.scheme import LinearScheme


def awq_gemm(n: int, k: int, group: int) -> Geometry:
    return geometry_of(LinearScheme("awq", "awq", 4, group), n, k, dtype="BF16")


def gaussian(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def quantized(n: int, k: int, group: int, sym: bool, seed: int = 0) -> GroupedInt:
    weight = gaussian(n, k, seed)
    scales, zeros = scales_and_zeros(*group_range(weight, group), 4, sym)
    return GroupedInt(encode(weight, scales, zeros, 4), scales, zeros, 4)


@pytest.mark.parametrize(
    ("group", "sym", "expected"),
    [(128, True, 0.111), (64, True, 0.103), (32, True, 0.095), (128, False, 0.101), (64, False, 0.091), (32, False, 0.081)],
)
def test_error_of_gaussian_weights_is_the_known_one(group: int, sym: bool, expected: float) -> None:
    # Symmetric vectors of the field divide by 7.5 and clip at +7; the range here divides by 15 over both sides: the same grid.
    weight = gaussian(512, 1024)
    error = (fake_quantize(weight, group, 4, sym) - weight).norm() / weight.norm()
    assert float(error) == pytest.approx(expected, abs=0.002)


def test_awq_words_follow_the_format_vectors() -> None:
    words = pack_words(torch.arange(16, dtype=torch.uint8)[None])
    assert [int(word) & 0xFFFFFFFF for word in words[0]] == [0x75316420, 0xFDB9ECA8]
    assert int(pack_words(torch.full((1, 8), 8))[0, 0]) & 0xFFFFFFFF == 0x88888888


@given(st.lists(st.integers(0, 15), min_size=8, max_size=64).filter(lambda codes: len(codes) % 8 == 0))
def test_awq_words_round_trip(codes: list[int]) -> None:
    row = torch.tensor([codes], dtype=torch.uint8)
    assert torch.equal(unpack_words(pack_words(row)), row)


@settings(max_examples=30, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(0, 1e3), st.booleans())
def test_a_group_keeps_zero_exact_and_stays_within_half_a_step(offset: float, spread: float, sym: bool) -> None:
    weight = torch.linspace(-1, 1, 64)[None] * spread + offset
    weight[0, 0] = 0.0
    scales, zeros = scales_and_zeros(*group_range(weight, 64), 4, sym)
    back = dequantize(encode(weight, scales, zeros, 4), scales, zeros)
    assert float(back[0, 0]) == 0.0
    # Symmetric codes stop at +7 steps, so the greatest value may be a whole step away; float16 moves the scale by 2^-11.
    assert float((back - weight).abs().max()) <= float(scales.max()) * (1.02 if sym else 0.52)


def test_asymmetric_covers_all_positive_groups() -> None:
    weight = torch.linspace(1, 2, 64)[None]
    error = (fake_quantize(weight, 64, 4, sym=False) - weight).abs().max()
    assert float(error) <= 2 / 15 / 2 * 1.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2e6])
def test_weights_without_a_float16_scale_are_refused(bad: float) -> None:
    weight = torch.zeros(1, 64)
    weight[0, 3] = bad
    with pytest.raises(InputError, match="float16"):
        scales_and_zeros(*group_range(weight, 64), 4, sym=False)


@pytest.mark.parametrize("n", [8, 64, 200])
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_int4_kernel_and_unpacking_agree(n: int, rows: int) -> None:
    result = quantized(n, 256, 64, sym=False)
    geometry = awq_gemm(n, 256, 64)
    parts = codec("awq").pack(result, geometry)
    assert {part.suffix: tuple(parts[part.suffix].shape) for part in geometry.parts} == {
        part.suffix: geometry.shape(part) for part in geometry.parts
    }
    exact = load_linear(geometry, parts, dtype=torch.float32)
    fast = load_linear(geometry, parts, dtype=torch.bfloat16)
    x = gaussian(rows, 256, seed=1)
    reference = x.to(torch.bfloat16).float() @ exact.weight().T
    assert torch.equal(exact(x), x @ dequantize(result.codes, result.scales, result.zeros).T)
    assert float((fast(x.to(torch.bfloat16)).float() - reference).norm() / reference.norm()) < 6e-3
    assert fast.nbytes < 2 * n * 256 or n % 64  # short of a block of 64 rows, the padding may cost more than it saves


def test_awq_codec_round_trips_bytes() -> None:
    result = quantized(24, 128, 32, sym=False)
    geometry = awq_gemm(24, 128, 32)
    parts = codec("awq").pack(result, geometry)
    again = codec("awq").pack(codec("awq").unpack(parts, geometry), geometry)
    assert all(torch.equal(parts[suffix], again[suffix]) for suffix in parts)
