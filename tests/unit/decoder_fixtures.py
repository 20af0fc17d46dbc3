"""Tiny random models beside their transformers twins, held in memory; and the simplest cache that keeps the protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.model.attention import spans
from quantkit.model.decoder import Batch, Decoder
from quantkit.ops.dtypes import DTYPE_NAMES, as_bytes
from quantkit.plan import ParallelPlan, make_plan
from quantkit.quant_config import assignment_from_config

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LONG = {
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 16,
}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **parameters}}


GEMMA_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
}
GEMMA = {"model_type": "gemma3_text", "query_pre_attn_scalar": 20, "sliding_window": 5, "tie_word_embeddings": True, **GEMMA_ROPE}
GEMMA2 = {"model_type": "gemma2", "query_pre_attn_scalar": 20, "sliding_window": 5, "tie_word_embeddings": True}
CAPS = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}
PHI4 = {"partial_rotary_factor": 0.75, "head_dim": 16, "hidden_size": 96}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 131,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN2_MOE = {
    "model_type": "qwen2_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **rope("default")},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **rope("default")},
    "llama-tied-mha": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 6, **rope("default")},
    "llama-mqa": {"model_type": "llama", "num_key_value_heads": 1, **rope("default")},
    "mistral": {"model_type": "mistral", "sliding_window": 5, **rope("default")},
    "mistral-full": {"model_type": "mistral", "sliding_window": None, **rope("default")},
    "qwen2": {"model_type": "qwen2", **SLIDING, **rope("default")},
    "qwen2-full": {"model_type": "qwen2", "tie_word_embeddings": True, **rope("default")},
    "qwen3": {"model_type": "qwen3", **rope("default")},
    "qwen3-bias-sliding": {"model_type": "qwen3", "attention_bias": True, **SLIDING, **rope("default")},
    "gemma3": {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3-pattern-softcap": {**GEMMA, "num_hidden_layers": 7, "attention_bias": True, "final_logit_softcapping": 3.0},
    "gemma2": {**GEMMA2, **CAPS, **rope("default")},
    "gemma2-types": {
        **GEMMA2,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        **rope("default"),
    },
    "phi3": {"model_type": "phi3", "sliding_window": 5, **rope("default")},
    "phi3-partial": {"model_type": "phi3", **PHI4, **rope("default", partial_rotary_factor=0.75)},
    "phi3-longrope": {
        "model_type": "phi3",
        **PHI4,
        "original_max_position_embeddings": 16,
        **rope("longrope", partial_rotary_factor=0.75, **LONG),
    },
    "phi3-old-config": {
        "model_type": "phi3",
        "hidden_size": 72,
        "original_max_position_embeddings": 16,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "longrope", "short_factor": LONG["short_factor"], "long_factor": LONG["long_factor"]},
    },
    "gpt2": GPT2,
    "gpt2-inner": {**GPT2, "n_inner": 80, "activation_function": "gelu", "layer_norm_epsilon": 1e-2},
    "mixtral": {**MIXTRAL, **rope("default")},
    "mixtral-sliding": {**MIXTRAL, "sliding_window": 5, **rope("default")},
    "qwen2-moe": {**QWEN2_MOE, "norm_topk_prob": True, **rope("default")},
    "qwen2-moe-steps": {**QWEN2_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "qkv_bias": False, **SLIDING, **rope("default")},
    "qwen3-moe": {**QWEN3_MOE, "norm_topk_prob": True, **rope("default")},
    "qwen3-moe-dense-first": {**QWEN3_MOE, "mlp_only_layers": [0], "attention_bias": True, **SLIDING, **rope("default")},
    "rope-linear": {"model_type": "llama", **rope("linear", factor=3.0)},
    "rope-dynamic": {"model_type": "llama", **rope("dynamic", factor=3.0)},
    "rope-yarn": {"model_type": "llama", **rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    "rope-yarn-mscale": {
        "model_type": "qwen3",
        **rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3, beta_fast=8.0, truncate=False),
    },
    "rope-llama3": {
        "model_type": "llama",
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    },
    "rope-longrope": {"model_type": "llama", **rope("longrope", factor=6.0, **LONG)},
    "rope-longrope-ratio": {"model_type": "mistral", "sliding_window": None, **rope("longrope", **LONG)},
}


def config_of(family: str) -> dict[str, Any]:
    return {**(BASE if FAMILIES[family]["model_type"] != "gpt2" else {}), **FAMILIES[family]}


@dataclass(frozen=True)
class Ref:
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class MemoryCheckpoint:
    """What ``model.load`` asks of a Checkpoint, over tensors in memory."""

    config: Mapping[str, Any]
    values: Mapping[str, Tensor]
    kind: str = "hf"
    reads: list[tuple[str, int]] = field(default_factory=list)

    @cached_property
    def tensors(self) -> dict[str, Ref]:
        return {name: Ref(tuple(value.shape), self.dtype(name)) for name, value in self.values.items()}

    def dtype(self, name: str) -> str:
        return DTYPE_NAMES[self.values[name].dtype]

    def read(self, name: str, index: tuple[slice, ...] | None = None, view: tuple[int, ...] | None = None) -> np.ndarray[Any, Any]:
        whole = self.values[name] if view is None else self.values[name].reshape(view)
        value = whole if index is None else whole[index]
        self.reads.append((name, value.numel()))
        if value.dtype == torch.bfloat16:
            return value.contiguous().view(torch.int16).numpy().view(np.uint16)
        return value.contiguous().numpy()

    def fill(self, out: np.ndarray[Any, Any], name: str, index: tuple[slice, ...], view: tuple[int, ...] | None = None) -> None:
        value = (self.values[name] if view is None else self.values[name].reshape(view))[index]
        self.reads.append((name, value.numel()))
        out[...] = np.frombuffer(as_bytes(value), out.dtype).reshape(out.shape)


def random_twin(config: Mapping[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Any, MemoryCheckpoint]:
    """A transformers model of ``config`` whose every tensor is random and far from its neutral value, and its checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    # Gemma 2 caps its scores, and its fast experts take no float64.
    attention = "eager" if values["model_type"] == "gemma2" else "sdpa"
    hf = AutoConfig.for_model(values.pop("model_type"), **values, attn_implementation=attention, experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(hf).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if "norm" in name or name.endswith("bias") else 2.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread + (0.7 if "norm" in name else 0.0)
            )
    tied = {"lm_head.weight"} if hf.tie_word_embeddings else set()
    tensors = {name: value.detach() for name, value in model.state_dict().items() if name not in tied}
    return model, MemoryCheckpoint(config, separate(config["model_type"], tensors))


def separate(model_type: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are published: each expert's by itself, and Mixtral's under the names that it came with."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if model_type == "mixtral":
        names = {"gate": "w1", "up": "w3", "down": "w2"}
        tensors = {name.replace(".mlp.", ".block_sparse_moe."): value for name, value in tensors.items()}
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj") or not base.endswith("experts"):
            found[name] = value
            continue
        for expert, part in enumerate(value):
            halves = {"down": part} if kind == "down_proj" else dict(zip(("gate", "up"), part.chunk(2), strict=True))
            found |= {f"{base}.{expert}.{names[key]}.weight": half for key, half in halves.items()}
    return found


class GrowingCache:
    """Keys and values of whole sequences, grown by concatenation."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, batch: Batch, k: Tensor, v: Tensor) -> None:
        for start, length, sequence in spans(batch):
            new = [x[start : start + length] for x in (k, v)]
            old = self._held.get((layer, sequence), (new[0][:0], new[1][:0]))
            self._held[layer, sequence] = torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]])

    def held(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        return self._held[layer, sequence]


def batch_of(stretches: list[tuple[int, int]], sequences: tuple[int, ...] | None = None) -> Batch:
    """A batch of sequences, each given as (first position, one past the last)."""
    positions = torch.cat([torch.arange(start, stop) for start, stop in stretches])
    return Batch(positions, tuple(stop - start for start, stop in stretches), sequences)


def logits_of(decoder: Decoder, texts: list[Tensor]) -> list[Tensor]:
    """Logits of every token of ``texts``, all in one pass without a cache."""
    hidden = decoder.forward(torch.cat(texts), batch_of([(0, len(text)) for text in texts]))
    return list(decoder.logits(hidden).split([len(text) for text in texts]))


def texts_of(lengths: tuple[int, ...]) -> list[Tensor]:
    """Random tokens below the tiny vocabulary; the same for the same length and place."""
    return [torch.randint(0, 131, (n,), generator=torch.Generator().manual_seed(100 * n + i)) for i, n in enumerate(lengths)]


def plan_of(checkpoint: MemoryCheckpoint, tp: int) -> ParallelPlan:
    spec = spec_for(checkpoint.config)
    assignment = assignment_from_config(checkpoint.config, spec.all_linears(), checkpoint.tensors)
    return make_plan(spec, assignment, tp, dtype="BF16")


def awq_checkpoint(config: Mapping[str, Any], group_size: int) -> MemoryCheckpoint:
    """Random AWQ words, zeros and scales for every block linear of ``config``."""
    spec = spec_for(config)
    generator = torch.Generator().manual_seed(5)

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    arch, hidden = spec.architecture, spec.dims["hidden"].elements
    values = {f"{arch.embedding}.weight": floats(spec.dims["vocab"].elements, hidden), f"{arch.final_norm}.weight": floats(hidden)}
    for layer in range(spec.layers):
        for norm in spec.norms.values():
            values[spec.tensor(layer, norm.name) + ".weight"] = 1 + 0.3 * floats(hidden if norm.width == "hidden" else spec.head_dim)
        for path, (role, *_) in spec.block_modules(layer).items():
            n, k = spec.stored_shape(role)
            if not spec.linears[role].quantize:
                values[f"{path}.weight"] = floats(n, k)
                continue
            values[f"{path}.qweight"], values[f"{path}.qzeros"] = words(k, n // 8), words(k // group_size, n // 8)
            values[f"{path}.scales"] = (0.03 * floats(k // group_size, n).abs()).half()
            if spec.linears[role].bias:
                values[f"{path}.bias"] = floats(n).half()
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
    return MemoryCheckpoint({**config, "quantization_config": quantization}, values)
