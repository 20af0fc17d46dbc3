"""A GGUF file as a Hugging Face checkpoint: a ``config.json`` from its metadata, and its tensors under Hugging Face names.

All names come from the architecture table. What the format does to a tensor is undone as it is read: blocks are decoded to
float32, interleaved query and key rows are put back, the offset of a norm is taken off (``gguf.md`` 5.2 to 5.4). What the
table or ``config.json`` cannot say is refused, so that nothing is read as a model that it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit import fs
from quantkit.arch.spec import Architecture, ModelSpec, resolve_spec
from quantkit.arch.table import BY_GGUF
from quantkit.errors import InputError
from quantkit.formats.gguf import BY_NAME, GgufFile, GgufTensor

PLAIN: Mapping[str, np.dtype[Any]] = MappingProxyType({"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")})
"""Types that are read as they are; BF16 as its bits."""
NO_WEIGHTS = frozenset(("F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0"))
"""Types that models do not have (integers, doubles, the types of intermediate results), or that nothing here decodes."""
DECODED = frozenset(BY_NAME) - frozenset(PLAIN) - NO_WEIGHTS
"""Block types that become float32."""
CHUNK_ELEMENTS = 1 << 17
"""Values decoded at a time, in arrays that stay in the processor's cache; also what bounds the memory that decoding takes."""
DTYPE = "float16"
"""What ``config.json`` says: blocks have no dtype of their own, and their scales are float16."""
MAX_LAYERS, MAX_THETA = 512, 1e12

EMBEDDING, FINAL_NORM, HEAD, BLOCK = "token_embd", "output_norm", "output", "blk.{layer}."
ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TOKENS = "tokenizer.ggml.tokens"
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""A model stops at the end of text, of a turn and of a message."""
LLAMA3_DEFAULTS = (8192, 4.0)
"""Original context and high-frequency factor of every published Llama 3, the low-frequency factor being 1."""
QUERY_SCALED_BY_WIDTH = frozenset({("gemma2", 46), ("gemma3", 62)})
"""Gemma 2 and 3 27B scale queries by hidden/heads, their sisters by the head; the format has no key for it, and readers count layers."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file and how it becomes one of the model.

    ``dtype`` is the safetensors dtype of the result. ``head_dim``: the rows of each head are interleaved. ``offset`` is
    part of every stored value.
    """

    tensor: GgufTensor
    dtype: str
    head_dim: int | None = None
    offset: float = 0.0


class GgufSource:
    """The model in a GGUF file: ``config`` as ``config.json`` would be, ``tensors`` by Hugging Face name, ``read`` of a slice.

    Raises InputError, before any weight is read, for an architecture that the table does not have, a missing or odd
    hyper-parameter, and tensors that are missing, unknown, of another shape than those say, or of a type without values.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.config, self._stored = gguf_checkpoint_facts(file)
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType({name: stored.tensor for name, stored in self._stored.items()})

    def dtype(self, name: str) -> str:
        """The safetensors dtype of what ``read`` returns: F16 and BF16 where they are stored, F32 for everything else."""
        return self._stored[name].dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> NDArray[Any]:
        """A tensor or ``index`` of it (plain ranges, one per axis) as a new numpy array, BF16 as its bits.

        Of the file only the wanted rows are read; where the rows of heads are interleaved, the heads that hold them.
        Raises InputError when the file has become shorter since it was opened.
        """
        stored = self._stored[name]
        shape = stored.tensor.shape
        index = tuple(slice(0, size) for size in shape) if index is None else index
        assert len(index) == len(shape) and all(s.step in (None, 1) for s in index), (name, index)
        ranges = [range(*s.indices(size)) for s, size in zip(index, shape, strict=True)]
        if len(ranges) == 1:  # a vector is small, and its blocks need not lie within the slice
            vector = _undone(_decoded(self.file, stored.tensor, range(1), range(shape[0])).reshape(-1, 1), stored)
            return vector.reshape(-1)[ranges[0].start : ranges[0].stop].copy()
        rows, columns = ranges
        out = np.empty((len(rows), len(columns)), dtype=PLAIN[stored.dtype])
        if not out.size:
            return out
        unit = stored.head_dim or 1
        step = max(1, CHUNK_ELEMENTS // (unit * max(shape[1], 1))) * unit
        for start in range(rows.start - rows.start % unit, rows.stop, step):
            some = range(start, min(start + step, -(-rows.stop // unit) * unit))
            values = _undone(_decoded(self.file, stored.tensor, some, columns), stored)
            first, last = max(some.start, rows.start), min(some.stop, rows.stop)
            out[first - rows.start : last - rows.start] = values[first - some.start : last - some.start]
        return out


# tensors


def _decoded(file: GgufFile, tensor: GgufTensor, rows: range, columns: range) -> NDArray[Any]:
    """``rows`` and ``columns`` as stored, ``[len(rows), len(columns)]``; of the columns' blocks only those wanted are decoded."""
    block = BY_NAME[tensor.type]
    width = tensor.shape[-1]
    row_bytes = width // block.elements * block.nbytes
    raw = b"".join(fs.read_range(file.path, tensor.offset + rows.start * row_bytes, len(rows) * row_bytes))
    first, last = columns.start // block.elements, -(-columns.stop // block.elements)
    blocks = np.frombuffer(raw, np.uint8).reshape(len(rows), width // block.elements, block.nbytes)[:, first:last]
    flat = np.ascontiguousarray(blocks).reshape(-1)
    if tensor.type in PLAIN:
        values = flat.view(PLAIN[tensor.type])
    else:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        with np.errstate(all="ignore"):  # a scale may be infinite: such values are passed on, not warned of
            values = dequantize(flat.reshape(1, -1), GGMLQuantizationType[tensor.type])
    skipped = first * block.elements
    return values.reshape(len(rows), -1)[:, columns.start - skipped : columns.stop - skipped]


def _undone(values: NDArray[Any], stored: Stored) -> NDArray[Any]:
    """``values [N, K]``, whole heads, as the model has them: rows in order, without the offset."""
    if stored.head_dim is not None:
        # Row 2k + p of a head in the file is row p * head_dim/2 + k of the model.
        pairs = values.reshape(-1, stored.head_dim // 2, 2, values.shape[1])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    if stored.offset:
        if stored.tensor.type == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        values = values.astype(np.float32) - np.float32(stored.offset)
    return values


def _stored_tensors(file: GgufFile, spec: ModelSpec, used: frozenset[str]) -> dict[str, Stored]:
    """Every tensor of the model by its Hugging Face name; ``used`` are tensors that became part of the configuration."""
    arch, found, known = spec.architecture, dict[str, Stored](), set(used)

    def take(gguf: str, name: str, shape: tuple[int, ...], head_dim: int | None = None, offset: float = 0.0) -> None:
        where = f"{file.path}: {gguf}"
        if gguf not in file.tensors:
            raise InputError(where, "is missing", f"the {name} of a {arch.name} model, {list(shape)}")
        tensor = file.tensors[gguf]
        if tensor.shape != shape:
            raise InputError(where, f"has shape {list(tensor.shape)}", f"{list(shape)} from the hyper-parameters")
        if tensor.type not in PLAIN and tensor.type not in DECODED:
            raise InputError(where, f"is of type {tensor.type}", f"one of {', '.join((*PLAIN, *sorted(DECODED)))}")
        known.add(gguf)
        found[name] = Stored(tensor, tensor.type if tensor.type in PLAIN and not offset else "F32", head_dim, offset)

    def norm(gguf: str, module: str, width: int) -> None:
        take(f"{gguf}.weight", f"{module}.weight", (width,), offset=arch.norm_offset)

    hidden, vocab = spec.dims["hidden"].elements, spec.dims["vocab"].elements
    take(f"{EMBEDDING}.weight", f"{arch.embedding}.weight", (vocab, hidden))
    for layer in range(spec.layers):
        block = BLOCK.format(layer=layer)
        for item in spec.norms.values():
            norm(block + item.gguf, spec.tensor(layer, item.name), spec.head_dim if item.width == "head" else hidden)
        for path, roles in spec.block_modules(layer).items():
            linear, (n, k) = spec.linears[roles[0]], spec.stored_shape(roles[0])
            interleaved = spec.head_dim if arch.gguf_rope_permuted and roles[0] in ("q", "k") else None
            take(f"{block}{linear.gguf}.weight", f"{path}.weight", (n, k), interleaved)
            if linear.bias:
                take(f"{block}{linear.gguf}.bias", f"{path}.bias", (n,), interleaved)
    norm(FINAL_NORM, arch.final_norm, hidden)
    if not spec.tied:
        take(f"{HEAD}.weight", f"{arch.head}.weight", (vocab, hidden))
    unknown = sorted(set(file.tensors) - known)
    if unknown:
        raise InputError(f"{file.path}: {unknown[0]}", f"has no place in a {arch.name} model", "only tensors that the model uses")
    return found


# configuration


@dataclass(frozen=True, slots=True)
class _Facts:
    """The hyper-parameters of a file, under the prefix of its architecture, each checked as it is asked for."""

    file: GgufFile
    prefix: str

    def wrong(self, key: str, what: str, expected: str) -> InputError:
        return InputError(f"{self.file.path}: {key}", what, expected)

    def _get(self, key: str, default: Any) -> Any:
        found = self.file.metadata.get(f"{self.prefix}.{key}", default)
        if found is None:
            raise self.wrong(f"{self.prefix}.{key}", "is missing", "every hyper-parameter of the architecture")
        if isinstance(found, np.ndarray):  # a value per layer
            if not len(found) or (found != found[0]).any():
                raise self.wrong(f"{self.prefix}.{key}", "differs from layer to layer", "one value for all layers")
            return found[0].item()
        return found

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 31) -> int:
        """A whole number of ``low`` to ``high``, or one per layer that are all equal; without ``default`` it must be there."""
        found = self._get(key, default)
        if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
            raise self.wrong(f"{self.prefix}.{key}", f"is {found!r:.100}", f"a whole number from {low} to {high}")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number that is not negative, as the shortest decimal that is the same float32: files hold 1e-5 as float32."""
        found = self._get(key, default)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found < math.inf:
            raise self.wrong(f"{self.prefix}.{key}", f"is {found!r:.100}", "a finite number, not negative")
        return _shortest(float(found))

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.file.metadata

    def vector(self, name: str, count: int) -> NDArray[np.float64]:
        """A tensor of ``count`` positive F32 numbers that belongs to the configuration."""
        tensor = self.file.tensors.get(name)
        if tensor is None or tensor.type != "F32" or tensor.shape != (count,):
            raise self.wrong(
                name, f"is {f'{tensor.type} {list(tensor.shape)}' if tensor else 'missing'}", f"F32 [{count}], one per rotary pair"
            )
        found = _decoded(self.file, tensor, range(1), range(count)).reshape(-1).astype(np.float64)
        if not np.isfinite(found).all() or (found <= 0).any():
            raise self.wrong(name, "holds a number that is not positive", "positive numbers")
        return found


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32; the value itself where it is no float32."""
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


def _architecture(file: GgufFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in BY_GGUF:
        what = "is missing" if name is None else f"{name!r:.100} is not in the architecture table"
        raise InputError(f"{file.path}: general.architecture", what, f"one of {', '.join(BY_GGUF)}")
    return BY_GGUF[name]


def _heads(facts: _Facts, hidden: int) -> dict[str, Any]:
    heads = facts.integer("attention.head_count")
    if not facts.has("attention.key_length") and hidden % heads:
        raise facts.wrong(f"{facts.prefix}.attention.head_count", f"{heads} does not divide {hidden}", "a divisor, or a key_length")
    head_dim = facts.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if facts.integer(key, head_dim) != head_dim:
            raise facts.wrong(f"{facts.prefix}.{key}", f"is {facts.integer(key)}", f"{head_dim}, as wide as the keys of a head")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": facts.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
    }


def _biases(file: GgufFile, arch: Architecture) -> dict[str, bool]:
    """The config keys that say which linears have biases, as the first block has them; all blocks are checked against them."""
    keys: dict[str, bool] = {}
    for linear in arch.linears:
        if isinstance(linear.bias, str):
            there = f"{BLOCK.format(layer=0)}{linear.gguf}.bias" in file.tensors
            keys[linear.bias] = keys.get(linear.bias, False) or there
    return keys


def _vocabulary(file: GgufFile, facts: _Facts) -> dict[str, Any]:
    """Size and special tokens; the size is that of the embedding, and the tokenizer must agree with it."""
    embedding = file.tensors.get(f"{EMBEDDING}.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise facts.wrong(f"{EMBEDDING}.weight", "is no matrix" if embedding else "is missing", "an embedding of [vocabulary, hidden]")
    vocab = embedding.shape[0]
    tokens = file.metadata.get(TOKENS)
    if tokens is None:
        if facts.integer("vocab_size", vocab) != vocab:
            raise facts.wrong(f"{facts.prefix}.vocab_size", f"is {facts.integer('vocab_size')}", f"{vocab}, the rows of {EMBEDDING}.weight")
    elif not isinstance(tokens, tuple) or len(tokens) != vocab:
        count = f"has {len(tokens)} tokens" if isinstance(tokens, tuple) else "is no array of strings"
        raise facts.wrong(TOKENS, count, f"{vocab}, the rows of {EMBEDDING}.weight")
    for name, kinds in (("token_type", "iu"), ("scores", "f")):
        values = file.metadata.get(f"tokenizer.ggml.{name}")
        if values is not None and not (isinstance(values, np.ndarray) and values.dtype.kind in kinds and len(values) == vocab):
            raise facts.wrong(f"tokenizer.ggml.{name}", "is no array of numbers, one per token", f"{vocab} numbers")

    def token(name: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab):
            raise facts.wrong(f"tokenizer.ggml.{name}", f"is {value!r:.100}", f"a token below {vocab}")
        return value

    ends = list(dict.fromkeys(end for name in END_IDS if (end := token(name)) is not None))
    special = {"bos_token_id": token("bos_token_id"), "pad_token_id": token("padding_token_id")}
    eos = {} if not ends else {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    return {"vocab_size": vocab, **{key: value for key, value in special.items() if value is not None}, **eos}


def _windows(facts: _Facts, arch: Architecture, layers: int, context: int) -> dict[str, Any]:
    """Which layers see a window only. The files of most families do not say, and their models have none."""
    window = facts.integer("attention.sliding_window", 0, low=0)
    if arch.sliding != "pattern":
        if 0 < window < context:
            what = f"is {window}, less than the context of {context}"
            raise facts.wrong(f"{facts.prefix}.attention.sliding_window", what, f"none: a {arch.name} model here sees all")
        return {}
    if not window:
        return {"layer_types": ["full_attention"] * layers}
    key = f"{facts.prefix}.attention.sliding_window_pattern"
    pattern = facts.file.metadata.get(key, arch.defaults["sliding_window_pattern"])
    if isinstance(pattern, np.ndarray) and pattern.dtype.kind == "b" and len(pattern) == layers:
        slides = [bool(one) for one in pattern]
    elif isinstance(pattern, int) and not isinstance(pattern, bool) and 0 <= pattern <= MAX_LAYERS:
        slides = [not pattern or (layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        raise facts.wrong(key, "is neither a period nor a yes or no for each layer", f"a number or {layers} bools")
    return {
        "sliding_window": window,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "rope_local_base_freq": facts.number("rope.freq_base_swa", arch.defaults["rope_local_base_freq"]),
    }


def _rope(facts: _Facts, head_dim: int, context: int) -> tuple[dict[str, Any], frozenset[str]]:
    """``rope_theta`` and ``rope_scaling`` of ``config.json``, and the tensors that they come from."""
    theta = facts.number("rope.freq_base", 10000.0)
    if not 1 <= theta <= MAX_THETA:
        raise facts.wrong(f"{facts.prefix}.rope.freq_base", f"is {theta}", f"1 to {MAX_THETA:g}")
    config: dict[str, Any] = {"rope_theta": theta}
    factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 0.0))
    kind = facts.file.metadata.get(f"{facts.prefix}.rope.scaling.type", "linear" if factor else "none")
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn", "longrope"):
        raise facts.wrong(f"{facts.prefix}.rope.scaling.type", f"is {kind!r:.100}", "none, linear, yarn or longrope")
    if kind == "linear" and factor in (0.0, 1.0):
        kind = "none"
    original = facts.integer("rope.scaling.original_context_length", context)
    if kind == "none":
        if ROPE_FREQS not in facts.file.tensors:
            return config, frozenset()
        scaling = _llama3(facts, head_dim, theta)
        return (config if scaling is None else config | {"rope_scaling": scaling}), frozenset({ROPE_FREQS})
    if kind == "linear":
        return config | {"rope_scaling": {"rope_type": kind, "factor": factor}}, frozenset()
    if kind == "yarn":
        return config | {"rope_scaling": _yarn(facts, factor, original)}, frozenset()
    scaling = {
        "rope_type": kind,
        "long_factor": [_shortest(value) for value in facts.vector(ROPE_LONG, head_dim // 2).tolist()],
        "short_factor": [_shortest(value) for value in facts.vector(ROPE_SHORT, head_dim // 2).tolist()],
        "original_max_position_embeddings": original,
        "attention_factor": facts.number("rope.scaling.attn_factor", 1.0),
    }
    # Readers of config.json look for the original context in either place.
    return config | {"original_max_position_embeddings": original, "rope_scaling": scaling}, frozenset({ROPE_LONG, ROPE_SHORT})


def _yarn(facts: _Facts, factor: float, original: int) -> dict[str, Any]:
    if factor <= 0:
        raise facts.wrong(f"{facts.prefix}.rope.scaling.factor", f"is {factor}", "a positive number with yarn")
    for key, usual in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if facts.number(f"rope.scaling.{key}", usual) != usual:
            what = f"is {facts.number(f'rope.scaling.{key}')}"
            raise facts.wrong(f"{facts.prefix}.rope.scaling.{key}", what, f"{usual}: config.json has no word for another")
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key in ("beta_fast", "beta_slow"):
        if facts.has(f"rope.scaling.yarn_{key}"):
            scaling[key] = facts.number(f"rope.scaling.yarn_{key}")
    if facts.has("rope.scaling.yarn_attn_factor"):
        scaling["attention_factor"] = facts.number("rope.scaling.yarn_attn_factor")
    elif facts.number("rope.scaling.attn_factor", 1.0) != 1.0:  # multiplies what follows from the factor
        usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        scaling["attention_factor"] = usual * facts.number("rope.scaling.attn_factor")
    return scaling


def _llama3(facts: _Facts, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The numbers of Llama 3 scaling from the divisors of the frequencies, which is all that a file holds; None when all are 1.

    A pair turning N/L to N/H tokens lies between "kept" and "divided by the factor": the two ends follow from any two such
    pairs, and only N/L and N/H matter, so L is set to 1. What is found must give the divisors back.
    """
    divisors = facts.vector(ROPE_FREQS, head_dim // 2)
    if (divisors == 1).all():
        return None
    waves = 2 * math.pi * theta ** (2 * np.arange(head_dim // 2) / head_dim)
    factor = _shortest(float(divisors.max()))
    for original, high in (LLAMA3_DEFAULTS, *_llama3_ends(waves, divisors, factor)):
        if factor > 1 and np.allclose(_llama3_divisors(waves, factor, original, high), divisors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise facts.wrong(ROPE_FREQS, "are not the divisors of Llama 3 scaling", "divisors that config.json can say")


def _llama3_ends(waves: NDArray[np.float64], divisors: NDArray[np.float64], factor: float) -> Iterator[tuple[int, float]]:
    """Original context N and high-frequency factor H from the first and last pair between the ends; one pair alone gives N."""
    between = (divisors > 1) & (divisors < divisors.max())
    if not between.any():
        return
    turns = 1 / waves[between]
    smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)  # (N * turns - 1) / (H - 1)
    original, high = (3 * smooth[0] + 1) / turns[0], LLAMA3_DEFAULTS[1]
    if turns[0] > turns[-1]:
        slope = (smooth[0] - smooth[-1]) / (turns[0] - turns[-1])
        start = smooth[0] - slope * turns[0]
        if start < 0:
            original, high = slope / -start, 1 - 1 / start
    if 1 <= original < 1 << 31 and 1 < round(high, 3) < 1 << 31:
        yield round(original), round(float(high), 3)


def _llama3_divisors(waves: NDArray[np.float64], factor: float, original: int, high: float) -> NDArray[np.float64]:
    smooth = ((original / waves - 1) / (high - 1)).clip(0, 1)
    found: NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return found


def _config(file: GgufFile, arch: Architecture) -> tuple[dict[str, Any], frozenset[str]]:
    """What ``config.json`` would say, and the names of tensors that went into it."""
    facts = _Facts(file, str(arch.gguf))
    if facts.integer("expert_count", 0, low=0):
        raise facts.wrong(f"{facts.prefix}.expert_count", f"is {facts.integer('expert_count')}", "a model without experts")
    if file.metadata.get(f"{facts.prefix}.attention.causal", True) is not True:
        raise facts.wrong(f"{facts.prefix}.attention.causal", "is not true", "a model that generates text")
    layers, context = facts.integer("block_count", high=MAX_LAYERS), facts.integer("context_length")
    hidden = facts.integer("embedding_length")
    heads = _heads(facts, hidden)
    rope, used = _rope(facts, heads["head_dim"], context)
    config = {
        "architectures": [arch.hf_classes[0]],
        "model_type": arch.model_type,
        "dtype": DTYPE,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        **heads,
        "intermediate_size": facts.integer("feed_forward_length"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "tie_word_embeddings": f"{HEAD}.weight" not in file.tensors,
        arch.activation_keys[0]: arch.defaults[arch.activation_keys[0]],
        **_biases(file, arch),
        **_vocabulary(file, facts),
        **rope,
        **_windows(facts, arch, layers, context),
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if cap := facts.number(key, 0.0):
            config[key] = cap
    if "query_pre_attn_scalar" in arch.defaults:
        by_width = (arch.gguf, layers) in QUERY_SCALED_BY_WIDTH
        config["query_pre_attn_scalar"] = hidden // heads["num_attention_heads"] if by_width else heads["head_dim"]
    return config, used


def gguf_checkpoint_facts(file: GgufFile) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The ``config.json`` that the file's metadata stand for, and its tensors by Hugging Face name. Raises as ``GgufSource``."""
    arch = _architecture(file)
    config, used = _config(file, arch)
    try:
        spec = resolve_spec(arch, config)
    except InputError as exc:
        raise InputError(f"{file.path}: {exc.where.removeprefix('config.json: ')}", exc.what, exc.expected, exc.hint) from exc
    return config, _stored_tensors(file, spec, used)
