"""A model as data: the frozen facts that the decoder, the quantizers, the plan and GGUF all read.

``Architecture`` is a table row (what a family of models looks like); ``ModelSpec`` is a row resolved against one
``config.json``. Nothing here imports torch, touches weights, or has code per model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from quantkit.errors import InputError


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of a block: ``y = x W^T + b`` with W ``[out, inp]``; ``out`` and ``inp`` are named dims."""

    role: str
    name: str
    out: str
    inp: str
    gguf: str
    bias: bool | str = False
    """True, False, or the config key that says so."""


@dataclass(frozen=True, slots=True)
class Norm:
    """One RMS norm of a block; ``width`` is "hidden" or "head" (per-head query and key norms)."""

    role: str
    name: str
    gguf: str
    width: str = "hidden"


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linears that read one input, and the op before it that can absorb a per-channel scale.

    ``prev`` is a norm role (fold into its weight) or a linear role (fold into its output rows and bias).
    ``targets`` are linear roles. Source: Lin et al. 2023, AWQ, section 3.2.
    """

    prev: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table: a family of decoders."""

    name: str
    model_type: str
    hf_classes: tuple[str, ...]
    gguf: str | None
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    scale_groups: tuple[ScaleGroup, ...]
    block: str = "model.layers.{layer}."
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norm_offset: float = 0.0
    """The norm multiplies by (offset + weight); GGUF stores the sum."""
    activation_keys: tuple[str, ...] = ("hidden_act",)
    embedding_scale: bool = False
    """Multiply embeddings by sqrt(hidden), rounded to the embedding's dtype."""
    gguf_rope_permuted: bool = False
    """GGUF stores q and k rows interleaved for this family (``gguf.md`` 5.4)."""
    sliding: str = "none"
    """Which layers slide when config.json has no ``layer_types``: "none", "all", "after_max_window_layers", "pattern"."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Config values of the family where config.json is silent."""


@dataclass(frozen=True, slots=True)
class Dim:
    """A named dim: ``size`` units (heads, channels, rows) of ``width`` elements each."""

    size: int
    width: int = 1

    @property
    def elements(self) -> int:
        return self.size * self.width


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: base ``theta``, the scaling ``kind`` and its numbers (``rope_parameters`` of config.json)."""

    theta: float
    kind: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model, resolved: everything that code may ask about it except its weights."""

    architecture: Architecture
    layers: int
    dims: Mapping[str, Dim]
    """hidden, heads, kv_heads, ffn, vocab."""
    head_dim: int
    linears: Mapping[str, Linear]
    """By role, in block order; biases resolved to True or False."""
    norms: Mapping[str, Norm]
    eps: float
    activation: str
    """"silu" or "gelu_tanh" or "gelu"."""
    tied: bool
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    windows: tuple[int | None, ...]
    """Per layer: the sliding window in tokens, or None for full attention."""
    ropes: tuple[Rope, ...]
    """Per layer."""
    max_positions: int
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]

    def tensor(self, layer: int, name: str) -> str:
        """The full name of a block's module: ``tensor(3, "mlp.up_proj")`` -> ``model.layers.3.mlp.up_proj``."""
        return self.architecture.block.format(layer=layer) + name

    def block_linears(self, layer: int) -> dict[str, str]:
        """Role -> full module path, for one block."""
        return {role: self.tensor(layer, linear.name) for role, linear in self.linears.items()}

    def all_linears(self) -> list[str]:
        """Full module paths of every block linear in order, then the head unless it is tied."""
        names = [path for layer in range(self.layers) for path in self.block_linears(layer).values()]
        return names if self.tied else [*names, self.architecture.head]

    def linear_shape(self, role: str) -> tuple[int, int]:
        """``(N, K)`` of a block linear."""
        linear = self.linears[role]
        return self.dims[linear.out].elements, self.dims[linear.inp].elements


ACTIVATIONS = MappingProxyType({"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"})
ROPE_KINDS = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3"})
MAX_LAYERS = 1024


def _number(config: Mapping[str, Any], key: str, kind: type, low: float, high: float, default: Any = None) -> Any:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not isinstance(value, int)):
        raise InputError(f"config.json: {key}", f"is {value!r}", f"{'a whole number' if kind is int else 'a number'}")
    if not (low <= value <= high) or not math.isfinite(value):
        raise InputError(f"config.json: {key}", f"is {value}", f"between {low} and {high}")
    return kind(value)


def _ids(value: Any, vocab: int) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [value]
    return tuple(v for v in found if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < vocab)


def _rope(raw: Mapping[str, Any], theta: float, config: Mapping[str, Any]) -> Rope:
    kind = raw.get("rope_type", raw.get("type"))
    kind = "default" if kind is None else "longrope" if kind == "su" else kind
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise InputError("config.json: rope scaling", f"kind {kind!r}", f"one of {', '.join(sorted(ROPE_KINDS))}")
    partial = raw.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise InputError("config.json: partial_rotary_factor", f"is {partial!r}", "1: these architectures rotate whole heads")
    parameters = dict(raw)
    original = config.get("original_max_position_embeddings")
    if original is not None:  # beside rope_parameters it wins, as in transformers
        parameters["original_max_position_embeddings"] = original
    return Rope(theta=_number(raw, "rope_theta", float, 1.0, 1e12, theta), kind=kind, parameters=MappingProxyType(parameters))


def _ropes(config: Mapping[str, Any], layer_types: tuple[str, ...]) -> tuple[Rope, ...]:
    theta = _number(config, "rope_theta", float, 1.0, 1e12, 10000.0)
    raw = config.get("rope_parameters")
    if raw is None:
        scaling = config.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise InputError("config.json: rope_scaling", f"is {type(scaling).__name__}", "an object")
        full = _rope(scaling, theta, config)
        local = _rope({}, _number(config, "rope_local_base_freq", float, 1.0, 1e12, theta), config)
        split = "rope_local_base_freq" in config
        return tuple(local if split and kind == "sliding_attention" else full for kind in layer_types)
    if not isinstance(raw, dict):
        raise InputError("config.json: rope_parameters", f"is {type(raw).__name__}", "an object")
    if any(kind in raw for kind in ("full_attention", "sliding_attention")):
        by_kind = {kind: _rope(value or {}, theta, config) for kind, value in raw.items() if isinstance(value, dict)}
        missing = set(layer_types) - set(by_kind)
        if missing:
            raise InputError("config.json: rope_parameters", f"has no entry for {', '.join(sorted(missing))}", "one per layer type")
        return tuple(by_kind[kind] for kind in layer_types)
    return (_rope(raw, theta, config),) * len(layer_types)


def _layer_types(arch: Architecture, config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    raw = config.get("layer_types")
    full, sliding = "full_attention", "sliding_attention"
    if raw is not None:
        if not isinstance(raw, list) or len(raw) != layers or any(kind not in (full, sliding) for kind in raw):
            raise InputError("config.json: layer_types", "does not name one attention kind per layer", f"{layers} of {full} or {sliding}")
        return tuple(raw)
    if arch.sliding == "all":
        return (sliding,) * layers
    if arch.sliding == "after_max_window_layers" and config.get("use_sliding_window"):
        first = _number(config, "max_window_layers", int, 0, MAX_LAYERS, layers)
        return tuple(sliding if layer >= first else full for layer in range(layers))
    if arch.sliding == "pattern":
        every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
        every = _number({"sliding_window_pattern": every}, "sliding_window_pattern", int, 1, MAX_LAYERS)
        return tuple(full if (layer + 1) % every == 0 else sliding for layer in range(layers))
    return (full,) * layers


def resolve_spec(arch: Architecture, config: Mapping[str, Any]) -> ModelSpec:
    """Resolve a table row against ``config`` (the parsed ``config.json``).

    Raises InputError naming the key that is missing, of the wrong kind or out of range.
    """
    config = {**arch.defaults, **config}
    layers = _number(config, "num_hidden_layers", int, 1, MAX_LAYERS)
    hidden = _number(config, "hidden_size", int, 1, 1 << 20)
    heads = _number(config, "num_attention_heads", int, 1, 1 << 14)
    kv_heads = config.get("num_key_value_heads")
    kv_heads = heads if kv_heads is None else _number(config, "num_key_value_heads", int, 1, heads)
    if heads % kv_heads:
        raise InputError("config.json: num_key_value_heads", f"{kv_heads} does not divide {heads} attention heads", "a divisor")
    if config.get("head_dim") is None and hidden % heads:
        raise InputError("config.json: num_attention_heads", f"{heads} does not divide hidden_size {hidden}", "a divisor or head_dim")
    head_dim = hidden // heads if config.get("head_dim") is None else _number(config, "head_dim", int, 2, 1 << 14)
    if head_dim % 2:
        raise InputError("config.json: head_dim", f"is {head_dim}", "an even number (rotary pairs)")
    vocab = _number(config, "vocab_size", int, 1, 1 << 28)
    key = next((k for k in arch.activation_keys if config.get(k)), arch.activation_keys[0])
    activation = config.get(key)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise InputError(f"config.json: {key}", f"is {activation!r}", f"one of {', '.join(ACTIVATIONS)}")
    layer_types = _layer_types(arch, config, layers)
    window = config.get("sliding_window")
    if config.get("use_sliding_window") is False:
        window = None
    if window is not None:
        window = _number(config, "sliding_window", int, 1, 1 << 31)
    query_scalar = config.get("query_pre_attn_scalar")
    scale = head_dim if query_scalar is None else _number(config, "query_pre_attn_scalar", float, 1e-6, 1e9)
    linears = {}
    for linear in arch.linears:
        bias = bool(config.get(linear.bias, False)) if isinstance(linear.bias, str) else linear.bias
        linears[linear.role] = Linear(linear.role, linear.name, linear.out, linear.inp, linear.gguf, bias)

    def cap(name: str) -> float | None:
        return None if config.get(name) is None else float(_number(config, name, float, 1e-6, 1e9))

    return ModelSpec(
        architecture=arch,
        layers=layers,
        dims=MappingProxyType(
            {
                "hidden": Dim(hidden),
                "heads": Dim(heads, head_dim),
                "kv_heads": Dim(kv_heads, head_dim),
                "ffn": Dim(_number(config, "intermediate_size", int, 1, 1 << 24)),
                "vocab": Dim(vocab),
            }
        ),
        head_dim=head_dim,
        linears=MappingProxyType(linears),
        norms=MappingProxyType({norm.role: norm for norm in arch.norms}),
        eps=_number(config, "rms_norm_eps", float, 0.0, 1.0, 1e-6),
        activation=ACTIVATIONS[activation],
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_scale=scale**-0.5,
        attention_softcap=cap("attn_logit_softcapping"),
        logit_softcap=cap("final_logit_softcapping"),
        windows=tuple(window if kind == "sliding_attention" else None for kind in layer_types),
        ropes=_ropes(config, layer_types),
        max_positions=_number(config, "max_position_embeddings", int, 1, 1 << 31, 2048),
        bos_ids=_ids(config.get("bos_token_id"), vocab),
        eos_ids=_ids(config.get("eos_token_id"), vocab),
    )
