"""Quantized checkpoints of random values, of any layout and of any architecture of the table, packed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.geometry import FLOAT_LAYOUTS, Geometry, geometry_of
from quantkit.layouts.base import Codebook, GroupedInt, Neutral, Scaled, SuperBlock
from quantkit.layouts.registry import codec
from quantkit.ops.dtypes import TORCH_DTYPES
from quantkit.ops.ggml.encode import encode
from quantkit.quant_config import quantization_config
from quantkit.scheme import KEEP, LinearScheme
from quantkit.verify import expected_tensors

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
PHI3: dict[str, Any] = {**LLAMA, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 64}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 128,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "dtype": "bfloat16",
}


def random_result(scheme: LinearScheme, n: int, k: int, generator: torch.Generator, *, least_zero: int = 0) -> Neutral:
    """Random values that ``scheme`` can hold."""

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    if scheme.layout == "ggml":
        values = torch.randn(n, k, generator=generator) * k**-0.5
        return SuperBlock(torch.from_numpy(encode(values.numpy(), scheme.code)), scheme.code)
    if scheme.layout == "bnb4":
        blocks = -(-n * k // scheme.group_size)
        return Codebook(
            integers(0, 16, n, k).to(torch.uint8), torch.rand(blocks, generator=generator), scheme.code, scheme.group_size, torch.bfloat16
        )
    if scheme.bits == 8 and scheme.layout in ("int8", "fp8", "fp8_block", "bnb8"):
        shape = {"fp8_block": (-(-n // 128), -(-k // 128))}.get(scheme.layout, (n, 1) if scheme.group_size else (1,))
        floats = scheme.layout.startswith("fp8")
        values = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn) if floats else integers(-127, 128, n, k).to(torch.int8)
        spread = 1.0 if floats else 73 / 127 if scheme.layout == "bnb8" else 73  # of the values; of what they stand for it is 0.05
        scales = (torch.rand(shape, generator=generator) + 0.5) * 0.05 / spread
        return Scaled(values, scales, divisor=127 if scheme.layout == "bnb8" else 1)
    groups = 1 if scheme.group_size == -1 else k // scheme.group_size
    zeros = torch.full((n, groups), 2 ** (scheme.bits - 1)) if scheme.sym else integers(least_zero, 2**scheme.bits, n, groups)
    scales = ((torch.rand(n, groups, generator=generator) + 0.5) / 100).to(TORCH_DTYPES[scheme.scale_dtype])
    order = (torch.arange(k) // scheme.group_size)[torch.randperm(k, generator=generator)].to(torch.int32) if scheme.act_order else None
    return GroupedInt(integers(0, 2**scheme.bits, n, k).to(torch.uint8), scales, zeros.to(torch.uint8), scheme.bits, g_idx=order)


def artifact(
    root: Path,
    scheme: LinearScheme,
    config: Mapping[str, Any] = LLAMA,
    *,
    others: Mapping[str, LinearScheme] | None = None,
    least_zero: int = 0,
) -> dict[str, tuple[Geometry, Tensor]]:
    """Write a checkpoint whose linears are stored by ``scheme``, or as ``others`` says of some.

    Returns the geometry and the float32 weight ``[N, K]`` of each.
    """
    spec, generator = spec_for(config), torch.Generator().manual_seed(0)
    dense_spec = expected_tensors(spec, dict.fromkeys(spec.all_linears(), KEEP))
    tensors: dict[str, Tensor] = {
        name: torch.randn(want.shape, generator=generator).to(torch.bfloat16) for name, want in dense_spec.items() if want.shape is not None
    }
    if spec.tied:
        tensors.pop(f"{spec.architecture.head}.weight", None)
    modules = {path: roles[0] for layer in range(spec.layers) for path, roles in spec.block_modules(layer).items()}
    shapes = {path: spec.stored_shape(role) for path, role in modules.items()}
    assignment = {path: (others or {}).get(path, scheme if spec.linears[role].quantize else KEEP) for path, role in modules.items()}
    weights = {}
    for path, (n, k) in shapes.items():
        if assignment[path].layout in FLOAT_LAYOUTS:
            continue
        del tensors[f"{path}.weight"]
        geometry = geometry_of(assignment[path], n, k, dtype="BF16")
        chosen = codec(geometry.layout)
        parts = chosen.pack(random_result(assignment[path], n, k, generator, least_zero=least_zero), geometry)
        weights[path] = geometry, chosen.dequant(parts, geometry)
        for part in geometry.parts:
            value = parts[part.suffix]
            tensors[f"{path}.{part.suffix}"] = value if part.free else value.reshape(geometry.stored_shape(part))
    head = spec.architecture.head
    written = dict(config)
    if weights:
        # No writer of ours makes the gemv layout: it is AWQ by another version.
        named = {path: replace(each, layout=each.layout.removesuffix("_gemv")) for path, each in assignment.items()}
        written["quantization_config"] = quantization_config(named if spec.tied else {**named, head: KEEP}, head)
    if scheme.layout == "awq_gemv":
        written["quantization_config"]["version"] = "gemv"
    root.mkdir()
    (root / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / "model.safetensors", metadata={"format": "pt"})
    return weights
