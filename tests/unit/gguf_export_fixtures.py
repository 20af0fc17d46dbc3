"""Tiny random models of every family that GGUF has, held in memory, and the file that the plan of one makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from decoder_fixtures import MemoryCheckpoint, rope
from numpy.typing import NDArray

from quantkit.arch.table import spec_for
from quantkit.checkpoint.gguf_export import ExportPlan, export_plan, read_rows
from quantkit.formats.gguf import Value
from quantkit.scheme import KEEP
from quantkit.verify import expected_tensors

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 2.75, 3.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0, 9.5],
}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 16,
    "sliding_window": 5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2",
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 16,
    "sliding_window": 5,
    "tie_word_embeddings": True,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 3.0,
    **rope("default"),
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 131, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
QWEN: dict[str, Any] = {
    "model_type": "qwen",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "seq_length": 64,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 500.0,
    **IDS,
}
MIXTRAL: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
QWEN2_MOE: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": False,
}
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 24, **rope("default")},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **rope("default")},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4, **rope("default")},
    "llama-3": {"model_type": "llama", **rope("llama3", **LLAMA3)},
    "llama-linear": {"model_type": "llama", **rope("linear", factor=3.0)},
    "llama-dynamic": {"model_type": "llama", **rope("dynamic", factor=3.0)},
    "llama-yarn": {"model_type": "llama", **rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    "llama-longrope": {"model_type": "llama", **rope("longrope", factor=6.0, original_max_position_embeddings=16, **LONG)},
    "mistral": {"model_type": "mistral", "sliding_window": 5, **rope("default")},
    "mistral-full": {"model_type": "mistral", "sliding_window": None, **rope("default")},
    "mixtral": {**MIXTRAL, **rope("default")},
    "mixtral-sliding": {**MIXTRAL, "sliding_window": 5, **rope("default")},
    "qwen": QWEN,
    "qwen-partial": {**QWEN, "rotary_pct": 0.5},
    "qwen2": {"model_type": "qwen2", **rope("default")},
    "qwen2-sliding-tied": {"model_type": "qwen2", "tie_word_embeddings": True, **SLIDING, **rope("default")},
    "qwen2-moe": {**QWEN2_MOE, **rope("default")},
    "qwen2-moe-sliding": {**QWEN2_MOE, "qkv_bias": False, **SLIDING, **rope("default")},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, **rope("default")},
    "qwen3-yarn": {
        "model_type": "qwen3",
        **rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3, beta_fast=8.0),
    },
    "qwen3-moe": {**QWEN3_MOE, "head_dim": 24, "tie_word_embeddings": True, **rope("default")},
    "gemma2": GEMMA2,
    "gemma2-types": {**GEMMA2, "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]},
    "gemma2-windows": {**GEMMA2, "layer_types": ["sliding_attention"] * 4},
    "gemma3": GEMMA3,
    "gemma3-types": {**GEMMA3, "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3-windows": {**GEMMA3, "num_hidden_layers": 2},
    "gemma3-full": {**GEMMA3, "sliding_window_pattern": 1, "final_logit_softcapping": 3.0},
    "phi3": {"model_type": "phi3", "sliding_window": 5, **rope("default")},
    "phi3-partial": {"model_type": "phi3", "sliding_window": None, **rope("default", partial_rotary_factor=0.75)},
    "phi3-longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
        **rope("longrope", partial_rotary_factor=0.5, short_factor=LONG["short_factor"][:4], long_factor=LONG["long_factor"][:4]),
    },
    "gpt2": {**GPT2, **IDS},
    "gpt2-inner": {**GPT2, **IDS, "n_inner": 96, "layer_norm_epsilon": 1e-2},
}


def config_of(family: str) -> dict[str, Any]:
    own = FAMILIES[family]
    return dict(own) if own["model_type"] in ("gpt2", "qwen") else {**BASE, **own}


def values_of(config: Mapping[str, Any], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights by Hugging Face name; every value, and every norm plus 1, is a bfloat16 number."""
    spec, rng = spec_for(config), np.random.default_rng(seed)
    found = {}
    for name, want in expected_tensors(spec, dict.fromkeys(spec.all_linears(), KEEP)).items():
        if want.shape is None or (spec.tied and name.startswith(f"{spec.architecture.head}.")):
            continue
        vector = len(want.shape) == 1
        found[name] = (rng.integers(-100, 101, want.shape) / (128 if vector else 256)).astype(np.float32)
    return found


def checkpoint_of(config: Mapping[str, Any], values: Mapping[str, NDArray[np.float32]]) -> MemoryCheckpoint:
    return MemoryCheckpoint(config, {name: torch.from_numpy(value) for name, value in values.items()})


def write_plan(path: Path, plan: ExportPlan, values: Mapping[str, NDArray[np.float32]], extra: Mapping[str, Value] | None = None) -> Path:
    """The plan as a file of float32, written by the gguf package."""

    def read(name: str, index: tuple[slice, ...] | None) -> NDArray[np.float32]:
        return values[name] if index is None else values[name][index]

    metadata = {**plan.metadata, **(extra or {})}
    writer = gguf.GGUFWriter(path, metadata["general.architecture"].value)
    for key, value in metadata.items():
        if key != "general.architecture":
            element = None if value.element is None else gguf.GGUFValueType(value.element)
            held = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
            writer.add_key_value(key, held, gguf.GGUFValueType(value.kind), element)
    for tensor in plan.tensors:
        rows = read_rows(tensor, range(tensor.rows), read)
        assert rows.dtype == np.float32 and rows.shape == (tensor.rows, tensor.shape[-1]), tensor.name
        writer.add_tensor(tensor.name, np.ascontiguousarray(rows).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_family(
    path: Path, config: Mapping[str, Any], values: Mapping[str, NDArray[np.float32]], extra: Mapping[str, Value] | None = None
) -> Path:
    return write_plan(path, export_plan(config, spec_for(config), values), values, extra)
