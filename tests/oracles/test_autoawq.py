"""AutoAWQ's packer and unpacker against our codec: the same bytes, the same bits, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.geometry import Geometry, geometry_of
from quantkit.layouts.base import GroupedInt
from quantkit.layouts.registry import codec
from quantkit.ops.dtypes import as_bytes
from quantkit.scheme import LinearScheme

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]

GOLDEN = Path(__file__).parent.parent / "data" / "awq_golden.safetensors"
Parts = dict[str, Tensor]


class Runs(Protocol):
    def run(self, *arguments: object) -> None: ...


@dataclass(frozen=True)
class Case:
    """A linear ``[n, k]`` in groups; AutoAWQ's packer takes multiples of 32 outputs."""

    n: int
    k: int
    group: int
    sym: bool = False
    bias: bool = False

    @property
    def geometry(self) -> Geometry:
        return geometry_of(LinearScheme("awq", "awq", 4, self.group), self.n, self.k, dtype="F16", bias=self.bias)


CASES = {
    "group 128": Case(96, 256, 128, bias=True),
    "group 64": Case(192, 576, 64),
    "group 32": Case(32, 96, 32),
    "one group": Case(64, 160, 160),
    "symmetric": Case(64, 256, 64, sym=True, bias=True),
    "many groups": Case(32, 1536, 8),
}


def random_result(case: Case, seed: int) -> GroupedInt:
    """Any codes and zero points, scales from 2^-12 to 2^4."""
    draw = torch.Generator().manual_seed(seed)
    groups = case.k // case.group
    scales = (torch.rand(case.n, groups, generator=draw) * 16 - 12).exp2().half()
    zeros = torch.randint(0, 16, (case.n, groups), generator=draw, dtype=torch.uint8)
    codes = torch.randint(0, 16, (case.n, case.k), generator=draw, dtype=torch.uint8)
    bias = torch.randn(case.n, generator=draw).half() if case.bias else None
    return GroupedInt(codes, scales, torch.full_like(zeros, 8) if case.sym else zeros, 4, bias)


def ask(oracle: Runs, task: str, cases: Mapping[str, Mapping[str, Tensor]], folder: Path) -> dict[str, Parts]:
    """What the reference answers to ``task``, by case."""
    given = {f"{case}.{name}": value.contiguous() for case, parts in cases.items() for name, value in parts.items()}
    save_file(given, folder / f"{task}-in.safetensors")
    oracle.run(task, folder / f"{task}-in.safetensors", folder / f"{task}-out.safetensors")
    answer = load_file(folder / f"{task}-out.safetensors")
    found: dict[str, Parts] = {case: {} for case in cases}
    for key, value in answer.items():
        case, _, name = key.partition(".")
        found[case][name] = value
    return found


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert bytes(as_bytes(got.contiguous())) == bytes(as_bytes(want.contiguous()))


def assert_same_parts(got: Mapping[str, Tensor], want: Mapping[str, Tensor], case: Case) -> None:
    suffixes = {part.suffix for part in case.geometry.parts}
    assert suffixes == got.keys() & (suffixes | {"bias"})
    for suffix in suffixes:
        assert_same_bits(got[suffix], want[suffix])


@pytest.fixture(scope="module")
def ours() -> dict[str, Parts]:
    return {name: codec("awq").pack(random_result(case, seed), case.geometry) for seed, (name, case) in enumerate(CASES.items())}


@pytest.fixture(scope="module")
def packed(autoawq: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    """Our float16 weights on their grids, packed by the reference."""
    given = {}
    for seed, (name, case) in enumerate(CASES.items()):
        result = random_result(case, seed)
        weight = codec("awq").dequant(codec("awq").pack(result, case.geometry), case.geometry, torch.float16)
        given[name] = {"weight": weight, "scales": result.scales.T, "zeros": result.zeros.T}
        if result.bias is not None:
            given[name]["bias"] = result.bias
    return ask(autoawq, "pack", given, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def dequantized(autoawq: Runs, ours: dict[str, Parts], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    return ask(autoawq, "dequantize", ours, tmp_path_factory.mktemp("dequantized"))


@pytest.fixture(scope="module")
def quantized(autoawq: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    """Gaussian weights with grids that the reference chose."""
    given = {}
    for seed, (name, case) in enumerate(CASES.items()):
        draw = torch.Generator().manual_seed(seed)
        given[name] = {"weight": torch.randn(case.n, case.k, generator=draw), "group_size": torch.tensor(case.group)}
        if case.bias:
            given[name]["bias"] = torch.randn(case.n, generator=draw)
    return ask(autoawq, "quantize", given, tmp_path_factory.mktemp("quantized"))


@pytest.mark.parametrize("name", CASES)
def test_the_reference_packs_to_our_bytes(name: str, ours: dict[str, Parts], packed: dict[str, Parts]) -> None:
    assert_same_parts(packed[name], ours[name], CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_reference_reads_our_weight(name: str, ours: dict[str, Parts], dequantized: dict[str, Parts]) -> None:
    weight = codec("awq").dequant(ours[name], CASES[name].geometry, torch.float16)
    assert_same_bits(dequantized[name]["weight"], weight.T)


@pytest.mark.parametrize("name", CASES)
def test_we_read_what_the_reference_quantized(name: str, quantized: dict[str, Parts]) -> None:
    parts, geometry = quantized[name], CASES[name].geometry
    assert_same_bits(codec("awq").dequant(parts, geometry, torch.float16).T, parts["weight"])
    result = codec("awq").unpack(parts, geometry)
    assert_same_bits(result.zeros.T, parts["zeros"])
    assert_same_parts(codec("awq").pack(result, geometry), parts, CASES[name])


def test_the_reference_reads_every_linear_of_an_artifact(autoawq: Runs, artifact: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = load_file(artifact("llama") / "model.safetensors")
    paths = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(paths) == 28
    linears = {str(i): {s: tensors[f"{path}.{s}"] for s in ("qweight", "qzeros", "scales")} for i, path in enumerate(paths)}
    for number, answer in ask(autoawq, "dequantize", linears, tmp_path).items():
        parts = linears[number]
        n, k = parts["scales"].shape[1], parts["qweight"].shape[0]
        geometry = geometry_of(LinearScheme("awq", "awq", 4, 64), n, k, dtype="BF16")
        assert_same_bits(answer["weight"], codec("awq").dequant(parts, geometry, torch.float16).T)


def test_the_golden_file_is_what_the_reference_makes_today(autoawq: Runs, tmp_path: Path) -> None:
    autoawq.run("golden", tmp_path / "golden.safetensors")
    assert (tmp_path / "golden.safetensors").read_bytes() == GOLDEN.read_bytes()
