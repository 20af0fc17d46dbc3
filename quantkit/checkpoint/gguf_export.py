"""A Hugging Face model as GGUF says it: hyper-parameters, the names and shapes of tensors, and any rows of them (``gguf.md`` 5.1 to 5.4).

The way back is ``checkpoint.gguf``. All names come from the architecture table. What a reader of GGUF would compute otherwise is
refused, since a file cannot say it; where readers differ only beyond some length of text, the plan has a note. Knows neither
tokenizers nor block types, and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.arch.spec import ACTIVATIONS, ModelSpec, Rope
from quantkit.checkpoint.gguf import expert_of
from quantkit.checkpoint.gguf_config import (
    BLOCK,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    POSITIONS,
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    llama3_divisors,
    query_scalar,
)
from quantkit.errors import InputError
from quantkit.formats.gguf import BOOL, Value, array, f32, text, u32

Floats = NDArray[np.float32]
Read = Callable[[str, tuple[slice, ...] | None], Floats]
"""A tensor of the model, or plain ranges of it, one per axis, as float32 in the axes that the float checkpoint has."""

QUANTIZATION_VERSION = 2
GATES = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", f"{POSITIONS}.weight")
"""Matrices that readers expect in float32."""
SIZES = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3))


@dataclass(frozen=True, slots=True)
class SourceRows:
    """Where some rows of a tensor lie: ``module.suffix`` of the model, ``rows`` of them. ``transposed``: it is stored ``[K, N]``."""

    module: str
    suffix: str
    rows: int
    transposed: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.suffix}"


@dataclass(frozen=True, slots=True, eq=False)
class ExportTensor:
    """A tensor of the file, ``shape`` slowest axis first. Its rows are those of ``sources`` one after the other, or ``constant``.

    ``float_only``: it is stored as F32 whatever the rest is. ``head_dim``: the rows of each head are interleaved. ``offset`` is
    added to every value.
    """

    name: str
    shape: tuple[int, ...]
    float_only: bool
    sources: tuple[SourceRows, ...]
    head_dim: int | None = None
    offset: float = 0.0
    constant: Floats | None = None

    @property
    def source_names(self) -> tuple[str, ...]:
        """The tensors of the model that hold it; of a quantized linear, the weight that it stands for."""
        return tuple(source.name for source in self.sources)

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The file without its tokenizer and type: metadata in the order of the file, tensors in order, and what a user should know."""

    metadata: dict[str, Value]
    tensors: tuple[ExportTensor, ...]
    notes: tuple[str, ...] = ()


def export_plan(config: Mapping[str, Any], spec: ModelSpec, tensors: Iterable[str]) -> ExportPlan:
    """How the model of ``config`` (resolved: ``spec``) is said in GGUF. ``tensors`` are the names that its checkpoint has.

    Experts are expected apart and under the names of the table, as ``Checkpoint`` gives them. Raises InputError for a model that
    readers of GGUF would compute otherwise, and for tensors that are missing or that the model does not use.
    """
    arch = spec.architecture
    _check(config, spec)
    rope, tables, notes = _rope(config, spec)
    windows, more = _windows(config, spec)
    planned = (*tables, *_tensors(spec))
    _check_names(spec, planned, tensors)
    name = config.get("_name_or_path")
    general = {
        "general.architecture": text(str(arch.gguf)),
        "general.type": text("model"),
        # A path says where the model was trained or kept: its last part is the name.
        **({"general.name": text(name.rstrip("/").rpartition("/")[2])} if isinstance(name, str) and name.strip("/.") else {}),
        "general.size_label": text(_size_label(spec, planned)),
    }
    own = {**_sizes(config, spec), **rope, **windows}
    metadata = {
        **general,
        **{f"{arch.gguf}.{key}": value for key, value in own.items()},
        "general.quantization_version": u32(QUANTIZATION_VERSION),
    }
    return ExportPlan(metadata, planned, (*notes, *more))


def read_rows(tensor: ExportTensor, rows: range, read: Read) -> Floats:
    """``rows`` of a tensor over all its axes but the last, float32 ``[len(rows), K]``; a tensor of one axis has one row.

    Of the model only those rows are read. Where ``head_dim`` is set they are a whole number of heads.
    """
    assert rows.step == 1 and 0 <= rows.start <= rows.stop <= tensor.rows, (tensor.name, rows)
    if tensor.constant is not None:
        return tensor.constant.reshape(tensor.rows, -1)[rows.start : rows.stop]
    if len(tensor.shape) == 1:
        vector = _as_stored(read(tensor.sources[0].name, None).reshape(-1, 1), tensor)
        return vector.reshape(1, -1)[rows.start : rows.stop]
    parts, first = [], 0
    for source in tensor.sources:
        some = range(max(rows.start, first) - first, min(rows.stop, first + source.rows) - first)
        if some:
            whole = slice(0, tensor.shape[-1])
            wanted = slice(some.start, some.stop)
            part = read(source.name, (whole, wanted)).T if source.transposed else read(source.name, (wanted, whole))
            parts.append(_as_stored(part, tensor))
        first += source.rows
    if not parts:
        return np.empty((0, tensor.shape[-1]), np.float32)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _as_stored(values: Floats, tensor: ExportTensor) -> Floats:
    """Whole heads ``[N, K]`` of the model as the file has them."""
    if tensor.head_dim is not None:
        # Row p * head_dim/2 + k of a head is row 2k + p in the file.
        halves = values.reshape(-1, 2, tensor.head_dim // 2, values.shape[1])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values + np.float32(tensor.offset) if tensor.offset else values)


# tensors


def _tensors(spec: ModelSpec) -> Iterator[ExportTensor]:
    """Every tensor of the file but the tables of rotary scaling, in order."""
    arch = spec.architecture
    hidden, vocab = spec.dims["hidden"].elements, spec.dims["vocab"].elements
    yield _matrix(f"{EMBEDDING}.weight", arch.embedding, vocab, hidden)
    if spec.position_table is not None:
        yield _matrix(f"{POSITIONS}.weight", spec.position_table, spec.max_positions, hidden)
    for layer in range(spec.layers):
        block = BLOCK.format(layer=layer)
        for norm in spec.norms.values():
            yield from _norm(spec, block + norm.gguf, spec.tensor(layer, norm.name), spec.head_dim if norm.width == "head" else hidden)
        yield from _linears(spec, layer, block)
    yield from _norm(spec, FINAL_NORM, arch.final_norm, hidden)
    if not spec.tied:
        yield _matrix(f"{HEAD}.weight", arch.head, vocab, hidden)


def _matrix(name: str, module: str, rows: int, columns: int) -> ExportTensor:
    return ExportTensor(name, (rows, columns), name.endswith(GATES), (SourceRows(module, "weight", rows),))


def _norm(spec: ModelSpec, gguf: str, module: str, width: int) -> Iterator[ExportTensor]:
    for part in spec.norm_parts:
        yield ExportTensor(f"{gguf}.{part}", (width,), True, (SourceRows(module, part, 1),), offset=spec.architecture.norm_offset)


def _linears(spec: ModelSpec, layer: int, block: str) -> Iterator[ExportTensor]:
    """The linears of a block, those of all experts in one tensor."""
    experts: dict[str, list[str]] = {}
    for path, roles in spec.block_modules(layer).items():
        if expert_of(roles[0]) is not None:
            experts.setdefault(spec.linears[roles[0]].gguf, []).append(path)
    for path, (role, *_) in spec.block_modules(layer).items():
        linear, (n, k) = spec.linears[role], spec.stored_shape(role)
        name = f"{block}{linear.gguf}.weight"
        if (expert := expert_of(role)) is not None:
            if expert == 0:
                stacked = experts[linear.gguf]
                yield ExportTensor(name, (len(stacked), n, k), False, tuple(SourceRows(module, "weight", n) for module in stacked))
            continue
        interleaved = spec.head_dim if spec.architecture.gguf_rope_permuted and role in ("q", "k") else None
        yield ExportTensor(name, (n, k), name.endswith(GATES), (SourceRows(path, "weight", n, linear.transposed),), interleaved)
        if linear.bias:
            yield ExportTensor(f"{block}{linear.gguf}.bias", (n,), True, (SourceRows(path, "bias", 1),), interleaved)


def _check_names(spec: ModelSpec, planned: Iterable[ExportTensor], tensors: Iterable[str]) -> None:
    """Raise InputError unless the checkpoint has every module, in whatever format, and nothing that the model does not use."""
    names = set(tensors)
    wanted = {source.name: source.module for tensor in planned for source in tensor.sources}
    modules = set(wanted.values())
    if spec.tied:
        modules.add(spec.architecture.head)  # stored or not, the embedding stands for it
    found = set()
    for name in names:
        parts = name.split(".")
        module = next((known for end in range(len(parts), 0, -1) if (known := ".".join(parts[:end])) in modules), None)
        unused_head = spec.tied and module == spec.architecture.head
        bias = name == f"{module}.bias" and name not in wanted and not unused_head
        if (module is None or bias) and not spec.ignores(name):
            what = f"is no tensor of a {spec.architecture.name} model as config.json describes it"
            raise InputError(name, what, "only tensors that the model uses")
        found.add(module)
    for name, module in wanted.items():
        if module not in found or (name.endswith(".bias") and name not in names):
            raise InputError(name, "is missing from the checkpoint", f"a tensor of a {spec.architecture.name} model")


def _size_label(spec: ModelSpec, planned: Iterable[ExportTensor]) -> str:
    """The number of weights for people: "135M", or "8x1.5B" of which the first is the experts and the second the weights with one."""
    total = sum(math.prod(tensor.shape) // (tensor.shape[0] if len(tensor.shape) == 3 else 1) for tensor in planned)
    unit, size = next(((unit, size) for unit, size in SIZES if total > size), SIZES[-1])
    digits = max(2 - len(str(round(total / size)).lstrip("0")), 0)
    label = f"{total / size:.{digits}f}{unit}"
    return label if spec.moe is None else f"{spec.moe.experts}x{label}"


# hyper-parameters


def _refusal(key: str, what: str, expected: str) -> InputError:
    return InputError(f"config.json: {key}", what, f"{expected}: GGUF cannot say otherwise")


def _check(config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raise InputError for what a reader of GGUF would compute otherwise than this model does."""
    arch, rules = spec.architecture, spec.architecture.gguf_rules
    if arch.gguf is None:
        raise InputError("config.json: model_type", f"is {arch.model_type!r}, which GGUF does not have", "a family that it has")
    hidden, heads, kv_heads = (spec.dims[name] for name in ("hidden", "heads", "kv_heads"))
    key = arch.activation_keys[0]
    if spec.activation != ACTIVATIONS[arch.defaults[key]]:
        raise _refusal(key, f"is {spec.activation}", str(arch.defaults[key]))
    if (rules.head == "never" and not spec.tied) or (rules.head == "required" and spec.tied):
        raise _refusal("tie_word_embeddings", f"is {str(spec.tied).lower()}", f"{str(not spec.tied).lower()} of a {arch.name} model")
    for role, linear in spec.linears.items():
        if linear.bias and role not in rules.biases:
            row = next(own for own in arch.linears if own.role == role)
            raise _refusal(str(row.bias), f"gives {linear.name} a bias", f"none there in a {arch.name} model")
    if not rules.wide_heads and heads.elements != hidden.elements:
        raise _refusal("head_dim", f"makes {heads.size} heads {heads.elements} wide", f"{hidden.elements}, the hidden size")
    if not rules.grouped and heads.size != kv_heads.size:
        raise _refusal("num_key_value_heads", f"is {kv_heads.size}", f"{heads.size}, a key head for each query head")
    if arch.gguf_rope_permuted and spec.rotary_dim != spec.head_dim:
        raise _refusal("partial_rotary_factor", f"rotates {spec.rotary_dim} of {spec.head_dim}", "whole heads")
    scalar = query_scalar(arch.gguf, spec.layers, hidden.elements, heads.size, spec.head_dim)
    if not math.isclose(spec.attention_scale, scalar**-0.5, rel_tol=1e-6):
        raise _refusal("query_pre_attn_scalar", f"is {config.get('query_pre_attn_scalar')}", f"{scalar}")
    for cap, value in (("attn_logit_softcapping", spec.attention_softcap), ("final_logit_softcapping", spec.logit_softcap)):
        if value is not None and cap not in rules.caps:
            raise _refusal(cap, f"is {value}", f"none in a {arch.name} model")
        if value is None and cap in rules.caps and cap in arch.defaults:
            raise _refusal(cap, "is none", f"a number in a {arch.name} model")
    if spec.moe is not None:
        if not all(spec.moe.sparse):
            raise _refusal("decoder_sparse_step, mlp_only_layers", "leave some layers without experts", "experts in every layer")
        if spec.moe.normalize != rules.normalized:
            key = str(arch.experts.normalize) if arch.experts is not None else ""
            raise _refusal(key, f"is {str(spec.moe.normalize).lower()}", f"{str(rules.normalized).lower()} of a {arch.name} model")


def _sizes(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Value]:
    """The sizes of the model, by key without the name of the architecture (``gguf.md`` 5.2)."""
    arch, dims = spec.architecture, spec.dims
    dense = dims["ffn"].elements * arch.ffn_divisor if "ffn" in dims else config.get("intermediate_size")
    found: dict[str, Value] = {
        "block_count": u32(spec.layers),
        "context_length": u32(spec.max_positions),
        "embedding_length": u32(dims["hidden"].elements),
        **({"feed_forward_length": u32(dense)} if isinstance(dense, int) and 0 < dense < 1 << 31 else {}),
        "attention.head_count": u32(dims["heads"].size),
        "attention.head_count_kv": u32(dims["kv_heads"].size),
    }
    found["attention.layer_norm_epsilon" if arch.norm_kind == "layer" else "attention.layer_norm_rms_epsilon"] = f32(spec.eps)
    if spec.position_table is None:
        found |= {"attention.key_length": u32(spec.head_dim), "attention.value_length": u32(spec.head_dim)}
    found["vocab_size"] = u32(dims["vocab"].elements)
    for key, cap in (("attn_logit_softcapping", spec.attention_softcap), ("final_logit_softcapping", spec.logit_softcap)):
        if cap is not None:
            found[key] = f32(cap)
    if spec.moe is not None and arch.experts is not None:
        found |= {"expert_count": u32(spec.moe.experts), "expert_used_count": u32(spec.moe.top_k)}
        if arch.experts.size_key != "intermediate_size":
            found["expert_feed_forward_length"] = u32(dims["expert_ffn"].elements)
        if spec.moe.shared:
            found["expert_shared_feed_forward_length"] = u32(dims["shared_ffn"].elements)
    return found


def _windows(config: Mapping[str, Any], spec: ModelSpec) -> tuple[dict[str, Value], tuple[str, ...]]:
    """The sliding window and, where readers would not guess it, which layers have it; and notes."""
    arch, rules = spec.architecture, spec.architecture.gguf_rules
    slides = [window is not None for window in spec.windows]
    if not any(slides):
        if rules.window_stated and rules.period is not None:
            raise _refusal("layer_types", "give no layer a sliding window", f"one in some layers of a {arch.name} model")
        return ({"attention.sliding_window": u32(0)} if rules.window_stated else {}), ()
    window = next(window for window in spec.windows if window is not None)
    found = {"attention.sliding_window": u32(window)}
    guessed: list[bool] | None = None
    if rules.period is not None:
        guessed = [bool((layer + 1) % rules.period) for layer in range(spec.layers)]
    elif arch.sliding == "all" and "use_sliding_window" not in arch.defaults:
        guessed = [True] * spec.layers
    if slides != guessed:
        found["attention.sliding_window_pattern"] = array(BOOL, slides)
    if rules.period is not None or window >= spec.max_positions:
        return found, ()
    return found, (f"llama.cpp ignores the sliding window of a {arch.name} model: beyond {window} tokens its results differ",)


def _rope(config: Mapping[str, Any], spec: ModelSpec) -> tuple[dict[str, Value], tuple[ExportTensor, ...], tuple[str, ...]]:
    """The keys of the rotary embedding, its tables of factors, and notes (``gguf.md`` 5.2, 5.4)."""
    if spec.position_table is not None:
        return {}, (), ()
    arch = spec.architecture
    pairs = list(zip(spec.ropes, spec.windows, strict=True))
    rope = next((rope for rope, window in pairs if window is None), spec.ropes[0])
    local = next((rope for rope, window in pairs if window is not None), rope)
    found = {"rope.dimension_count": u32(spec.rotary_dim), "rope.freq_base": f32(rope.theta)}
    if "rope_local_base_freq" in arch.defaults:
        if any(window is not None for window in spec.windows):
            if local.kind != "default":
                raise _refusal("rope_parameters: sliding_attention", f"is {local.kind}", "the default kind in layers with a window")
            found["rope.freq_base_swa"] = f32(local.theta)
    elif any((one.theta, one.kind) != (rope.theta, rope.kind) for one in spec.ropes):
        raise _refusal("rope_parameters", "differ from layer to layer", f"one kind and base in all layers of a {arch.name} model")
    scaling, tables, notes = _scaling(config, spec, rope)
    return found | scaling, tables, notes


def _positive(rope: Rope, key: str, default: float) -> float:
    value = rope.parameters.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"config.json: rope_parameters: {key}", f"is {value!r:.100}", "a positive number")
    return float(value)


def _scaling(config: Mapping[str, Any], spec: ModelSpec, rope: Rope) -> tuple[dict[str, Value], tuple[ExportTensor, ...], tuple[str, ...]]:
    arch, context = spec.architecture, spec.max_positions
    if rope.kind in ("longrope", "llama3") and rope.kind not in arch.gguf_rules.rope_tables:
        raise _refusal("rope_parameters: rope_type", f"is {rope.kind}", f"a kind that a {arch.name} model can have")
    original = _positive(rope, "original_max_position_embeddings", context)
    if rope.kind == "llama3":
        return {}, (_llama3(spec, rope, original),), ()
    if rope.kind == "yarn":
        return _yarn(rope, original, context)
    if rope.kind == "longrope":
        return _longrope(spec, rope, original)
    found: dict[str, Value] = {}
    if "original_max_position_embeddings" in arch.defaults:
        original = _positive(rope, "original_max_position_embeddings", arch.defaults["original_max_position_embeddings"])
        found["rope.scaling.original_context_length"] = u32(round(original))
    if rope.kind == "linear":
        found |= {"rope.scaling.type": text("linear"), "rope.scaling.factor": f32(_positive(rope, "factor", 1.0))}
    if rope.kind == "dynamic":
        return found, (), (f"GGUF has no dynamic rotary scaling: beyond {context} tokens results differ",)
    return found, (), ()


def _table(name: str, values: NDArray[np.float64]) -> ExportTensor:
    return ExportTensor(name, (len(values),), True, (), constant=values.astype(np.float32))


def _llama3(spec: ModelSpec, rope: Rope, original: float) -> ExportTensor:
    usual = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factor, low, high = (_positive(rope, key, value) for key, value in usual.items())
    if high <= low:
        raise InputError("config.json: rope_parameters: high_freq_factor", f"is {high}", f"more than low_freq_factor {low}")
    waves = 2 * math.pi * rope.theta ** (np.arange(0, spec.head_dim, 2) / spec.head_dim)
    return _table(ROPE_FREQS, llama3_divisors(waves, factor, original / low, high / low))


def _yarn(rope: Rope, original: float, context: int) -> tuple[dict[str, Value], tuple[ExportTensor, ...], tuple[str, ...]]:
    if not rope.parameters.get("truncate", True):
        raise _refusal("rope_parameters: truncate", "is false", "true with yarn")
    factor = _positive(rope, "factor", context / original)
    found = {
        "rope.scaling.type": text("yarn"),
        "rope.scaling.factor": f32(factor),
        "rope.scaling.original_context_length": u32(round(original)),
    }

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scales = rope.parameters.get("mscale") and rope.parameters.get("mscale_all_dim")
    usual = magnitude(_positive(rope, "mscale", 1.0)) / magnitude(_positive(rope, "mscale_all_dim", 1.0)) if scales else magnitude(1.0)
    attention = _positive(rope, "attention_factor", usual)
    if not math.isclose(attention, magnitude(1.0), rel_tol=1e-9):
        # Converters write the first, and readers go by the second: a factor on what they would take.
        found["rope.scaling.yarn_attn_factor"] = f32(attention)
        found["rope.scaling.attn_factor"] = f32(attention / magnitude(1.0))
    notes = []
    for key, usually in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        beta = _positive(rope, key, usually)
        if beta != usually:
            found[f"rope.scaling.yarn_{key}"] = f32(beta)
            notes.append(f"llama.cpp takes {usually:g} for yarn's {key}, not {beta:g}: its results differ a little")
    return found, (), tuple(notes)


def _longrope(spec: ModelSpec, rope: Rope, original: float) -> tuple[dict[str, Value], tuple[ExportTensor, ...], tuple[str, ...]]:
    """Source of the scale: Ding et al. 2024, LongRoPE."""
    stretch = _positive(rope, "factor", spec.max_positions / original)
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0
    tables = []
    for key, name in (("long_factor", ROPE_LONG), ("short_factor", ROPE_SHORT)):
        values = rope.parameters.get(key)
        good = isinstance(values, (list, tuple)) and len(values) == spec.rotary_dim // 2
        if not good or not all(isinstance(value, (int, float)) and 0 < value < math.inf for value in values or ()):
            raise InputError(f"config.json: rope_parameters: {key}", "is not a factor per rotary pair", f"{spec.rotary_dim // 2} numbers")
        tables.append(_table(name, np.array(values, np.float64)))
    found = {
        "rope.scaling.type": text("longrope"),
        "rope.scaling.original_context_length": u32(round(original)),
        "rope.scaling.attn_factor": f32(_positive(rope, "attention_factor", usual)),
    }
    note = f"llama.cpp takes the long factors for all texts when its context is more than {original:g} tokens, not for long texts only"
    return found, tuple(tables), (note,)
