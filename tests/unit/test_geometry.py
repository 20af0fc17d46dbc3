"""Shapes, bytes, granules and cuts of the layouts, against the numbers of formats.md."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantkit.errors import InputError
from quantkit.geometry import DTYPE_BYTES, GGML_BLOCKS, WHOLE, Axis, Geometry, Part, geometry_of, ggml_scheme, plain
from quantkit.scheme import KEEP, LinearScheme


def _part(geometry: Geometry, suffix: str) -> Part:
    return next(part for part in geometry.parts if part.suffix == suffix)


def awq(n: int, k: int, group: int, *, dtype: str = "F16") -> Geometry:
    return geometry_of(LinearScheme("awq", "awq", 4, group), n, k, dtype=dtype)


def test_awq_shapes_and_bytes_follow_the_format() -> None:
    n, k, g = 11008, 4096, 128
    geometry = awq(n, k, g)
    assert {part.suffix: (part.dtype, geometry.shape(part)) for part in geometry.parts} == {
        "qweight": ("I32", (k, n // 8)),
        "qzeros": ("I32", (k // g, n // 8)),
        "scales": ("F16", (k // g, n)),
    }
    groups = k // g
    assert geometry.total_bytes == k * n // 2 + 2 * groups * n + groups * n // 2  # formats.md section 12


LLAMA_3_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
REST = 2_101_878_784  # bf16 embedding, lm_head and norms


@pytest.mark.parametrize(
    ("scheme", "linears", "total"),
    [
        (KEEP, 13_958_643_712, 16_060_522_496),
        (LinearScheme("gptq", "gptq"), 3_630_956_544, 5_732_835_328),
        (LinearScheme("gptq", "gptq_v2"), 3_630_956_544, 5_732_835_328),
        (LinearScheme("awq", "awq"), 3_625_975_808, 5_727_854_592),
        (LinearScheme("rtn", "packed", sym=True), 3_598_716_416, 5_700_595_200),
        (LinearScheme("nf4", "bnb4", 4, 64, True, "F32", "nf4"), 3_925_882_880, 6_027_761_664),
        (LinearScheme("nf4", "bnb4", 4, 64, True, "F32", "nf4", double_quant=True), 3_600_660_480, 5_702_539_264),
        (LinearScheme("fp8", "fp8", 8, -1, True, "BF16"), 6_982_074_368, 9_083_953_152),
        (LinearScheme("w8a8", "int8", 8, -1, True, "BF16"), 6_982_074_368, 9_083_953_152),
        (LinearScheme("int8", "bnb8", 8, -1, True, "F32"), 6_984_827_104, 9_086_705_888),
    ],
    ids=lambda value: f"{value.layout}{'-nested' * value.double_quant}" if isinstance(value, LinearScheme) else None,
)
def test_bytes_of_llama_3_8b_match_the_published_table(scheme: LinearScheme, linears: int, total: int) -> None:
    def size(n: int, k: int) -> int:
        geometry = geometry_of(scheme, n, k, dtype="BF16")
        return sum(geometry.nbytes(part) for part in geometry.parts if not part.free)  # the table does not count the quant state

    found = sum(size(n, k) for n, k in LLAMA_3_8B) * 32
    assert (found, found + REST) == (linears, total)


@pytest.mark.parametrize(("group", "granule", "groups"), [(128, 128, 2), (32, 32, 8), (-1, 1, 1), (256, 1, 1)])
def test_a_group_as_long_as_the_row_is_never_cut(group: int, granule: int, groups: int) -> None:
    geometry = awq(64, 256, group)
    assert (geometry.granule("N"), geometry.granule("K")) == (8, granule)
    assert geometry.shape(_part(geometry, "scales")) == (groups, 64)
    half = geometry.cut(range(64), range(128, 256))
    assert half.shape(_part(half, "scales")) == (max(1, groups // 2), 64)
    assert geometry.slices(_part(geometry, "scales"), range(64), range(128, 256))[0] == slice(groups // 2, groups or 1)


def test_packed_words_are_granules_even_when_one_word_is_the_whole_row() -> None:
    geometry = awq(8, 64, 64)
    assert geometry.granule("N") == 8
    with pytest.raises(InputError, match="falls inside a granule, expected multiples of 8"):
        geometry.cut(range(4), range(64))


def test_plain_is_cut_anywhere_and_bias_only_along_n() -> None:
    geometry = plain(7, 5, dtype="BF16", bias=True)
    assert (geometry.granule("N"), geometry.granule("K")) == (1, 1)
    assert geometry.slices(_part(geometry, "weight"), range(2, 3), range(1, 4)) == (slice(2, 3), slice(1, 4))
    assert geometry.slices(_part(geometry, "bias"), range(2, 3), range(1, 4)) == (slice(2, 3),)
    assert geometry.total_bytes == 2 * 7 * 5 + 2 * 7


def test_empty_cuts_are_legal_and_hold_nothing_along_the_cut_dim() -> None:
    geometry = awq(64, 256, 64)
    nothing = geometry.cut(range(64, 64), range(256))
    assert nothing.total_bytes == 0
    no_inputs = geometry.cut(range(64), range(128, 128))
    assert [no_inputs.shape(part)[0] for part in no_inputs.parts] == [0, 0, 0]


@pytest.mark.parametrize(("n", "k"), [(range(64), range(257)), (range(-8, 8), range(256)), (range(0, 64, 2), range(256))])
def test_cuts_outside_the_linear_are_refused(n: range, k: range) -> None:
    with pytest.raises(InputError, match="expected a range inside"):
        plain(64, 256, dtype="F16").cut(n, k)


@pytest.mark.parametrize(
    ("n", "k", "group", "message"),
    [
        (64, 576, 128, "576 input features do not divide into groups of 128"),
        (64, 256, 0, "groups of 0"),
        (64, 256, -2, "groups of -2"),
        (60, 256, 64, "60 output features, expected a multiple of 8"),
    ],
)
def test_shapes_that_awq_cannot_hold_are_named(n: int, k: int, group: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        awq(n, k, group)


def test_granule_is_the_least_common_multiple_over_parts() -> None:
    parts = (Part("a", "U8", (Axis("N", 6), Axis("K", WHOLE))), Part("b", "U8", (Axis("N", 4), Axis("K", 10))))
    geometry = Geometry(KEEP, 24, 40, parts)
    assert (geometry.granule("N"), geometry.granule("K")) == (12, 10)
    assert [geometry.shape(part) for part in parts] == [(4, 1), (6, 4)]
    assert DTYPE_BYTES["U8"] == 1


# blocks of ggml


@pytest.mark.parametrize(
    ("kind", "bits"), [("Q4_0", 4.5), ("Q8_0", 8.5), ("Q2_K", 2.625), ("Q3_K", 3.4375), ("Q6_K", 6.5625), ("IQ4_XS", 4.25)]
)
def test_blocks_take_the_bits_of_their_type_and_are_cut_between_them(kind: str, bits: float) -> None:
    block = GGML_BLOCKS[kind]
    geometry = geometry_of(ggml_scheme(kind), 48, 768, dtype="F16")
    assert geometry.total_bytes * 8 == 48 * 768 * bits
    assert (geometry.granule("N"), geometry.granule("K")) == (1, block.elements)
    (part,) = geometry.parts
    assert geometry.slices(part, range(5, 7), range(256, 768)) == (
        slice(5, 7),
        slice(256 // block.elements * block.nbytes, geometry.shape(part)[1]),
    )
    with pytest.raises(InputError, match="inside a granule"):
        geometry.cut(range(48), range(16, 768))


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="576 input features do not divide into Q4_K blocks, expected a multiple of 256"):
        geometry_of(ggml_scheme("Q4_K"), 48, 576, dtype="F16")
    with pytest.raises(InputError, match="block type 'IQ2_S'"):
        geometry_of(replace(ggml_scheme("Q4_K"), code="IQ2_S"), 48, 512, dtype="F16")
