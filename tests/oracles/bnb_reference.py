"""bitsandbytes' own quantizers over files; runs in the bitsandbytes environment, which has no quantkit.

    bnb_reference.py quantize IN OUT SETTING...   every NAME [N, K] of IN: a SETTING is nf4-64, nf4-64-nested, fp4-128 ..., or int8
    bnb_reference.py multiply IN OUT              IN: NAME.x [T, K], NAME.weight [N, K], NAME.threshold; through Linear8bitLt
    bnb_reference.py golden OUT

OUT of ``quantize`` holds, under SETTING/NAME., the tensors of a saved layer and ``dequantized``, what they decode to; of ``multiply``,
NAME.y. The golden file holds also each case's ``input``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def quantize(weight: Tensor, setting: str) -> Tensors:
    """The tensors that a layer with ``weight`` is saved as, and its weight decoded."""
    if setting == "int8":
        stored = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        scale = stored.SCB
        return {"weight": stored.data, "SCB": scale, "dequantized": functional.int8_vectorwise_dequant(stored.data, scale)}
    kind, block, *nested = setting.split("-")
    parameter = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, blocksize=int(block), compress_statistics=nested == ["nested"]
    ).to("cpu")
    state = parameter.quant_state
    return {"weight": parameter.data, **state.as_dict(packed=True), "dequantized": functional.dequantize_4bit(parameter.data, state)}


@torch.no_grad()
def multiply(x: Tensor, weight: Tensor, threshold: float) -> Tensor:
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    y: Tensor = layer.to("cpu").eval()(x)
    return y


def structured(kind: str) -> Tensor:
    """Blocks of 64: every codebook value, every float32 midpoint and its neighbours, zeros, one sign, tiny and huge values."""
    table = functional.get_4bit_type(kind, device="cpu")
    ascending = table.sort().values
    middles = (ascending[:-1] + ascending[1:]) / 2
    near = torch.cat([middles, middles.nextafter(torch.tensor(-2.0)), middles.nextafter(torch.tensor(2.0)), torch.ones(19)])
    rows = [2.0 * table.repeat(4), near, -near, torch.zeros(64), torch.full((64,), 0.5), 1e-39 * table.repeat(4), 3e38 * near]
    return torch.stack(rows)


def golden() -> Tensors:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(18, 100, generator=generator)  # 1800: no multiple of 64 or 256, rows cross blocks
    odd = torch.randn(5, 27, generator=generator)  # 135 elements: an odd number, and a short last block
    wide = torch.randn(65, 128, generator=generator) * torch.rand(65, 1, generator=generator).exp()  # 260 blocks of 32: nested_absmax [2]
    ends = torch.cat([odd, torch.zeros(3, 27)])  # 216: the last block of 64 holds zeros alone
    exact = torch.stack([torch.tensor([1.0, -2.0, 0.5, 0.25]), torch.tensor([0.1, 0.2, -0.3, 0.4]), torch.zeros(4)])
    cases: list[tuple[str, Tensor, list[str]]] = [
        ("normal_f32", normal, ["nf4-64", "fp4-64", "nf4-32-nested", "nf4-256", "fp4-128-nested", "int8"]),
        ("normal_bf16", normal.bfloat16(), ["nf4-64", "nf4-128-nested", "fp4-64", "int8"]),
        ("normal_f16", normal.half(), ["nf4-64", "nf4-4096-nested", "fp4-256", "int8"]),
        ("odd_bf16", odd.bfloat16(), ["nf4-64", "fp4-64-nested", "nf4-128"]),
        ("ends_f32", ends, ["nf4-64", "nf4-64-nested", "fp4-64"]),
        ("wide_bf16", wide.bfloat16(), ["nf4-32-nested", "fp4-32-nested"]),
        ("nf4_f32", structured("nf4"), ["nf4-64"]),
        ("fp4_f32", structured("fp4"), ["fp4-64"]),
        ("zeros_f32", torch.zeros(2, 64), ["nf4-64-nested"]),
        ("exact_f32", exact, ["int8"]),
    ]
    made = {f"{case}.input": weight for case, weight, _ in cases}
    for case, weight, settings in cases:
        for setting in settings:
            made |= {f"{setting}/{case}.{part}": value for part, value in quantize(weight.clone(), setting).items()}
    x = torch.randn(7, 100, generator=generator)
    x[2, 40], x[5, 3], x[6] = 9.0, -6.0, 0.0
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        for threshold in (6.0, 0.0):
            made[f"multiply/{name}-{threshold:.0f}.x"] = x.to(dtype)
            made[f"multiply/{name}-{threshold:.0f}.y"] = multiply(x.to(dtype), normal.to(dtype), threshold)
    return made


def by_case(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """``CASE.name`` -> tensor as case -> name -> tensor."""
    cases: dict[str, Tensors] = {}
    for key, value in tensors.items():
        case, _, name = key.rpartition(".")
        cases.setdefault(case, {})[name] = value
    return cases


def main(task: str, *arguments: str) -> None:
    if task == "golden":
        metadata = {"source": f"bitsandbytes {version('bitsandbytes')} on a CPU: Params4bit, Int8Params, Linear8bitLt"}
        Path(arguments[0]).write_bytes(save({name: value.clone().contiguous() for name, value in golden().items()}, metadata))
        return
    source, out, *settings = arguments
    given = load_file(source)
    if task == "multiply":
        made = {f"{case}.y": multiply(parts["x"], parts["weight"], float(parts["threshold"])) for case, parts in by_case(given).items()}
    else:
        made = {
            f"{setting}/{name}.{part}": value.clone()
            for setting in settings
            for name, weight in given.items()
            for part, value in quantize(weight.clone(), setting).items()
        }
    save_file({name: value.contiguous() for name, value in made.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
