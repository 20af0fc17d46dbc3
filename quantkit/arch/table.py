"""The architecture table: one block of rows per family. Adding a family touches this file and its tests, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quantkit.arch.spec import Architecture, Linear, ModelSpec, Norm, ScaleGroup, resolve_spec
from quantkit.errors import InputError


def _attention(bias: bool | str, output_bias: bool | str = False) -> tuple[Linear, ...]:
    return (
        Linear("q", "self_attn.q_proj", "heads", "hidden", "attn_q", bias),
        Linear("k", "self_attn.k_proj", "kv_heads", "hidden", "attn_k", bias),
        Linear("v", "self_attn.v_proj", "kv_heads", "hidden", "attn_v", bias),
        Linear("o", "self_attn.o_proj", "hidden", "heads", "attn_output", output_bias),
    )


def _gated_mlp(bias: bool | str = False) -> tuple[Linear, ...]:
    return (
        Linear("gate", "mlp.gate_proj", "ffn", "hidden", "ffn_gate", bias),
        Linear("up", "mlp.up_proj", "ffn", "hidden", "ffn_up", bias),
        Linear("down", "mlp.down_proj", "hidden", "ffn", "ffn_down", bias),
    )


PRE_NORMS = (
    Norm("pre_attention", "input_layernorm", "attn_norm"),
    Norm("pre_ffn", "post_attention_layernorm", "ffn_norm"),
)
QK_NORMS = (
    Norm("q_norm", "self_attn.q_norm", "attn_q_norm", "head"),
    Norm("k_norm", "self_attn.k_norm", "attn_k_norm", "head"),
)
SANDWICH_NORMS = (
    Norm("pre_attention", "input_layernorm", "attn_norm"),
    Norm("post_attention", "post_attention_layernorm", "post_attention_norm"),
    Norm("pre_ffn", "pre_feedforward_layernorm", "ffn_norm"),
    Norm("post_ffn", "post_feedforward_layernorm", "post_ffw_norm"),
)
SCALE_GROUPS = (
    ScaleGroup("pre_attention", ("q", "k", "v")),
    ScaleGroup("v", ("o",)),
    ScaleGroup("pre_ffn", ("gate", "up")),
    ScaleGroup("up", ("down",)),
)

TABLE: tuple[Architecture, ...] = (
    Architecture(
        name="llama",
        model_type="llama",
        hf_classes=("LlamaForCausalLM",),
        gguf="llama",
        linears=(*_attention("attention_bias", "attention_bias"), *_gated_mlp("mlp_bias")),
        norms=PRE_NORMS,
        scale_groups=SCALE_GROUPS,
        gguf_rope_permuted=True,
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    ),
    Architecture(
        name="mistral",
        model_type="mistral",
        hf_classes=("MistralForCausalLM",),
        gguf=None,  # a Mistral GGUF calls itself "llama", and reads as one
        linears=(*_attention(False), *_gated_mlp()),
        norms=PRE_NORMS,
        scale_groups=SCALE_GROUPS,
        sliding="all",
        defaults={"hidden_act": "silu", "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 4096 * 32},
    ),
    Architecture(
        name="qwen2",
        model_type="qwen2",
        hf_classes=("Qwen2ForCausalLM",),
        gguf="qwen2",
        linears=(*_attention(True), *_gated_mlp()),
        norms=PRE_NORMS,
        scale_groups=SCALE_GROUPS,
        sliding="after_max_window_layers",
        defaults={
            "hidden_act": "silu",
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "max_position_embeddings": 32768,
        },
    ),
    Architecture(
        name="qwen3",
        model_type="qwen3",
        hf_classes=("Qwen3ForCausalLM",),
        gguf="qwen3",
        linears=(*_attention("attention_bias", "attention_bias"), *_gated_mlp()),
        norms=(*PRE_NORMS, *QK_NORMS),
        scale_groups=SCALE_GROUPS,
        sliding="after_max_window_layers",
        defaults={
            "hidden_act": "silu",
            "head_dim": 128,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "max_position_embeddings": 32768,
        },
    ),
    Architecture(
        name="gemma3",
        model_type="gemma3_text",
        hf_classes=("Gemma3ForCausalLM",),
        gguf="gemma3",
        linears=(*_attention("attention_bias", "attention_bias"), *_gated_mlp()),
        norms=(*SANDWICH_NORMS, *QK_NORMS),
        scale_groups=SCALE_GROUPS,
        norm_offset=1.0,
        activation_keys=("hidden_activation", "hidden_act"),
        embedding_scale=True,
        sliding="pattern",
        defaults={
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
        },
    ),
)

BY_MODEL_TYPE: Mapping[str, Architecture] = MappingProxyType({arch.model_type: arch for arch in TABLE})
BY_GGUF: Mapping[str, Architecture] = MappingProxyType({arch.gguf: arch for arch in TABLE if arch.gguf})


def spec_for(config: Mapping[str, Any]) -> ModelSpec:
    """The ModelSpec of a parsed ``config.json``.

    Raises InputError for an architecture that the table does not have, and for facts that are missing or out of range.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
        raise InputError(
            "config.json: model_type", f"{model_type!r} is not in the architecture table", f"one of {', '.join(BY_MODEL_TYPE)}"
        )
    return resolve_spec(BY_MODEL_TYPE[model_type], config)
