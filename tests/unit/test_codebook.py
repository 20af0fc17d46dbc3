"""NF4, FP4 and double quantization against bytes that bitsandbytes made, the format's own vectors and plain definitions."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quantkit.errors import InputError
from quantkit.formats.quant_state import parse_quant_state, quant_state_json
from quantkit.geometry import BNB_BLOCKS
from quantkit.ops import codebook
from quantkit.ops.codebook import (
    CODEBOOKS,
    NESTED_MAP,
    ZERO_CODE,
    dequantize_4bit,
    dequantize_absmax,
    midpoints,
    pack_nibbles,
    quantize_4bit,
    quantize_absmax,
    unpack_nibbles,
)
from quantkit.ops.dtypes import as_bytes

GOLDEN = load_file(Path(__file__).parent.parent / "data" / "bnb_golden.safetensors")
CASES = sorted({key.rpartition(".")[0].partition(".")[0] for key in GOLDEN if key.startswith(("nf4-", "fp4-"))})
THRESHOLDS = (
    "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff 3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da"
)


def words(values: Tensor) -> str:
    return " ".join(f"{value & 0xFFFFFFFF:08x}" for value in values.view(torch.int32).tolist())


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert bytes(as_bytes(got)) == bytes(as_bytes(want))


def golden(case: str) -> dict[str, Tensor]:
    parts = {key.removeprefix(f"{case}."): value for key, value in GOLDEN.items() if key.startswith(f"{case}.")}
    return parts | {"input": GOLDEN[f"{case.partition('/')[2]}.input"]}


def test_tables_are_the_constants_of_the_format() -> None:
    digests = {name: hashlib.sha256(as_bytes(table)).hexdigest() for name, table in (*CODEBOOKS.items(), ("map", NESTED_MAP))}
    assert digests["nf4"] == "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
    assert digests["map"] == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert words(midpoints(CODEBOOKS["nf4"])) == THRESHOLDS
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    assert torch.equal(CODEBOOKS["fp4"], torch.cat([magnitudes, -magnitudes]))
    assert all(CODEBOOKS[kind][code] == 0 for kind, code in ZERO_CODE.items())


def test_the_golden_cases_hold_what_a_wrong_quantizer_would_miss() -> None:
    assert {case.partition("_")[2] for case in CASES} >= {"f32", "f16", "bf16"}
    assert any(golden(case)["input"].numel() % 2 for case in CASES)
    assert any(golden(case)["nested_absmax"].numel() > 1 for case in CASES if "nested" in case)


@pytest.mark.parametrize("case", CASES)
def test_stores_the_bytes_of_the_reference_and_decodes_them_to_its_weight(case: str) -> None:
    want, (kind, block) = golden(case), case.partition("/")[0].split("-")[:2]
    weight, block_size = want["input"], int(block)
    codes, absmax = quantize_4bit(weight, kind, block_size)
    assert_same_bits(pack_nibbles(codes, ZERO_CODE[kind]).unsqueeze(1), want["weight"])
    assert torch.equal(unpack_nibbles(want["weight"], weight.numel()), codes)
    offset = None
    if "nested_absmax" in want:
        q8, nested, mean = quantize_absmax(absmax)
        assert_same_bits(q8, want["absmax"])
        assert_same_bits(nested, want["nested_absmax"])
        assert_same_bits(NESTED_MAP, want["nested_quant_map"])
        absmax, offset = dequantize_absmax(q8, nested, mean, NESTED_MAP), float(mean)
    else:
        assert_same_bits(absmax, want["absmax"])
    assert_same_bits(CODEBOOKS[kind], want["quant_map"])
    state = bytes(as_bytes(want[f"quant_state.bitsandbytes__{kind}"]))
    n, k = weight.shape
    assert quant_state_json(kind, block_size, str(weight.dtype).removeprefix("torch."), (n, k), offset) == state
    assert parse_quant_state(state, "x").nested_offset == offset
    decoded = dequantize_4bit(codes, absmax, CODEBOOKS[kind], block_size, weight.dtype).view(weight.shape)
    assert torch.equal(decoded, want["dequantized"])  # equal, not the same bits: the reference decodes FP4's code 8 to -0


def test_follows_the_vectors_of_the_format() -> None:
    table, places = CODEBOOKS["nf4"], torch.arange(64)
    weight = torch.stack([2.0 * table[places % 16], 0.5 * table[7 * places % 16]])
    codes, absmax = quantize_4bit(weight, "nf4", 64)
    packed = pack_nibbles(codes, 7)
    assert bytes(as_bytes(packed[:8])).hex() == "0123456789abcdef"
    assert bytes(as_bytes(packed[32:40])).hex() == "07e5c3a18f6d4b29"
    assert absmax.tolist() == [2.0, 0.5]
    q8, nested, offset = quantize_absmax(absmax)
    assert (q8.tolist(), nested.tolist(), offset.item()) == ([255, 0], [0.75], 1.25)
    assert dequantize_absmax(q8, nested, offset, NESTED_MAP).tolist() == pytest.approx([2.0, 0.505273], abs=1e-6)
    q8, nested, offset = quantize_absmax(torch.tensor([1.0, 2.0, 4.0]))
    assert q8.tolist() == [14, 56, 255]
    assert dequantize_absmax(q8, nested, offset, NESTED_MAP).tolist() == pytest.approx([1.0065, 1.9909, 4.0], abs=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("chunk", [4096, 1 << 22])
def test_takes_the_nearest_value_whatever_is_held_at_a_time(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "_CHUNK", chunk)
    weight = torch.randn(130, 77, generator=torch.Generator().manual_seed(1))
    for block in BNB_BLOCKS:
        codes, absmax = quantize_4bit(weight, kind, block)
        scale = absmax.double().repeat_interleave(block)[: weight.numel()]
        distance = (weight.double().view(-1) / scale).unsqueeze(1).sub(CODEBOOKS[kind].double()).abs()
        chosen = distance.gather(1, codes.long().unsqueeze(1)).squeeze(1)
        assert float((chosen - distance.amin(1)).max()) < 1e-6
        decoded = dequantize_4bit(codes, absmax, CODEBOOKS[kind], block, torch.float64)
        assert torch.equal(decoded, (CODEBOOKS[kind][codes.long()] * scale.float()).double())


def test_zeros_take_the_code_of_zero() -> None:
    for kind, code in ZERO_CODE.items():
        codes, absmax = quantize_4bit(torch.zeros(3, 50), kind, 64)
        assert set(codes.tolist()) == {code}
        assert absmax[:2].tolist() == [0, 0] and 0 < absmax[2] < 1.1e-38  # a short block of zeros is not 0: the reference's own
        assert not dequantize_4bit(codes, absmax, CODEBOOKS[kind], 64, torch.bfloat16).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.sampled_from([32, 64, 128]), st.integers(0, 99))
def test_a_cut_of_the_blocks_decodes_to_the_cut_of_the_weight(first: int, count: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(320, block, generator=generator).bfloat16()
    codes, absmax = quantize_4bit(weight, "nf4", block)
    q8, nested, offset = quantize_absmax(absmax)
    whole = dequantize_absmax(q8, nested, offset, NESTED_MAP)
    index = torch.arange(320)[first : first + count]
    part = dequantize_absmax(q8[index], nested, offset, NESTED_MAP, index)
    assert_same_bits(part, whole[index])
    pair = torch.stack([index, index.flip(0)], 1)  # blocks of a rank lie in rows and columns
    assert_same_bits(dequantize_absmax(q8[pair], nested, offset, NESTED_MAP, pair), whole[pair])
    cut = quantize_4bit(weight[index], "nf4", block)
    assert torch.equal(cut[0].view(-1, block), codes.view(-1, block)[index]) and torch.equal(cut[1], absmax[index])


def test_double_quantization_stays_within_a_step_of_its_map() -> None:
    absmax = torch.rand(5000, generator=torch.Generator().manual_seed(3)) + 0.5
    q8, nested, offset = quantize_absmax(absmax)
    error = (dequantize_absmax(q8, nested, offset, NESTED_MAP) - absmax).abs()
    bound = nested.repeat_interleave(256)[:5000] * 0.5 * NESTED_MAP.diff().max()
    assert (error <= bound * 1.01 + 1e-6).all()
    assert not set(range(124, 131)) & set(q8.tolist())


def test_double_quantization_rounds_to_the_grid_of_the_reference() -> None:
    steps = torch.tensor([-1.0, 1.0, 0.0, 2**-15, -(2**-15), 2**-14, -(2**-14), 2**-16, -(2**-16)])
    q8, _, offset = quantize_absmax(1 + steps)
    assert offset.item() == 1.0
    assert q8.tolist() == [0, 255, 131, 132, 123, 133, 122, 131, 123]  # by midpoints: 0, 255, 127, 131, 123, 133, 121, 131, 123


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 99])
def test_refuses_weights_that_are_not_finite(bad: float, place: int) -> None:
    weight = torch.ones(100)
    weight[place] = bad
    with pytest.raises(InputError, match="finite"):
        quantize_4bit(weight, "nf4", 64)


@given(st.lists(st.integers(0, 15), max_size=40))
def test_nibbles_round_trip(codes: list[int]) -> None:
    flat = torch.tensor(codes, dtype=torch.uint8)
    packed = pack_nibbles(flat, 7)
    assert packed.tolist() == [16 * high + low for high, low in zip((*codes, 7)[::2], (*codes, 7)[1::2], strict=False)]
    assert torch.equal(unpack_nibbles(packed, len(codes)), flat)
