"""Codes in 32-bit words, against the vectors of the formats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.layouts.words import pack_rows, unpack_rows


def column(codes: list[int]) -> Tensor:
    return torch.tensor(codes, dtype=torch.uint8).unsqueeze(1)


def words(codes: list[int], bits: int) -> list[int]:
    return [int(word) & 0xFFFFFFFF for word in pack_rows(column(codes), bits)[:, 0]]


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (4, [k % 16 for k in range(16)], [0x76543210, 0xFEDCBA98]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]),
        (4, [8] * 8, [0x88888888]),
        (4, [9] * 12, [0x99999999, 0x00009999]),
        (8, [0, 127, 128, 255], [0xFF807F00]),
        (8, [127] * 4, [0x7F7F7F7F]),
        (3, [k % 8 for k in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (3, [3] * 32, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
    ],
)
def test_words_are_those_of_the_format(bits: int, codes: list[int], expected: list[int]) -> None:
    assert words(codes, bits) == expected
    assert unpack_rows(pack_rows(column(codes), bits), bits, len(codes))[:, 0].tolist() == codes


@settings(deadline=None)
@given(st.data(), st.sampled_from([2, 3, 4, 8]))
def test_any_codes_come_back_and_take_no_more_words_than_their_bits(data: st.DataObject, bits: int) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=100))
    found = words(codes, bits)
    assert len(found) == -(-len(codes) * bits // 32)
    stream = sum(code << (bits * index) for index, code in enumerate(codes))
    assert found == [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(len(found))]
    assert unpack_rows(pack_rows(column(codes), bits), bits, len(codes))[:, 0].tolist() == codes
