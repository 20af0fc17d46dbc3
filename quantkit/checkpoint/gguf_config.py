"""The ``config.json`` that the metadata of a GGUF file stand for (``gguf.md`` 5.2, 5.4).

The sizes of the model, its rotary embedding, windows, experts and special tokens, under the names that its family gives them. What
``config.json`` cannot say is refused. Of tensors only those are looked at that say something of the kind: factors of the rotary
embedding, biases, the head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit import fs
from quantkit.arch.spec import Architecture
from quantkit.arch.table import GGUF_NAMES, gguf_architecture
from quantkit.errors import InputError
from quantkit.formats.gguf import GgufFile

DTYPE = "float16"
"""What ``config.json`` says: blocks have no dtype of their own, and their scales are float16."""
MAX_LAYERS, MAX_EXPERTS, MAX_THETA = 512, 1024, 1e12

EMBEDDING, POSITIONS, FINAL_NORM, HEAD, BLOCK = "token_embd", "position_embd", "output_norm", "output", "blk.{layer}."
ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TOKENS = "tokenizer.ggml.tokens"
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""A model stops at the end of text, of a turn and of a message."""
LLAMA3_DEFAULTS = (8192, 4.0)
"""Original context and high-frequency factor of every published Llama 3, the low-frequency factor being 1."""
QUERY_SCALED_BY_WIDTH = frozenset({("gemma2", 46), ("gemma3", 62)})
"""Gemma 2 and 3 27B scale queries by hidden/heads, their sisters by the head; the format has no key for it, and readers count layers."""


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
        found = np.frombuffer(b"".join(fs.read_range(tensor.file, tensor.offset, tensor.nbytes)), "<f4").astype(np.float64)
        if not np.isfinite(found).all() or (found <= 0).any():
            raise self.wrong(name, "holds a number that is not positive", "positive numbers")
        return found


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32; the value itself where it is no float32."""
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


def row_of(file: GgufFile) -> Architecture:
    """The row of the architecture table that a file is of. Raises InputError for an architecture that the table does not have."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_NAMES:
        what = "is missing" if name is None else f"{name!r:.100} is not in the architecture table"
        raise InputError(f"{file.path}: general.architecture", what, f"one of {', '.join(GGUF_NAMES)}")
    facts = _Facts(file, name)
    experts, window = (facts.integer(key, 0, low=0) for key in ("expert_count", "attention.sliding_window"))
    arch = gguf_architecture(name, experts=experts > 0, window=window > 0)
    assert arch is not None
    if arch.experts is None and experts:
        raise facts.wrong(f"{name}.expert_count", f"is {experts}", "a model without experts")
    return arch


def _heads(facts: _Facts, arch: Architecture, hidden: int) -> dict[str, Any]:
    heads = facts.integer("attention.head_count")
    if not facts.has("attention.key_length") and hidden % heads:
        raise facts.wrong(f"{facts.prefix}.attention.head_count", f"{heads} does not divide {hidden}", "a divisor, or a key_length")
    head_dim = facts.integer("attention.key_length", hidden // heads)
    if facts.integer("attention.value_length", head_dim) != head_dim:
        what = f"is {facts.integer('attention.value_length')}"
        raise facts.wrong(f"{facts.prefix}.attention.value_length", what, f"{head_dim}, as wide as the keys of a head")
    kv_heads = facts.integer("attention.head_count_kv", heads)
    if arch.position_table is not None:
        if kv_heads != heads or head_dim * heads != hidden:
            what = f"{heads} heads of {head_dim}, and {kv_heads} of keys"
            raise facts.wrong(f"{facts.prefix}.attention.head_count", f"says {what}", f"equal heads, {hidden} wide in all")
        return {"num_attention_heads": heads}
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def _rotary_share(facts: _Facts, arch: Architecture, head_dim: int) -> dict[str, Any]:
    """The config key that says how much of a head is rotated; none where all of it is."""
    rotary = facts.integer("rope.dimension_count", head_dim)
    if rotary == head_dim:
        return {}
    if arch.gguf_rope_permuted or rotary % 2 or rotary > head_dim:
        expected = f"{head_dim}, as wide as the keys of a head" if arch.gguf_rope_permuted else f"an even number up to {head_dim}"
        raise facts.wrong(f"{facts.prefix}.rope.dimension_count", f"is {rotary}", expected)
    share = rotary / head_dim
    return {"partial_rotary_factor": share if int(head_dim * share) == rotary else math.nextafter(share, 1.0)}


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
    usual = arch.defaults.get("sliding_window") if arch.gguf_rules.window_stated else 0
    window = facts.integer("attention.sliding_window", usual or 0, low=0)
    if not window:
        return _unwindowed(arch, layers)
    period = arch.gguf_rules.period
    if arch.sliding == "all" and "use_sliding_window" not in arch.defaults:
        period = 0
    key = f"{facts.prefix}.attention.sliding_window_pattern"
    pattern = facts.file.metadata.get(key, period)
    if pattern is None:
        if window < context:
            expected = f"none, or a sliding_window_pattern: a {arch.name} model here sees all"
            raise facts.wrong(f"{facts.prefix}.attention.sliding_window", f"is {window}, less than the context of {context}", expected)
        return _unwindowed(arch, layers)
    if isinstance(pattern, np.ndarray) and pattern.dtype.kind == "b" and len(pattern) == layers:
        slides = [bool(one) for one in pattern]
    elif isinstance(pattern, int) and not isinstance(pattern, bool) and 0 <= pattern <= MAX_LAYERS:
        slides = [not pattern or (layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        raise facts.wrong(key, "is neither a period nor a yes or no for each layer", f"a number or {layers} bools")
    config: dict[str, Any] = {"sliding_window": window}
    if arch.sliding != "all" or not all(slides):
        config["layer_types"] = ["sliding_attention" if one else "full_attention" for one in slides]
    if "use_sliding_window" in arch.defaults:
        config["use_sliding_window"] = True
    if "rope_local_base_freq" in arch.defaults:
        config["rope_local_base_freq"] = facts.number("rope.freq_base_swa", arch.defaults["rope_local_base_freq"])
    return config


def _unwindowed(arch: Architecture, layers: int) -> dict[str, Any]:
    if arch.gguf_rules.period is not None:
        return {"layer_types": ["full_attention"] * layers}
    return {"sliding_window": None} if arch.sliding == "all" else {}


def _rope(facts: _Facts, arch: Architecture, rotary_dim: int, context: int) -> tuple[dict[str, Any], frozenset[str]]:
    """``rope_theta`` and ``rope_scaling`` of ``config.json``, and the tensors that they come from."""
    theta = facts.number("rope.freq_base", 10000.0)
    if not 1 <= theta <= MAX_THETA:
        raise facts.wrong(f"{facts.prefix}.rope.freq_base", f"is {theta}", f"1 to {MAX_THETA:g}")
    config: dict[str, Any] = {"rope_theta": theta}
    factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 0.0))
    # Where no other table is known, the tables themselves say it.
    tabled = arch.gguf_rules.rope_tables == {"longrope"} and ROPE_LONG in facts.file.tensors
    usual = "linear" if factor else "longrope" if tabled else "none"
    kind = facts.file.metadata.get(f"{facts.prefix}.rope.scaling.type", usual)
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn", "longrope"):
        raise facts.wrong(f"{facts.prefix}.rope.scaling.type", f"is {kind!r:.100}", "none, linear, yarn or longrope")
    if kind == "linear" and factor in (0.0, 1.0):
        kind = "none"
    original = facts.integer("rope.scaling.original_context_length", context)
    if kind == "none":
        if ROPE_FREQS not in facts.file.tensors:
            return config, frozenset()
        scaling = _llama3(facts, rotary_dim, theta)
        return (config if scaling is None else config | {"rope_scaling": scaling}), frozenset({ROPE_FREQS})
    if kind == "linear":
        return config | {"rope_scaling": {"rope_type": kind, "factor": factor}}, frozenset()
    if kind == "yarn":
        return config | {"rope_scaling": _yarn(facts, factor, original)}, frozenset()
    scaling = {
        "rope_type": kind,
        "long_factor": [_shortest(value) for value in facts.vector(ROPE_LONG, rotary_dim // 2).tolist()],
        "short_factor": [_shortest(value) for value in facts.vector(ROPE_SHORT, rotary_dim // 2).tolist()],
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
        if factor > 1 and np.allclose(llama3_divisors(waves, factor, original, high), divisors, rtol=1e-5, atol=0):
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


def llama3_divisors(waves: NDArray[np.float64], factor: float, original: float, high: float) -> NDArray[np.float64]:
    """What Llama 3 scaling divides each frequency by, from the wave lengths in tokens; the low-frequency factor is 1 (``gguf.md`` 5.2)."""
    smooth = ((original / waves - 1) / (high - 1)).clip(0, 1)
    found: NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return found


def _experts(facts: _Facts, arch: Architecture) -> dict[str, Any]:
    """The config keys of the mixture of experts, and the width of the dense MLP where the file says one."""
    experts = arch.experts
    if experts is None:
        return {"intermediate_size": facts.integer("feed_forward_length")}
    count, top_k = facts.integer("expert_count", high=MAX_EXPERTS), facts.integer("expert_used_count")
    config: dict[str, Any] = {experts.count_key: count, experts.top_k_key: top_k}
    dense = facts.integer("feed_forward_length") if facts.has("feed_forward_length") or experts.size_key == "intermediate_size" else None
    if dense is not None:
        config["intermediate_size"] = dense
    if experts.size_key != "intermediate_size":
        config[experts.size_key] = facts.integer("expert_feed_forward_length", None if dense is None else max(1, dense // top_k))
    if experts.shared:
        config["shared_expert_intermediate_size"] = facts.integer("expert_shared_feed_forward_length", dense)
    if isinstance(experts.normalize, str):
        config[experts.normalize] = arch.gguf_rules.normalized
    return config


def _eps(facts: _Facts, arch: Architecture) -> float:
    rms, layer = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
    # Converters of the first Qwen name the wrong one of the two.
    return facts.number(layer if arch.norm_kind == "layer" or (facts.has(layer) and not facts.has(rms)) else rms)


def config_of(file: GgufFile, arch: Architecture) -> tuple[dict[str, Any], frozenset[str]]:
    """What ``config.json`` would say, and the names of tensors that went into it.

    Raises InputError for a hyper-parameter that is missing, of another kind, or that ``config.json`` cannot say.
    """
    facts = _Facts(file, str(arch.gguf))
    if file.metadata.get(f"{facts.prefix}.attention.causal", True) is not True:
        raise facts.wrong(f"{facts.prefix}.attention.causal", "is not true", "a model that generates text")
    layers, context = facts.integer("block_count", high=MAX_LAYERS), facts.integer("context_length")
    hidden = facts.integer("embedding_length")
    heads = _heads(facts, arch, hidden)
    shared = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        **heads,
        "rms_norm_eps": _eps(facts, arch),
        "max_position_embeddings": context,
    }
    used: frozenset[str] = frozenset()
    if arch.position_table is None:
        share = _rotary_share(facts, arch, heads["head_dim"])
        rope, used = _rope(facts, arch, facts.integer("rope.dimension_count", heads["head_dim"]), context)
        shared |= {**rope, **share}
    experts = _experts(facts, arch)
    if arch.experts is None:
        shared |= experts
    config = {
        "architectures": [arch.hf_classes[0]],
        "model_type": arch.model_type,
        "dtype": DTYPE,
        **{arch.keys.get(key, key): value for key, value in shared.items()},  # as the family calls them
        **experts,
        "tie_word_embeddings": f"{HEAD}.weight" not in file.tensors,
        arch.activation_keys[0]: arch.defaults[arch.activation_keys[0]],
        **_biases(file, arch),
        **_vocabulary(file, facts),
        **_windows(facts, arch, layers, context),
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if cap := facts.number(key, 0.0):
            config[key] = cap
    if "query_pre_attn_scalar" in arch.defaults:
        config["query_pre_attn_scalar"] = query_scalar(str(arch.gguf), layers, hidden, heads["num_attention_heads"], heads["head_dim"])
    return config, used


def query_scalar(gguf: str, layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """What readers divide queries by the root of: the head's width, or what follows from the number of layers."""
    return hidden // heads if (gguf, layers) in QUERY_SCALED_BY_WIDTH else head_dim
