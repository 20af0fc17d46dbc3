"""Shapes, bytes, granules and cuts of the layouts, against the numbers of formats.md."""

from __future__ import annotations

import pytest

from quantkit.errors import InputError
from quantkit.geometry import DTYPE_BYTES, LAYOUTS, WHOLE, Axis, Geometry, Part


def _part(geometry: Geometry, suffix: str) -> Part:
    return next(part for part in geometry.parts if part.suffix == suffix)


def test_awq_shapes_and_bytes_follow_the_format() -> None:
    n, k, g = 11008, 4096, 128
    geometry = LAYOUTS["awq"](n, k, dtype="BF16", group_size=g)
    assert {part.suffix: (part.dtype, geometry.shape(part)) for part in geometry.parts} == {
        "qweight": ("I32", (k, n // 8)),
        "qzeros": ("I32", (k // g, n // 8)),
        "scales": ("F16", (k // g, n)),
    }
    groups = k // g
    assert geometry.total_bytes == k * n // 2 + 2 * groups * n + groups * n // 2  # formats.md section 12


def test_bytes_of_llama_3_8b_match_the_published_table() -> None:
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    awq = sum(LAYOUTS["awq"](n, k, dtype="BF16", group_size=128).total_bytes for n, k in shapes) * 32
    plain = sum(LAYOUTS["plain"](n, k, dtype="BF16").total_bytes for n, k in shapes) * 32
    assert (awq, plain) == (3_625_975_808, 13_958_643_712)


@pytest.mark.parametrize(("group", "granule", "groups"), [(128, 128, 2), (32, 32, 8), (-1, 1, 1), (256, 1, 1)])
def test_a_group_as_long_as_the_row_is_never_cut(group: int, granule: int, groups: int) -> None:
    geometry = LAYOUTS["awq"](64, 256, dtype="F16", group_size=group)
    assert (geometry.granule("N"), geometry.granule("K")) == (8, granule)
    assert geometry.shape(_part(geometry, "scales")) == (groups, 64)
    half = geometry.cut(range(64), range(128, 256))
    assert half.shape(_part(half, "scales")) == (max(1, groups // 2), 64)
    assert geometry.slices(_part(geometry, "scales"), range(64), range(128, 256))[0] == slice(groups // 2, groups or 1)


def test_packed_words_are_granules_even_when_one_word_is_the_whole_row() -> None:
    geometry = LAYOUTS["awq"](8, 64, dtype="F16", group_size=64)
    assert geometry.granule("N") == 8
    with pytest.raises(InputError, match="falls inside a granule, expected multiples of 8"):
        geometry.cut(range(4), range(64))


def test_plain_is_cut_anywhere_and_bias_only_along_n() -> None:
    geometry = LAYOUTS["plain"](7, 5, dtype="BF16", bias=True)
    assert (geometry.granule("N"), geometry.granule("K")) == (1, 1)
    assert geometry.slices(_part(geometry, "weight"), range(2, 3), range(1, 4)) == (slice(2, 3), slice(1, 4))
    assert geometry.slices(_part(geometry, "bias"), range(2, 3), range(1, 4)) == (slice(2, 3),)
    assert geometry.total_bytes == 2 * 7 * 5 + 2 * 7


def test_empty_cuts_are_legal_and_hold_nothing_along_the_cut_dim() -> None:
    geometry = LAYOUTS["awq"](64, 256, dtype="F16", group_size=64)
    nothing = geometry.cut(range(64, 64), range(256))
    assert nothing.total_bytes == 0
    no_inputs = geometry.cut(range(64), range(128, 128))
    assert [no_inputs.shape(part)[0] for part in no_inputs.parts] == [0, 0, 0]


@pytest.mark.parametrize(("n", "k"), [(range(64), range(257)), (range(-8, 8), range(256)), (range(0, 64, 2), range(256))])
def test_cuts_outside_the_linear_are_refused(n: range, k: range) -> None:
    with pytest.raises(InputError, match="expected a range inside"):
        LAYOUTS["plain"](64, 256, dtype="F16").cut(n, k)


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
        LAYOUTS["awq"](n, k, dtype="F16", group_size=group)


def test_granule_is_the_least_common_multiple_over_parts() -> None:
    parts = (Part("a", "U8", (Axis("N", 6), Axis("K", WHOLE))), Part("b", "U8", (Axis("N", 4), Axis("K", 10))))
    geometry = Geometry("made up", 24, 40, parts)
    assert (geometry.granule("N"), geometry.granule("K")) == (12, 10)
    assert [geometry.shape(part) for part in parts] == [(4, 1), (6, 4)]
    assert DTYPE_BYTES["U8"] == 1
