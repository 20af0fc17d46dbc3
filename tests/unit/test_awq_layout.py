"""The AutoAWQ gemm layout: the words of the format's own vectors, shapes, and the law of the dequantized weight."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import InputError
from quantkit.geometry import Geometry, geometry_of
from quantkit.layouts.awq import AwqCodec, pack_words, unpack_words
from quantkit.layouts.base import GroupedInt
from quantkit.layouts.registry import codec
from quantkit.scheme import LinearScheme


def awq_gemm(n: int, k: int, group: int, bias: bool = False) -> Geometry:
    return geometry_of(LinearScheme("awq", "awq", 4, group), n, k, dtype="BF16", bias=bias)


def words_of(codes: list[int]) -> list[int]:
    return [int(word) & 0xFFFFFFFF for word in pack_words(torch.tensor([codes], dtype=torch.uint8))[0]]


def test_golden_words() -> None:
    assert words_of(list(range(8))) == [0x75316420]
    assert words_of(list(range(8, 16))) == [0xFDB9ECA8]
    assert words_of([8] * 8) == [0x88888888]
    assert words_of(list(range(16))) == [0x75316420, 0xFDB9ECA8]


def test_nibble_i_holds_element_order_i() -> None:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for nibble, element in enumerate(order):
        codes = [0] * 8
        codes[element] = 15
        assert words_of(codes) == [0xF << (4 * nibble)]


def test_every_word_unpacks_and_packs_again() -> None:
    words = torch.randint(-(2**31), 2**31, (5, 7), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    assert torch.equal(pack_words(unpack_words(words)), words)


def result(n: int, k: int, groups: int, bias: bool = False) -> GroupedInt:
    g = torch.Generator().manual_seed(1)
    return GroupedInt(
        codes=torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8),
        scales=(torch.rand(n, groups, generator=g) * 0.1 + 0.01).half(),
        zeros=torch.randint(0, 16, (n, groups), generator=g, dtype=torch.uint8),
        bits=4,
        bias=torch.randn(n, generator=g).bfloat16() if bias else None,
    )


@pytest.mark.parametrize(("n", "k", "groups"), [(16, 64, 2), (8, 64, 1), (40, 96, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_parts_have_the_names_dtypes_and_shapes_of_the_format(n: int, k: int, groups: int, bias: bool) -> None:
    geometry = awq_gemm(n, k, k // groups, bias)
    parts = codec("awq").pack(result(n, k, groups, bias), geometry)
    described = {suffix: (part.dtype, tuple(part.shape)) for suffix, part in parts.items()}
    expected = {
        "qweight": (torch.int32, (k, n // 8)),
        "qzeros": (torch.int32, (groups, n // 8)),
        "scales": (torch.float16, (groups, n)),
    }
    assert described == (expected | {"bias": (torch.bfloat16, (n,))} if bias else expected)
    assert {part.suffix: geometry.shape(part) for part in geometry.parts} == {suffix: shape for suffix, (_, shape) in described.items()}
    assert geometry.total_bytes == k * n // 2 + 2 * groups * n + groups * n // 2 + (2 * n if bias else 0)


def test_the_weight_is_scale_times_code_minus_zero_read_straight_from_the_words() -> None:
    found = result(16, 64, 2)
    geometry = awq_gemm(16, 64, 32)
    parts = codec("awq").pack(found, geometry)
    weight = AwqCodec().dequant(parts, geometry, torch.float64)
    place = [0, 4, 1, 5, 2, 6, 3, 7]
    for n, k in ((0, 0), (5, 31), (9, 32), (15, 63)):
        code = (int(parts["qweight"][k, n // 8]) >> (4 * place[n % 8])) & 15
        zero = (int(parts["qzeros"][k // 32, n // 8]) >> (4 * place[n % 8])) & 15
        assert float(weight[n, k]) == float(parts["scales"][k // 32, n]) * (code - zero)


def test_unpack_gives_back_the_neutral_result() -> None:
    found = result(24, 64, 4, bias=True)
    geometry = awq_gemm(24, 64, 16, bias=True)
    again = AwqCodec().unpack(codec("awq").pack(found, geometry), geometry)
    assert torch.equal(again.codes, found.codes) and torch.equal(again.scales, found.scales) and torch.equal(again.zeros, found.zeros)
    assert again.bias is not None and torch.equal(again.bias, found.bias)  # type: ignore[arg-type]


def test_it_holds_four_bits_only() -> None:
    found = result(8, 64, 2)
    with pytest.raises(InputError, match="layout awq: 8 bits, expected 4"):
        AwqCodec().pack(GroupedInt(found.codes, found.scales, found.zeros, 8), awq_gemm(8, 64, 32))


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(InputError, match="layout: 'gemv' is unknown, expected one of plain, transposed, awq, awq_gemv, gptq"):
        codec("gemv")
