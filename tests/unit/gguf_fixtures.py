"""Tiny models as GGUF files, written by the gguf package with the names and the row order that it and its converters use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

ARCHES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, "llama"),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, "qwen2"),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, "qwen3"),
    "gemma3_text": (gguf.MODEL_ARCH.GEMMA3, "gemma3"),
}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "sliding_window": 8,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
    },
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return {**SMALL, **FAMILIES[family], **changes}


def values_of(config: Mapping[str, Any], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights by Hugging Face name; every value is a float16 and a bfloat16, and so is every norm plus 1."""
    rng = np.random.default_rng(seed)
    kind, hidden, ffn, vocab = config["model_type"], config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind == "gemma3_text" else []
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        shapes |= {f"{block}{name}.weight": (hidden,) for name in norms}
        if kind in ("qwen3", "gemma3_text"):
            shapes |= {f"{block}self_attn.{name}.weight": (config["head_dim"],) for name in ("q_norm", "k_norm")}
        for part, linears in (("self_attn", attention), ("mlp", mlp)):
            for name, shape in linears.items():
                shapes[f"{block}{part}.{name}.weight"] = shape
                always = kind == "qwen2" and name in ("q_proj", "k_proj", "v_proj")
                if always or config.get("attention_bias" if part == "self_attn" else "mlp_bias"):
                    shapes[f"{block}{part}.{name}.bias"] = shape[:1]
    return {name: (rng.integers(-100, 101, shape) / 64).astype(np.float32) for name, shape in shapes.items()}


def interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The row order that converters give queries and keys of the llama family."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_values(config: Mapping[str, Any], values: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The tensors as a converter writes them, by GGUF name."""
    arch, name = ARCHES[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    found = {}
    for path, value in values.items():
        if name == "llama" and ("q_proj" in path or "k_proj" in path):
            value = interleaved(value, config["num_attention_heads" if "q_proj" in path else "num_key_value_heads"])
        if name == "gemma3" and path.endswith("norm.weight"):
            value = value + np.float32(1)
        mapped = names.get_name(path, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, path
        found[mapped] = value
    return found


def metadata_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a converter writes for ``config``: its default rotary scaling, no tokenizer but its special tokens."""
    prefix = ARCHES[config["model_type"]][1]
    found = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]),
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    if "sliding_window" in config:
        found["attention.sliding_window"] = config["sliding_window"]
    ids = {"tokenizer.ggml.bos_token_id": config["bos_token_id"], "tokenizer.ggml.eos_token_id": config["eos_token_id"]}
    return {f"{prefix}.{key}": value for key, value in found.items()} | ids


def write_gguf(path: Path, arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """A file by the gguf package. A tensor is an array of floats, or ``(type, bytes [..., row bytes])``."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=gguf.GGMLQuantizationType[tensor[0]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path,
    config: Mapping[str, Any],
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """A model of ``config`` with random weights; ``keys`` and ``tensors`` are laid over what a converter writes, None removes one."""
    arch = ARCHES[config["model_type"]][1]
    found = {**gguf_values(config, values_of(config)), **(tensors or {})}
    return write_gguf(path, arch, {**metadata_of(config), **(keys or {})}, {k: v for k, v in found.items() if v is not None})
