"""AutoGPTQ's packers and unpackers (v1) and gptqmodel's (v2) over files; runs in the gptqmodel environment, which has no quantkit.

    gptq_reference.py pack IN OUT     IN: NAME.weight [N, K], NAME.scales [G, N], NAME.zeros [G, N], NAME.bits, maybe NAME.g_idx [K].
    gptq_reference.py unpack IN OUT   IN: NAME.qweight, NAME.qzeros, NAME.scales, NAME.g_idx (v1), maybe NAME.v2 to say that it is that.
    gptq_reference.py golden OUT

OUT of ``pack`` holds, per NAME, the stored tensors, with ``qzeros_v2`` beside the v1 ``qzeros``; every OUT holds ``dense``, the float32
weight [K, N] that the reference multiplies by. AutoGPTQ's own package does not import today: its two modules are loaded by their paths.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # type: ignore[import-not-found]
from safetensors.torch import load_file, save, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
STORED = ("qweight", "qzeros", "scales", "g_idx")


def autogptq(module: str) -> Any:
    """The ``QuantLinear`` of one file of AutoGPTQ's wheel, which lies unpacked in the environment."""
    path = Path(sys.prefix) / "auto_gptq" / "nn_modules" / "qlinear" / f"{module}.py"
    spec = importlib.util.spec_from_file_location(module, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.QuantLinear


OLD, ACT_ORDER = autogptq("qlinear_cuda_old"), autogptq("qlinear_cuda")
"""The packer without ``g_idx`` and the one with it."""


def consecutive(g_idx: Tensor, groups: int) -> bool:
    size = -(-g_idx.numel() // groups)
    return g_idx.numel() % groups == 0 and torch.equal(g_idx, torch.arange(g_idx.numel(), dtype=g_idx.dtype) // size)


def new_linear(parts: Mapping[str, Tensor], bits: int, k: int, n: int) -> Any:
    """AutoGPTQ's layer for the scales and ``g_idx`` of ``parts``; the old one where groups are consecutive inputs."""
    groups = parts["scales"].shape[0]
    plain = "g_idx" not in parts or consecutive(parts["g_idx"], groups)
    return (OLD if plain else ACT_ORDER)(bits, -(-k // groups), k, n, False, weight_dtype=torch.float16)


def unpack(parts: Mapping[str, Tensor]) -> Tensors:
    """The weight of stored parts by the reference's own forward: in float32, one input at a time, so nothing is rounded."""
    k, n = parts["g_idx"].numel(), parts["scales"].shape[1]
    bits = parts["qweight"].shape[0] * 32 // k
    if "v2" in parts:
        groups = parts["scales"].shape[0]
        layer = TorchLinear(bits=bits, group_size=-(-k // groups), sym=False, desc_act=True, in_features=k, out_features=n)
    else:
        layer = new_linear(parts, bits, k, n)
    for name in STORED:
        setattr(layer, name, parts[name].clone())
    layer.scales = layer.scales.float()
    if "v2" in parts:
        layer.post_init()
        return {"dense": layer.dequantize_weight().contiguous()}
    return {"dense": layer(torch.eye(k))}


def pack(given: Mapping[str, Tensor]) -> Tensors:
    """What both references store of a float16 weight on the grid that scales and zeros state."""
    weight, bits = given["weight"].half(), int(given["bits"])
    n, k = weight.shape
    linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float16)
    linear.weight.data = weight
    groups = given["scales"].shape[0]
    g_idx = given.get("g_idx", torch.arange(k, dtype=torch.int32) // (k // groups))
    layer = new_linear(given, bits, k, n)
    grid = [given[name].half().T.contiguous() for name in ("scales", "zeros")]
    layer.pack(linear, *(part.clone() for part in grid), g_idx.clone())
    parts = {name: getattr(layer, name) for name in STORED}
    second = TorchLinear(bits=bits, group_size=k // groups, sym=False, desc_act=True, in_features=k, out_features=n)
    second.pack_original(linear, *(part.clone() for part in grid), g_idx.clone())
    for name in ("qweight", "scales", "g_idx"):
        if not torch.equal(getattr(second, name), parts[name]):
            raise AssertionError(f"{name}: gptqmodel and AutoGPTQ differ")
    made = {**parts, "qzeros_v2": second.qzeros, **unpack(parts)}
    if not torch.equal(unpack({**parts, "qzeros": second.qzeros, "v2": torch.tensor(2)})["dense"], made["dense"]):
        raise AssertionError("v1 and v2 stand for different weights")
    return made


def golden() -> Tensors:
    """Every bit width, symmetric and not, over scales that float16 and the arithmetic hold exactly; and one act-order."""
    generator = torch.Generator().manual_seed(30)
    k, n, group = 64, 32, 32
    made: Tensors = {}
    for bits in (2, 3, 4, 8):
        for kind in ("sym", "asym", "act") if bits == 4 else ("sym", "asym"):
            shape = (k // group, n)
            codes = torch.randint(0, 2**bits, (k, n), generator=generator)
            zeros = torch.full(shape, 2 ** (bits - 1))
            if kind != "sym":
                zeros = torch.randint(1, 2**bits, shape, generator=generator)
                zeros[0, :2] = torch.tensor([1, 2**bits - 1])
            scales = (torch.randint(1024, 2048, shape, generator=generator) * 2.0**-18).half()
            g_idx = torch.arange(k, dtype=torch.int32) // group
            given: Tensors = {"bits": torch.tensor(bits), "scales": scales, "zeros": zeros}
            if kind == "act":
                given["g_idx"] = g_idx = g_idx[torch.randperm(k, generator=generator)]
            index = g_idx.long()
            weight = scales.float()[index] * (codes - zeros[index])
            parts = pack({**given, "weight": weight.T})
            if not torch.equal(parts["dense"], weight):
                raise AssertionError(f"{bits} bits, {kind}: the packer lost codes")
            kept = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), **parts}
            made |= {f"{bits}-{kind}.{name}": value.contiguous() for name, value in kept.items()}
    return made


def by_case(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """``CASE.name`` -> tensor as case -> name -> tensor; a case may hold dots."""
    cases: dict[str, Tensors] = {}
    for key, value in tensors.items():
        case, _, name = key.rpartition(".")
        if case:
            cases.setdefault(case, {})[name] = value
    return cases


TASKS: Mapping[str, Callable[[Mapping[str, Tensor]], Tensors]] = {"pack": pack, "unpack": unpack}


@torch.no_grad()
def main(task: str, *paths: str) -> None:
    if task == "golden":
        by = f"auto-gptq 0.7.1, qlinear_cuda_old and qlinear_cuda; qzeros_v2: gptqmodel {version('gptqmodel')}, TorchLinear"
        metadata = {"source": by}
        Path(paths[0]).write_bytes(save(golden(), metadata))
        return
    source, out = paths
    cases = {case: given for case, given in by_case(load_file(source)).items() if "scales" in given}
    made = {case: TASKS[task](given) for case, given in cases.items()}
    save_file({f"{case}.{name}": value.contiguous() for case, parts in made.items() for name, value in parts.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
