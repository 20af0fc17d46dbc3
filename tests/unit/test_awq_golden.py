"""Our AWQ codec against tensors that AutoAWQ's own packer made; ``make -C tests/oracles golden`` makes them again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.geometry import Geometry, geometry_of
from quantkit.layouts.awq import unpack_words
from quantkit.layouts.base import GroupedInt
from quantkit.layouts.registry import codec
from quantkit.ops.dtypes import as_bytes
from quantkit.scheme import LinearScheme

GOLDEN = Path(__file__).parent.parent / "data" / "awq_golden.safetensors"
STORED = ("qweight", "qzeros", "scales", "bias")


def golden(case: str) -> dict[str, Tensor]:
    return {name.partition(".")[2]: value for name, value in load_file(GOLDEN).items() if name.startswith(f"{case}.")}


def geometry_for(parts: dict[str, Tensor]) -> Geometry:
    (k, _), (groups, n) = parts["qweight"].shape, parts["scales"].shape
    return geometry_of(LinearScheme("awq", "awq", 4, k // groups), n, k, dtype="F16", bias="bias" in parts)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert bytes(as_bytes(got)) == bytes(as_bytes(want))


def codes_of(parts: dict[str, Tensor]) -> Tensor:
    """Codes ``[K, N]`` by the definition ``w = scale * (code - zero)``, from the reference's weight alone."""
    group = parts["weight"].shape[0] // parts["scales"].shape[0]
    scales, zeros = (parts[name].double().repeat_interleave(group, 0) for name in ("scales", "zeros"))
    return ((parts["weight"].double() / scales).round() + zeros).to(torch.uint8)


@pytest.mark.parametrize("case", ["normal", "ends"])
def test_packs_to_the_bytes_of_the_reference(case: str) -> None:
    parts = golden(case)
    codes = codes_of(parts)
    assert (int(codes.min()), int(codes.max())) == (0, 15)
    ours = codec("awq").pack(GroupedInt(codes.T, parts["scales"].T, parts["zeros"].T, 4, parts.get("bias")), geometry_for(parts))
    assert ours.keys() == parts.keys() & set(STORED)
    for name, value in ours.items():
        assert_same_bits(value, parts[name])


@pytest.mark.parametrize("case", ["normal", "ends"])
def test_reads_the_weight_of_the_reference_bit_for_bit(case: str) -> None:
    parts = golden(case)
    geometry = geometry_for(parts)
    assert {part.suffix: geometry.shape(part) for part in geometry.parts} == {
        name: tuple(parts[name].shape) for name in STORED if name in parts
    }
    assert_same_bits(unpack_words(parts["qzeros"]), parts["zeros"])
    assert_same_bits(codec("awq").dequant(parts, geometry, torch.float16).T.contiguous(), parts["weight"])
    unpacked = codec("awq").unpack(parts, geometry)
    for name, value in codec("awq").pack(unpacked, geometry).items():
        assert_same_bits(value, parts[name])


def test_the_cases_hold_what_a_wrong_codec_would_miss() -> None:
    ends, normal = golden("ends"), golden("normal")
    assert set(range(16)) == set(ends["zeros"].flatten().tolist())
    assert (ends["qweight"] < 0).any() and (ends["qzeros"] < 0).any()  # a high nibble over 7 sets the sign bit of its word
    assert "bias" in normal and "bias" not in ends
    assert normal["scales"].shape[0] == 3  # groups of another number than words or outputs
