"""A model as data: the frozen facts that the decoder, the quantizers, the plan and GGUF all read.

``Architecture`` is a table row (what a family of models looks like); ``ModelSpec`` is a row resolved against one
``config.json``. Nothing here imports torch, touches weights, or has code per model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from quantkit.errors import InputError


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of a block: ``y = x W^T + b`` with W ``[out, inp]``; ``out`` and ``inp`` are named dims.

    Roles are what a linear does; ``name`` is where it is stored. Of a fused projection several roles have one name.
    """

    role: str
    name: str
    out: str
    inp: str
    gguf: str
    bias: bool | str = False
    """True, False, or the config key that says so."""
    fused: tuple[str, ...] = ()
    """The roles whose rows the stored tensor holds one after the other, this one among them; () when it is stored alone."""
    transposed: bool = False
    """The float weight is stored ``[K, N]``."""
    quantize: bool = True
    """False: a router or gate, which is never quantized and is whole on every rank."""


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
class Experts:
    """How a family lays out its mixture of experts. In ``linears`` the roles and names of one expert hold "{expert}".

    ``shared`` are the linears of an expert that every token takes, none where there is no such expert.
    """

    router: Linear
    linears: tuple[Linear, ...]
    shared: tuple[Linear, ...] = ()
    count_key: str = "num_experts"
    top_k_key: str = "num_experts_per_tok"
    size_key: str = "moe_intermediate_size"
    normalize: bool | str = True
    """Whether the weights of the chosen experts are made to sum to 1, or the config key that says so."""
    stacked: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Module of all experts in one tensor -> the roles whose rows it holds for each expert (``{expert}`` in them)."""


@dataclass(frozen=True, slots=True)
class Moe:
    """The mixture of experts of one model. ``sparse``: per layer, whether it has one."""

    experts: int
    top_k: int
    normalize: bool
    shared: bool
    sparse: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class GgufRules:
    """What readers of GGUF files take for granted of a family, since no key says it. Source: llama.cpp's loaders."""

    head: str = "optional"
    """"optional": where a file has no head, the embedding is it; "required"; "never"."""
    biases: tuple[str, ...] = ("q", "k", "v")
    """Roles whose biases are read where they are there."""
    rope_tables: frozenset[str] = frozenset()
    """The kinds of rotary scaling, of those that need a table of factors, whose table is read."""
    wide_heads: bool = True
    """Heads may be wider or narrower, all together, than the hidden size."""
    grouped: bool = True
    """There may be fewer key heads than query heads."""
    normalized: bool = True
    """Whether the weights of the chosen experts are made to sum to 1."""
    caps: tuple[str, ...] = ()
    """Soft caps (keys of config.json) that are read."""
    period: int | None = None
    """Windows are honoured, and every so many layers sees all where no pattern is given; None: every layer sees all."""
    window_stated: bool = False
    """A window is guessed where the file has none: none is written as 0."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table: a family of decoders."""

    name: str
    model_type: str
    hf_classes: tuple[str, ...]
    gguf: str | None
    """What its GGUF files call themselves: several families may share a name. None: there are no such files."""
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
    norm_kind: str = "rms"
    """"rms", or "layer": LayerNorm with a bias."""
    position_table: str | None = None
    """The module of learned positions, which are added to the embedding; None: rotary."""
    prefix: str = "model."
    """What names begin with, but for the head's, and what a checkpoint of the base model alone leaves out."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Module of a block as other writers call it -> as this table does."""
    buffers: tuple[str, ...] = ()
    """Ends of tensor names that old checkpoints carry and nothing uses."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Config key as other families call it -> as this one does, which wins where a config has both."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Config switches that change what a block computes, and the only value that is known here."""
    ffn_multiple: int | None = None
    """The MLP's width in hidden sizes where config.json does not say it."""
    ffn_divisor: int = 1
    """What intermediate_size counts more than once (Qwen of the first generation counts both halves of the gated MLP)."""
    experts: Experts | None = None
    gguf_rope_permuted: bool = False
    """GGUF stores q and k rows interleaved for this family (``gguf.md`` 5.4)."""
    gguf_rules: GgufRules = field(default_factory=GgufRules)
    sliding: str = "none"
    """Which layers slide when config.json has no ``layer_types``: "none", "all", "alternate",
    "after_max_window_layers", "alternate_before_max_window_layers", "pattern"."""
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


IGNORED_SUFFIX = "rotary_emb.inv_freq"
"""Old checkpoints store the rotary frequencies, which follow from config.json."""
ALWAYS = frozenset({"q", "k", "v", "o"})
FFN_DIMS = ("ffn", "expert_ffn", "shared_ffn")
"""Dims between two linears of a block, which nothing else sees."""


def padded_size(size: int, tp: int, granule: int) -> int:
    """The least size from ``size`` on of which each of ``tp`` ranks gets as many whole granules."""
    unit = tp * granule
    return math.ceil(size / unit) * unit


def is_sparse(role: str) -> bool:
    """Whether a role belongs to a mixture of experts, not to a dense MLP."""
    return role in ("router", "shared_gate") or role.startswith(("experts.", "shared."))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model, resolved: everything that code may ask about it except its weights."""

    architecture: Architecture
    layers: int
    dims: Mapping[str, Dim]
    """hidden, heads, kv_heads, vocab; ffn; with experts also expert_ffn, shared_ffn, experts and one."""
    head_dim: int
    linears: Mapping[str, Linear]
    """By role, in block order, those of all layers; biases resolved to True or False."""
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
    rotary_dim: int = 0
    """How many elements of a head are rotated; the rest stay."""
    moe: Moe | None = None

    @property
    def norm_parts(self) -> tuple[str, ...]:
        """What a norm stores."""
        return ("weight", "bias") if self.architecture.norm_kind == "layer" else ("weight",)

    @property
    def position_table(self) -> str | None:
        """The module of learned positions, None with rotary ones."""
        return self.architecture.position_table

    @property
    def stretches(self) -> bool:
        """Whether texts may be longer than ``max_positions``, as "dynamic" rotary scaling makes them."""
        return self.position_table is None and any(rope.kind == "dynamic" for rope in self.ropes)

    def ignores(self, name: str) -> bool:
        """Whether a stored tensor is one that old checkpoints carry and nothing uses."""
        return name.endswith((IGNORED_SUFFIX, *self.architecture.buffers))

    def tensor(self, layer: int, name: str) -> str:
        """The full name of a block's module: ``tensor(3, "mlp.up_proj")`` -> ``model.layers.3.mlp.up_proj``."""
        return self.architecture.block.format(layer=layer) + name

    def block_linears(self, layer: int) -> dict[str, str]:
        """Role -> full module path, for the linears that one block has."""
        sparse = self.moe is not None and self.moe.sparse[layer]
        return {
            role: self.tensor(layer, linear.name) for role, linear in self.linears.items() if role in ALWAYS or sparse == is_sparse(role)
        }

    def block_modules(self, layer: int) -> dict[str, tuple[str, ...]]:
        """Full module path -> the roles that are stored there, in order, for one block."""
        found: dict[str, tuple[str, ...]] = {}
        for role, path in self.block_linears(layer).items():
            found.setdefault(path, self.linears[role].fused or (role,))
        return found

    def rows(self, role: str) -> range:
        """The rows (outputs) of the stored tensor that are those of ``role``."""
        first = 0
        for other in self.linears[role].fused:
            if other == role:
                break
            first += self.linear_shape(other)[0]
        return range(first, first + self.linear_shape(role)[0])

    def stored_shape(self, role: str) -> tuple[int, int]:
        """``(N, K)`` of the linear that is stored for ``role``, all fused rows together."""
        n, k = self.linear_shape(role)
        fused = self.linears[role].fused
        return (sum(self.linear_shape(other)[0] for other in fused), k) if fused else (n, k)

    def scale_groups(self, layer: int) -> tuple[ScaleGroup, ...]:
        """What can absorb a per-channel scale before which linears, for one block."""
        roles = self.block_linears(layer)
        if "router" not in roles:
            return tuple(g for g in self.architecture.scale_groups if all(role in roles for role in g.targets))
        first = [g for g in self.architecture.scale_groups if all(role in roles for role in g.targets)]
        readers = tuple(role for role in roles if role in ("router", "shared_gate") or role.rpartition(".")[2] in ("gate", "up"))
        inner = [ScaleGroup(role, (f"{role[:-2]}down",)) for role in roles if role.endswith(".up")]
        return (*first, ScaleGroup("pre_ffn", readers), *inner)

    def all_linears(self) -> list[str]:
        """Full module paths of every block linear in order, then the head unless it is tied."""
        names = [path for layer in range(self.layers) for path in self.block_modules(layer)]
        return names if self.tied else [*names, self.architecture.head]

    def linear_shape(self, role: str) -> tuple[int, int]:
        """``(N, K)`` of a block linear."""
        linear = self.linears[role]
        return self.dims[linear.out].elements, self.dims[linear.inp].elements


ACTIVATIONS = MappingProxyType({"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"})
ROPE_KINDS = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3"})
MAX_LAYERS = 1024
MAX_EXPERTS = 1024


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


def _rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    """How many elements of each head are rotated: all, or the share that the config says."""
    raw = config.get("rope_parameters") or config.get("rope_scaling") or {}
    partial = raw.get("partial_rotary_factor") if isinstance(raw, dict) else None
    partial = config.get("partial_rotary_factor") if partial is None else partial
    if partial is None:
        return head_dim
    known = isinstance(partial, (int, float)) and not isinstance(partial, bool) and 0 < partial <= 1
    width = int(head_dim * partial) if known else 0
    if not width or width % 2:
        raise InputError("config.json: partial_rotary_factor", f"is {partial!r:.50}", f"a share of {head_dim} that is an even number")
    return width


def _rope(raw: Mapping[str, Any], theta: float, config: Mapping[str, Any]) -> Rope:
    kind = raw.get("rope_type", raw.get("type"))
    kind = "default" if kind is None else kind
    if kind == "su" or (kind == "yarn" and "short_factor" in raw):  # what the first Phi-3 models call it
        kind = "longrope"
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise InputError("config.json: rope scaling", f"kind {kind!r}", f"one of {', '.join(sorted(ROPE_KINDS))}")
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
    if arch.sliding == "alternate":
        return tuple(full if layer % 2 else sliding for layer in range(layers))
    if arch.sliding == "alternate_before_max_window_layers" and config.get("use_sliding_window"):
        last = _number(config, "max_window_layers", int, 0, MAX_LAYERS, layers)
        return tuple(sliding if layer % 2 == 0 and layer < last else full for layer in range(layers))
    if arch.sliding == "after_max_window_layers" and config.get("use_sliding_window"):
        first = _number(config, "max_window_layers", int, 0, MAX_LAYERS, layers)
        return tuple(sliding if layer >= first else full for layer in range(layers))
    if arch.sliding == "pattern":
        every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
        every = _number({"sliding_window_pattern": every}, "sliding_window_pattern", int, 1, MAX_LAYERS)
        return tuple(full if (layer + 1) % every == 0 else sliding for layer in range(layers))
    return (full,) * layers


def _sparse_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers of a family whose layers may have experts or a dense MLP have experts."""
    step = _number(config, "decoder_sparse_step", int, 1, MAX_LAYERS, 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise InputError("config.json: mlp_only_layers", f"is {dense!r:.100}", "a list of layer numbers")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _moe(arch: Architecture, experts: Experts, config: Mapping[str, Any], layers: int) -> Moe:
    """The mixture of experts of ``config``, and which layers have it."""
    count = _number(config, experts.count_key, int, 1, MAX_EXPERTS)
    top_k = _number(config, experts.top_k_key, int, 1, count)
    sparse = _sparse_layers(config, layers) if any(linear.role == "down" for linear in arch.linears) else (True,) * layers
    normalize = experts.normalize if isinstance(experts.normalize, bool) else bool(config.get(experts.normalize, False))
    return Moe(count, top_k, normalize, bool(experts.shared), sparse)


def _expert_linears(experts: Experts, moe: Moe) -> tuple[Linear, ...]:
    """The linears of a sparse layer's experts: the router, each expert's own, and the shared one's."""
    own = [
        replace(linear, role=linear.role.format(expert=expert), name=linear.name.format(expert=expert))
        for expert in range(moe.experts)
        for linear in experts.linears
    ]
    return (experts.router, *own, *experts.shared)


def resolve_spec(arch: Architecture, config: Mapping[str, Any]) -> ModelSpec:
    """Resolve a table row against ``config`` (the parsed ``config.json``).

    Raises InputError naming the key that is missing, of the wrong kind or out of range.
    """
    config = {**arch.defaults, **config, **{key: config[own] for key, own in arch.keys.items() if config.get(own) is not None}}
    for key, known in arch.required.items():
        if config.get(key, known) != known:
            raise InputError(f"config.json: {key}", f"is {config[key]!r:.50}", f"{known!r}: this model computes something else with it")
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
    moe = None if arch.experts is None else _moe(arch, arch.experts, config, layers)
    dense = arch.linears if moe is None or not all(moe.sparse) else tuple(linear for linear in arch.linears if linear.role in ALWAYS)
    linears = {}
    for linear in (*dense, *(() if moe is None or arch.experts is None or not any(moe.sparse) else _expert_linears(arch.experts, moe))):
        bias = bool(config.get(linear.bias, False)) if isinstance(linear.bias, str) else linear.bias
        linears[linear.role] = replace(linear, bias=bias)
    dims = {
        "hidden": Dim(hidden),
        "heads": Dim(heads, head_dim),
        "kv_heads": Dim(kv_heads, head_dim),
        "vocab": Dim(vocab),
    }
    if any(linear.out == "ffn" for linear in linears.values()):
        if config.get("intermediate_size") is None and arch.ffn_multiple is not None:
            config["intermediate_size"] = arch.ffn_multiple * hidden
        dims["ffn"] = Dim(_number(config, "intermediate_size", int, arch.ffn_divisor, 1 << 24) // arch.ffn_divisor)
    if moe is not None and arch.experts is not None and any(moe.sparse):
        dims["experts"] = Dim(moe.experts)
        dims["expert_ffn"] = Dim(_number(config, arch.experts.size_key, int, 1, 1 << 24))
        if moe.shared:
            dims["one"] = Dim(1)
            dims["shared_ffn"] = Dim(_number(config, "shared_expert_intermediate_size", int, 1, 1 << 24))

    def cap(name: str) -> float | None:
        return None if config.get(name) is None else float(_number(config, name, float, 1e-6, 1e9))

    return ModelSpec(
        architecture=arch,
        layers=layers,
        dims=MappingProxyType(dims),
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
        rotary_dim=0 if arch.position_table is not None else _rotary_dim(config, head_dim),
        moe=moe,
    )
