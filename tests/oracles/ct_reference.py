"""compressed-tensors' own compressors over files and artifacts; runs in the compressed-tensors environment, which has no quantkit.

    ct_reference.py golden OUT
    ct_reference.py decompress ARTIFACT OUT        OUT: NAME.weight [N, K] of every quantized linear, in float32 and in the scale's dtype
    ct_reference.py logits ARTIFACT IDS OUT        IDS is JSON, a list of token ids; through transformers on a CPU; facts in OUT with .json

The golden file holds, per case, the float ``input`` [N, K], the tensors of a saved layer, ``codes`` (int8 values or float8 bytes) and
``dense``, what the library decompresses them to. A case is named FORMAT-KIND, such as pack-int4-asym-group. Two more, token-int and
token-float, hold activations as a linear rounds them when it runs: ``input`` [T, K], ``scale`` [T, 1], and ``rounded``, codes times scales.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-not-found]
from compressed_tensors.compressors.format import infer_module_format  # type: ignore[import-not-found]
from compressed_tensors.quantization import (  # type: ignore[import-not-found]
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize  # type: ignore[import-not-found]
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp  # type: ignore[import-not-found]
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
GROUP = 32
TOKEN = {"strategy": "token", "dynamic": True}


def scheme(weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None) -> QuantizationScheme:
    inputs = None if activations is None else QuantizationArgs(**activations)
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=inputs)


def compressor(setting: QuantizationScheme) -> Any:
    """The compressor that the library itself picks for a linear."""
    return BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, setting).value)


def compress(weight: Tensor, setting: QuantizationScheme) -> Tensors:
    """A layer as it is saved, its codes, and what it decompresses to; scales by the library's own arithmetic from the ranges."""
    args = setting.weights
    grouped = weight.view(weight.shape[0], -1, args.group_size if args.group_size else weight.shape[1])
    ranges = grouped.amin(-1), grouped.amax(-1)
    if args.strategy == "tensor":
        ranges = ranges[0].amin().reshape(1), ranges[1].amax().reshape(1)
    scales, zeros = calculate_qparams(*ranges, args)
    layer = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    codes = quantize(x=weight, scale=scales, zero_point=zeros, args=args, dtype=args.pytorch_dtype())
    stored: Tensors = compressor(setting).compress(layer, setting)
    dense = compressor(setting).decompress(stored, setting)["weight"]
    return {"input": weight, **stored, "codes": codes, "dense": dense}


def golden() -> Tensors:
    """Weights with all-positive, all-negative and zero groups beside Gaussian ones; bfloat16, float16 and float32 scales."""
    generator = torch.Generator().manual_seed(40)
    normal = torch.randn(24, 64, generator=generator)
    normal[0, :GROUP], normal[1, GROUP:], normal[2] = normal[0, :GROUP].abs(), -normal[1, GROUP:].abs(), 0.0
    normal[3, 5] = 40.0
    odd = torch.randn(20, 60, generator=generator)  # no multiple of the codes of a word: short last words in both packings
    made: Tensors = {}
    for bits in (4, 8):
        for symmetric in (True, False):
            for strategy in ("group", "channel"):
                weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
                setting = scheme(weights | ({"group_size": GROUP} if strategy == "group" else {}))
                name = f"pack-int{bits}-{'sym' if symmetric else 'asym'}-{strategy}"
                made |= prefixed(name, compress(normal.bfloat16(), setting))
                if strategy == "channel":
                    made |= prefixed(f"{name}-odd", compress(odd.half(), setting))
    for symmetric in (True, False):
        weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"}
        setting = scheme(weights, {"num_bits": 8, "type": "int", **TOKEN})
        made |= prefixed(f"int-{'sym' if symmetric else 'asym'}-channel", compress(normal.bfloat16(), setting))
    for dtype in (torch.bfloat16, torch.float32):
        for strategy in ("channel", "tensor"):
            setting = scheme({"num_bits": 8, "type": "float", "strategy": strategy}, {"num_bits": 8, "type": "float", **TOKEN})
            name = f"float-{strategy}-{str(dtype).removeprefix('torch.')}"
            made |= prefixed(name, compress(normal.to(dtype), setting))
    for kind in ("int", "float"):
        made |= prefixed(f"token-{kind}", tokens(kind))
    return made


def tokens(kind: str) -> Tensors:
    """Activations of every size, one-sided and zero tokens among them, through what the library does to the input of a linear."""
    generator = torch.Generator().manual_seed(41)
    x = torch.randn(40, 96, generator=generator) * torch.logspace(-6, 5, 40).unsqueeze(1)
    x[3], x[7], x[8] = 0.0, x[7].abs(), -x[8].abs()
    x[9] = torch.arange(96) - 47.5
    x[9, 0] = 127.5  # the scale is 1, and every value between two steps exactly
    args, batch = QuantizationArgs(num_bits=8, type=kind, **TOKEN), x.unsqueeze(0)
    scale, zero = compute_dynamic_scales_and_zp(batch, args, torch.nn.Identity())
    return {"input": x, "scale": scale[0], "rounded": fake_quantize(batch, scale, zero, args)[0]}


def prefixed(name: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {f"{name}.{part}": value.clone().contiguous() for part, value in tensors.items()}


def read(artifact: Path) -> dict[str, Tensors]:
    """Module path -> parameter name -> tensor, of every safetensors file of the artifact."""
    modules: dict[str, Tensors] = {}
    for path in sorted(artifact.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                module, _, name = key.rpartition(".")
                modules.setdefault(module, {})[name] = file.get_tensor(key)
    return modules


def decompress(artifact: Path) -> Tensors:
    """Every linear that the library's own matching of the config's targets gives a scheme, by the library's own decompressor.

    ``NAME.weight`` comes of scales widened to float32, ``NAME.as_stored`` of the scales as they are.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    modules = read(artifact)
    config = AutoConfig.from_pretrained(artifact)
    stated = dict(config.quantization_config if isinstance(config.quantization_config, dict) else config.quantization_config.to_dict())
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    apply_quantization_config(model, QuantizationConfig.model_validate(stated), show_progress=False)
    made: Tensors = {}
    for name, module in model.named_modules():
        setting = getattr(module, "quantization_scheme", None)
        if setting is None or setting.weights is None:
            continue
        parts = modules[name]
        inputs = {key: value for key, value in parts.items() if not key.startswith("input_")}
        wide = inputs | {"weight_scale": inputs["weight_scale"].float()}
        made[f"{name}.weight"] = compressor(setting).decompress(wide, setting)["weight"].contiguous()
        made[f"{name}.as_stored"] = compressor(setting).decompress(inputs, setting)["weight"].contiguous()
    if not made:
        raise ValueError(f"{artifact}: no linear has a scheme")
    return made


def logits(artifact: Path, ids: list[int]) -> tuple[Tensors, dict[str, Any]]:
    """Logits [T, V] through transformers in float32, and what was loaded.

    ``dense`` multiplies by the weights of ``decompress``, in float32, where loading alone would leave them rounded to the dtype of their
    scales; activations stay as they are. ``logits`` is the artifact as transformers loads it unasked,
    activations quantized where the config says so; it is absent, and ``refused`` says why, where transformers cannot (5.23 with
    compressed-tensors 0.20: packed zero points).
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    tokens = torch.tensor([ids])

    def run(weights: Mapping[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Any]]:
        model, info = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, output_loading_info=True, **options)
        for name, weight in weights.items():
            if name.endswith(".weight"):
                model.get_parameter(name).copy_(weight)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        facts = {kind: sorted(map(str, info[kind])) for kind in kinds}
        values: Tensor = model.eval()(tokens).logits[0].float().contiguous()
        return values, {"model_class": type(model).__name__, "complaints": facts}

    dense, facts = run(decompress(artifact), quantization_config=CompressedTensorsConfig(dequantize=True))
    made, found = {"tokens": tokens[0], "dense": dense}, {"dense": facts}
    try:
        made["logits"], found["logits"] = run({})
    except RuntimeError as exc:
        found["refused"] = {"error": str(exc)}
    return made, found


@torch.no_grad()
def main(task: str, *paths: str) -> None:
    torch.set_num_threads(1)
    out = Path(paths[-1])
    if task == "golden":
        metadata = {"source": f"compressed-tensors {version('compressed-tensors')}: its compressors and calculate_qparams"}
        out.write_bytes(save(golden(), metadata))
    elif task == "decompress":
        save_file(decompress(Path(paths[0])), out)
    elif task == "logits":
        tensors, facts = logits(Path(paths[0]), json.loads(Path(paths[1]).read_text()))
        save_file(tensors, out)
        out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    else:
        raise SystemExit(f"{task}: golden, decompress or logits")


if __name__ == "__main__":
    main(*sys.argv[1:])
