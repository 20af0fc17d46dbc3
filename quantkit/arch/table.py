"""The architecture table: one block of rows per family. Adding a family touches this file and its tests, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quantkit.arch.spec import Architecture, Experts, GgufRules, Linear, ModelSpec, Norm, ScaleGroup, resolve_spec
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


def _fused(
    name: str, gguf: str, roles: tuple[str, ...], dims: tuple[str, ...], bias: bool | str, transposed: bool = False
) -> tuple[Linear, ...]:
    """Linears of one input that one tensor holds, the rows of each after those of the one before."""
    return tuple(Linear(role, name, dim, "hidden", gguf, bias, roles, transposed) for role, dim in zip(roles, dims, strict=True))


def _experts(prefix: str, gate: str, up: str, down: str) -> tuple[Linear, ...]:
    """One expert's gated MLP at ``prefix``, which holds "{expert}"."""
    return (
        Linear("experts.{expert}.gate", f"{prefix}.{gate}", "expert_ffn", "hidden", "ffn_gate_exps"),
        Linear("experts.{expert}.up", f"{prefix}.{up}", "expert_ffn", "hidden", "ffn_up_exps"),
        Linear("experts.{expert}.down", f"{prefix}.{down}", "hidden", "expert_ffn", "ffn_down_exps"),
    )


QKV, QKV_DIMS = ("q", "k", "v"), ("heads", "kv_heads", "kv_heads")
STACKED = (
    ("mlp.experts.gate_up_proj", ("experts.{expert}.gate", "experts.{expert}.up")),
    ("mlp.experts.down_proj", ("experts.{expert}.down",)),
)
"""Experts as one tensor for each kind of weight, as transformers holds them in memory."""
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
LLAMA_RULES = GgufRules(biases=("q", "k", "v", "o", "gate", "up", "down"), rope_tables=frozenset({"llama3", "longrope"}))
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
        gguf_rules=LLAMA_RULES,
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    ),
    Architecture(
        name="mistral",
        model_type="mistral",
        hf_classes=("MistralForCausalLM",),
        gguf="llama",
        linears=(*_attention(False), *_gated_mlp()),
        norms=PRE_NORMS,
        scale_groups=SCALE_GROUPS,
        gguf_rope_permuted=True,
        gguf_rules=LLAMA_RULES,
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
        gguf_rules=GgufRules(wide_heads=False),
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
        gguf_rules=GgufRules(caps=("final_logit_softcapping",), period=6),
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
    Architecture(
        name="gemma2",
        model_type="gemma2",
        hf_classes=("Gemma2ForCausalLM",),
        gguf="gemma2",
        linears=(*_attention("attention_bias", "attention_bias"), *_gated_mlp()),
        norms=SANDWICH_NORMS,
        scale_groups=SCALE_GROUPS,
        gguf_rules=GgufRules(head="never", caps=("attn_logit_softcapping", "final_logit_softcapping"), period=2, window_stated=True),
        norm_offset=1.0,
        activation_keys=("hidden_activation", "hidden_act"),
        embedding_scale=True,
        sliding="alternate",
        defaults={
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
    ),
    Architecture(
        name="phi3",
        model_type="phi3",
        hf_classes=("Phi3ForCausalLM",),
        gguf="phi3",
        linears=(
            *_fused("self_attn.qkv_proj", "attn_qkv", QKV, QKV_DIMS, False),
            Linear("o", "self_attn.o_proj", "hidden", "heads", "attn_output"),
            *_fused("mlp.gate_up_proj", "ffn_up", ("gate", "up"), ("ffn", "ffn"), False),
            Linear("down", "mlp.down_proj", "hidden", "ffn", "ffn_down"),
        ),
        norms=PRE_NORMS,
        scale_groups=SCALE_GROUPS,
        gguf_rules=GgufRules(rope_tables=frozenset({"longrope"}), wide_heads=False, window_stated=True),
        sliding="all",
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    ),
    Architecture(
        name="gpt2",
        model_type="gpt2",
        hf_classes=("GPT2LMHeadModel",),
        gguf="gpt2",
        linears=(
            *_fused("attn.c_attn", "attn_qkv", QKV, QKV_DIMS, True, transposed=True),
            Linear("o", "attn.c_proj", "hidden", "heads", "attn_output", True, transposed=True),
            Linear("up", "mlp.c_fc", "ffn", "hidden", "ffn_up", True, transposed=True),
            Linear("down", "mlp.c_proj", "hidden", "ffn", "ffn_down", True, transposed=True),
        ),
        norms=(Norm("pre_attention", "ln_1", "attn_norm"), Norm("pre_ffn", "ln_2", "ffn_norm")),
        # The activation stands between up and down: no scale passes through it.
        scale_groups=(ScaleGroup("pre_attention", QKV), ScaleGroup("v", ("o",)), ScaleGroup("pre_ffn", ("up",))),
        gguf_rules=GgufRules(biases=("q", "k", "v", "o", "up", "down"), wide_heads=False),
        block="transformer.h.{layer}.",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        position_table="transformer.wpe",
        prefix="transformer.",
        norm_kind="layer",
        activation_keys=("activation_function",),
        buffers=(".attn.bias", ".attn.masked_bias"),
        keys={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        ffn_multiple=4,
        defaults={
            "activation_function": "gelu_new",
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 50257,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
    Architecture(
        name="qwen",
        model_type="qwen",
        hf_classes=("QWenLMHeadModel",),
        gguf="qwen",
        linears=(
            *_fused("attn.c_attn", "attn_qkv", QKV, QKV_DIMS, True),
            Linear("o", "attn.c_proj", "hidden", "heads", "attn_output"),
            Linear("gate", "mlp.w2", "ffn", "hidden", "ffn_gate"),
            Linear("up", "mlp.w1", "ffn", "hidden", "ffn_up"),
            Linear("down", "mlp.c_proj", "hidden", "ffn", "ffn_down"),
        ),
        norms=(Norm("pre_attention", "ln_1", "attn_norm"), Norm("pre_ffn", "ln_2", "ffn_norm")),
        scale_groups=SCALE_GROUPS,
        gguf_rules=GgufRules(head="required", wide_heads=False, grouped=False),
        block="transformer.h.{layer}.",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        prefix="transformer.",
        buffers=(".attn.masked_bias",),
        keys={
            "head_dim": "kv_channels",
            "rms_norm_eps": "layer_norm_epsilon",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
            # Beyond it the model changes its rotary base and scales its queries; within it neither does anything.
            "max_position_embeddings": "seq_length",
        },
        required={"scale_attn_weights": True, "no_bias": True},
        ffn_divisor=2,
        defaults={"hidden_act": "silu", "tie_word_embeddings": False},
    ),
    Architecture(
        name="mixtral",
        model_type="mixtral",
        hf_classes=("MixtralForCausalLM",),
        gguf="llama",
        linears=_attention(False),
        norms=PRE_NORMS,
        scale_groups=SCALE_GROUPS[:2],
        gguf_rope_permuted=True,
        gguf_rules=LLAMA_RULES,
        experts=Experts(
            Linear("router", "block_sparse_moe.gate", "experts", "hidden", "ffn_gate_inp", quantize=False),
            _experts("block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
            count_key="num_local_experts",
            size_key="intermediate_size",
            stacked=STACKED,
        ),
        keys={"num_local_experts": "num_experts"},
        renamed={"mlp.gate": "block_sparse_moe.gate"},
        sliding="all",
        defaults={
            "hidden_act": "silu",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096 * 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    Architecture(
        name="qwen2_moe",
        model_type="qwen2_moe",
        hf_classes=("Qwen2MoeForCausalLM",),
        gguf="qwen2moe",
        linears=(*_attention("qkv_bias"), *_gated_mlp()),
        norms=PRE_NORMS,
        scale_groups=SCALE_GROUPS,
        gguf_rules=GgufRules(head="required", wide_heads=False, normalized=False),
        experts=Experts(
            Linear("router", "mlp.gate", "experts", "hidden", "ffn_gate_inp", quantize=False),
            _experts("mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
            shared=(
                Linear("shared.gate", "mlp.shared_expert.gate_proj", "shared_ffn", "hidden", "ffn_gate_shexp"),
                Linear("shared.up", "mlp.shared_expert.up_proj", "shared_ffn", "hidden", "ffn_up_shexp"),
                Linear("shared.down", "mlp.shared_expert.down_proj", "hidden", "shared_ffn", "ffn_down_shexp"),
                Linear("shared_gate", "mlp.shared_expert_gate", "one", "hidden", "ffn_gate_inp_shexp", quantize=False),
            ),
            normalize="norm_topk_prob",
            stacked=STACKED,
        ),
        sliding="alternate_before_max_window_layers",
        defaults={
            "hidden_act": "silu",
            "qkv_bias": True,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "max_position_embeddings": 32768,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    Architecture(
        name="qwen3_moe",
        model_type="qwen3_moe",
        hf_classes=("Qwen3MoeForCausalLM",),
        gguf="qwen3moe",
        linears=(*_attention("attention_bias", "attention_bias"), *_gated_mlp()),
        norms=(*PRE_NORMS, *QK_NORMS),
        scale_groups=SCALE_GROUPS,
        experts=Experts(
            Linear("router", "mlp.gate", "experts", "hidden", "ffn_gate_inp", quantize=False),
            _experts("mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
            normalize="norm_topk_prob",
            stacked=STACKED,
        ),
        keys={"num_experts": "num_local_experts"},  # as transformers 5 writes it
        sliding="all",
        defaults={
            "hidden_act": "silu",
            "sliding_window": 4096,
            "use_sliding_window": False,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
)

BY_MODEL_TYPE: Mapping[str, Architecture] = MappingProxyType({arch.model_type: arch for arch in TABLE})
GGUF_NAMES: tuple[str, ...] = tuple(dict.fromkeys(arch.gguf for arch in TABLE if arch.gguf))


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The table row of a parsed ``config.json``; None when the table has none."""
    model_type = config.get("model_type")
    return BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None


def gguf_architecture(name: str, *, experts: bool, window: bool) -> Architecture | None:
    """The table row of a GGUF file that calls itself ``name``; None when the table has none.

    Llama, Mistral and Mixtral share a name: experts and a sliding window tell them apart.
    """
    rows = [arch for arch in TABLE if arch.gguf == name]
    rows = [arch for arch in rows if (arch.experts is not None) == experts] or rows
    return next((arch for arch in rows if (arch.sliding != "none") == window), rows[0] if rows else None)


def spec_for(config: Mapping[str, Any]) -> ModelSpec:
    """The ModelSpec of a parsed ``config.json``.

    Raises InputError for an architecture that the table does not have, and for facts that are missing or out of range.
    """
    arch = architecture_of(config)
    if arch is None:
        what = f"{config.get('model_type')!r:.100} is not in the architecture table"
        raise InputError("config.json: model_type", what, f"one of {', '.join(BY_MODEL_TYPE)}")
    return resolve_spec(arch, config)
