"""AutoAWQ's own packer and unpacker over files; runs in the autoawq environment, which has no quantkit.

    awq_reference.py quantize IN OUT     IN: NAME.weight [N, K], NAME.group_size, maybe NAME.bias. Its asymmetric quantizer, then pack.
    awq_reference.py pack IN OUT         IN: NAME.weight [N, K], NAME.scales [G, N], NAME.zeros [G, N], maybe NAME.bias.
    awq_reference.py dequantize IN OUT   IN: NAME.qweight, NAME.qzeros, NAME.scales.
    awq_reference.py golden OUT
    awq_reference.py golden-gemv OUT     `version: "gemv"`; AutoAWQ unpacks it on a GPU alone, so ``weight`` is what was packed

OUT holds, per NAME, what was stored (qweight, qzeros, scales, bias), the weight [K, N] that it stands for, and its zeros [G, N] unpacked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from awq.modules.linear.gemm import WQLinear_GEMM  # type: ignore[import-not-found]
from awq.modules.linear.gemv import WQLinear_GEMV  # type: ignore[import-not-found]
from awq.quantize.quantizer import AwqQuantizer  # type: ignore[import-not-found]
from awq.utils.packing_utils import dequantize_gemm  # type: ignore[import-not-found]
from safetensors.torch import load_file, save, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
BITS = 4


def dequantize(parts: Mapping[str, Tensor]) -> Tensor:
    """The weight ``[K, N]`` of stored parts, in float16."""
    group = parts["qweight"].shape[0] // parts["scales"].shape[0]
    weight: Tensor = dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], BITS, group)
    return weight


def pack(given: Mapping[str, Tensor]) -> Tensors:
    """What the packer stores of a float16 weight on the grid that scales and zeros state, and its weight."""
    weight, scales = given["weight"].half(), given["scales"].half()
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in given, dtype=torch.float16)
    linear.weight.data = weight
    if "bias" in given:
        linear.bias.data = given["bias"].half()
    group = weight.shape[1] // scales.shape[0]
    packed = WQLinear_GEMM.from_linear(linear, BITS, group, scales=scales, zeros=given["zeros"].half())
    parts = {name: value.contiguous() for name, value in packed.named_buffers()}
    return {**parts, "zeros": given["zeros"].to(torch.uint8), "weight": dequantize(parts)}


def quantize(given: Mapping[str, Tensor]) -> Tensors:
    """The packer after AutoAWQ's own choice of scales and zeros."""
    settings = SimpleNamespace(group_size=int(given["group_size"]), w_bit=BITS, zero_point=True)
    weight, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(settings, given["weight"].half())
    return pack({**given, "weight": weight, "scales": scales.t().contiguous(), "zeros": zeros.t().contiguous()})


def golden() -> Tensors:
    """Two small linears: a Gaussian one with a bias, and one whose zero points and scales lie at their ends."""
    generator = torch.Generator().manual_seed(20)
    normal = torch.randn(64, 96, generator=generator).half()
    bias = torch.randn(64, generator=generator).half()
    codes = torch.randint(0, 16, (32, 64), generator=generator)
    zeros = (5 * torch.arange(64) % 16).reshape(2, 32)
    scales = torch.tensor([2.0**-13, 0.0137, 1.0, 1000.0], dtype=torch.float16).repeat_interleave(16).reshape(2, 32)
    zero, scale = (part.repeat_interleave(32, 0).T for part in (zeros, scales))  # [N, K]
    ends = (codes - zero).half() * scale
    cases = {
        "normal": quantize({"weight": normal, "group_size": torch.tensor(32), "bias": bias}),
        "ends": pack({"weight": ends, "scales": scales, "zeros": zeros}),
    }
    return {f"{case}.{name}": value.contiguous() for case, parts in cases.items() for name, value in parts.items()}


def golden_gemv() -> Tensors:
    """Groups of 32, 64 and 128, whose zero points are padded to 4, 2 and 1 words; ten groups for a second word; one with a bias."""
    generator = torch.Generator().manual_seed(21)
    made: Tensors = {}
    for n, k, group in ((16, 64, 32), (24, 192, 64), (8, 256, 128), (8, 320, 32)):
        codes = torch.randint(0, 16, (n, k), generator=generator)
        zeros = torch.randint(0, 16, (n, k // group), generator=generator)
        scales = (torch.randint(1024, 2048, zeros.shape, generator=generator) * 2.0**-18).half()
        zero, scale = (part.repeat_interleave(group, 1) for part in (zeros, scales))
        linear = torch.nn.Linear(k, n, bias=group == 64, dtype=torch.float16)
        linear.weight.data = (codes - zero).half() * scale
        if linear.bias is not None:
            linear.bias.data = torch.randn(n, generator=generator).half()
        packed = WQLinear_GEMV.from_linear(linear, BITS, group, scales=scales, zeros=zeros.half())
        parts = {
            "codes": codes.to(torch.uint8),
            "zeros": zeros.to(torch.uint8),
            "weight": linear.weight.data,
            **dict(packed.named_buffers()),
        }
        made |= {f"g{group}-k{k}.{name}": value.contiguous() for name, value in parts.items()}
    return made


def by_case(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """``CASE.name`` -> tensor as case -> name -> tensor."""
    cases: dict[str, Tensors] = {}
    for key, value in tensors.items():
        case, _, name = key.partition(".")
        cases.setdefault(case, {})[name] = value
    return cases


TASKS: Mapping[str, Callable[[Mapping[str, Tensor]], Tensors]] = {
    "pack": pack,
    "quantize": quantize,
    "dequantize": lambda parts: {"weight": dequantize(parts)},
}


def main(task: str, *paths: str) -> None:
    if task in ("golden", "golden-gemv"):
        by = "WQLinear_GEMM and dequantize_gemm" if task == "golden" else "WQLinear_GEMV"
        metadata = {"source": f"autoawq {version('autoawq')}, {by}"}
        Path(paths[0]).write_bytes(save(golden() if task == "golden" else golden_gemv(), metadata))
        return
    source, out = paths
    work = TASKS[task]
    made = {case: work(given) for case, given in by_case(load_file(source)).items()}
    save_file({f"{case}.{name}": value.contiguous() for case, parts in made.items() for name, value in parts.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
