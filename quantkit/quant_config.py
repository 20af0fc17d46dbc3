"""Assignment <-> ``quantization_config``: how each format says in ``config.json`` which linear is stored how.

Knows names, numbers and the dtypes in headers, never data.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError
from quantkit.geometry import FLOAT_LAYOUTS, GGML_BLOCKS, ggml_scheme
from quantkit.method_facts import METHODS
from quantkit.scheme import KEEP, Assignment, LinearScheme

READABLE = ("awq", "gptq", "compressed-tensors", "bitsandbytes", "fp8", "gguf")
"""Values of ``quant_method`` that quantkit reads."""
WHERE = "config.json: quantization_config"
FORMATS: Mapping[str, tuple[str, ...]] = {
    "awq": ("awq",),
    "gptq": ("gptq",),
    "gptq_v2": ("gptq_v2",),
    "compressed-tensors": ("packed", "int8", "fp8"),
    "bnb": ("bnb4", "bnb8"),
    "fp8": ("fp8_block",),
    "gguf": ("ggml",),
}
"""Format as users name it -> the layouts that one artifact of it can hold."""
EMBEDDING_FORMAT = "compressed-tensors"
"""The format whose loaders take a quantized embedding; those of the others read it as floats."""
BLOCK_FORMAT = "gguf"
"""A GGUF file's blocks in a directory: quantkit's own container, which no other loader reads. It takes any module, a tied embedding too."""


class Stored(Protocol):
    """A tensor as its header describes it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def is_kept(scheme: LinearScheme) -> bool:
    """Whether a linear stays in floats."""
    return scheme.layout in FLOAT_LAYOUTS


def format_of(layout: str) -> str:
    """The format that writes ``layout``. Raises InputError for a layout that is only read."""
    for name, layouts in FORMATS.items():
        if layout in layouts:
            return name
    raise InputError("format", f"layout {layout!r} is not written", f"one of {', '.join(FORMATS)}")


def _patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions for whole paths that match ``names`` and none of ``others``: one for all layers where that is true."""
    wanted, rest = sorted(names), list(others)
    found: dict[str, list[str]] = {}
    for name in wanted:
        found.setdefault(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)), []).append(name)
    out = []
    for template, members in found.items():
        general = re.compile(template)
        if len(members) > 1 and not any(general.fullmatch(name) for name in rest):
            out.append(template)
        else:
            out += [re.escape(name) for name in members]
    return out


def quantization_config(assignment: Assignment, head: str, embedding: str = "") -> dict[str, Any]:
    """The ``quantization_config`` of an artifact; ``head`` is the module path of the output head, tied or not, ``embedding`` that of
    an embedding that may be quantized.

    Raises InputError when the linears' layouts belong to different formats, or the format cannot say what they differ in, or
    cannot hold a quantized embedding.
    """
    table = assignment.get(embedding, KEEP)
    if all(is_kept(s) or format_of(s.layout) == BLOCK_FORMAT for s in assignment.values()) and not all(map(is_kept, assignment.values())):
        return _blocks(assignment)
    quantized = {name: s for name, s in assignment.items() if not is_kept(s) and name != embedding}
    names = {format_of(s.layout) for s in quantized.values()}
    if len(names) != 1:
        raise InputError(WHERE, f"one artifact cannot be of the formats {', '.join(sorted(names)) or 'of no format'}", "one format")
    kept = sorted({name for name, s in assignment.items() if is_kept(s) and name != embedding} | ({head} - set(quantized)))
    name = names.pop()
    config = _WRITERS[name](quantized, kept, head)
    if is_kept(table):
        return config
    refuse_embedding(embedding, name)
    if format_of(table.layout) != name:
        raise InputError(embedding, f"is quantized in the {format_of(table.layout)} format and the linears in {name}", "one format")
    groups = config["config_groups"]
    groups[f"group_{len(groups)}"] = _ct_group(table, [f"re:^{re.escape(embedding)}$"])
    formats = {group["format"] for group in groups.values()}
    return {**config, "format": formats.pop() if len(formats) == 1 else "mixed-precision"}


def refuse_embedding(name: str, fmt: str) -> None:
    """Raise InputError naming the embedding when the format ``fmt`` cannot hold it quantized."""
    if fmt != EMBEDDING_FORMAT:
        methods = ", ".join(method for method, facts in METHODS.items() if EMBEDDING_FORMAT in facts.formats)
        what = f"cannot be quantized in the {fmt} format, whose loaders read an embedding as floats"
        raise InputError(
            name, what, f"--format {EMBEDDING_FORMAT} (methods {methods})", "or leave the override out, and the embedding in floats"
        )


def _one(quantized: Assignment, what: str, fields: Callable[[LinearScheme], Any]) -> LinearScheme:
    """Any of the schemes, which agree in ``fields``. Raises InputError when they do not: the format has room for one of each."""
    found = {fields(s) for s in quantized.values()}
    if len(found) != 1:
        raise InputError(
            WHERE,
            f"this format holds one {what} for all linears, found {sorted(found)}",
            "one of each",
            "--format compressed-tensors can mix",
        )
    return next(iter(quantized.values()))


def _awq(quantized: Assignment, kept: list[str], head: str) -> dict[str, Any]:
    """``formats.md`` 3.5."""
    scheme = _one(quantized, "bit width and group size", lambda s: (s.bits, s.group_size))
    return {
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept,
    }


def _gptq(quantized: Assignment, kept: list[str], head: str) -> dict[str, Any]:
    """``formats.md`` 2.5; linears that differ from the most frequent scheme are in ``dynamic``."""

    def settings(s: LinearScheme) -> tuple[int, int, bool, bool]:
        return s.bits, s.group_size, s.sym, s.act_order

    base = Counter(settings(s) for s in quantized.values()).most_common(1)[0][0]
    layout = _one(quantized, "zero-point convention", lambda s: s.layout).layout
    keys = ("bits", "group_size", "sym", "desc_act")
    dynamic: dict[str, dict[str, Any]] = {f"-:^{p}$": {} for p in _patterns([k for k in kept if k != head], quantized)}
    for other in sorted({settings(s) for s in quantized.values()} - {base}):
        members = [name for name, s in quantized.items() if settings(s) == other]
        rest = [name for name in (*quantized, *kept) if name not in members]
        dynamic |= {f"+:^{p}$": dict(zip(keys, other, strict=True)) for p in _patterns(members, rest)}
    act_order = base[3]
    found = {
        "quant_method": "gptq",
        "checkpoint_format": layout,
        **dict(zip(keys, base, strict=True)),
        "static_groups": not act_order,
        "true_sequential": True,
        "lm_head": head in quantized,
        "pack_dtype": "int32",
    }
    return {**found, "dynamic": dynamic} if dynamic else found


def _ct_group(scheme: LinearScheme, targets: list[str]) -> dict[str, Any]:
    """One config group of compressed-tensors (``formats.md`` 4.4)."""
    kind, strategy = ("float" if scheme.layout == "fp8" else "int"), ("channel" if scheme.group_size == -1 else "group")
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": kind,
        "symmetric": scheme.sym,
        "strategy": strategy,
        "group_size": scheme.group_size if strategy == "group" else None,
        "dynamic": False,
    }
    activations = None
    if scheme.activations:
        grid = "float" if scheme.activations == "fp8_token" else "int"
        activations = {"num_bits": 8, "type": grid, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": _CT_FORMATS[scheme.layout],
    }


_CT_FORMATS = {"packed": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}


def _compressed(quantized: Assignment, kept: list[str], head: str) -> dict[str, Any]:
    """``formats.md`` 4.4: one config group for each scheme."""
    schemes = list(dict.fromkeys(quantized.values()))
    groups: dict[str, Any] = {}
    for index, scheme in enumerate(schemes):
        members = [name for name, s in quantized.items() if s == scheme]
        rest = [name for name in (*quantized, *kept) if name not in members]
        targets = ["Linear"] if len(schemes) == 1 else [f"re:^{p}$" for p in _patterns(members, rest)]
        groups[f"group_{index}"] = _ct_group(scheme, targets)
    formats = {group["format"] for group in groups.values()}
    named = [head] if head in kept else []
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [*named, *(f"re:^{p}$" for p in _patterns([k for k in kept if k not in named], quantized))],
        "config_groups": groups,
    }


def _bnb(quantized: Assignment, kept: list[str], head: str) -> dict[str, Any]:
    """``formats.md`` 5.5 and 5.6."""
    scheme = _one(quantized, "kind of weight", lambda s: (s.layout, s.code, s.double_quant, s.group_size))
    four = scheme.layout == "bnb4"
    if four and scheme.group_size != 64:
        raise InputError(WHERE, f"blocks of {scheme.group_size}", "64, the only length that loaders of bitsandbytes assume")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_quant_type": scheme.code if four else "fp4",
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16" if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": kept,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def _fp8(quantized: Assignment, kept: list[str], head: str) -> dict[str, Any]:
    """``formats.md`` 4.5."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": kept,
    }


def _blocks(assignment: Assignment) -> dict[str, Any]:
    """The block type of each module that stays in blocks: types are mixed freely, so every one is named."""
    return {"quant_method": "gguf", "modules": {name: s.code for name, s in sorted(assignment.items()) if not is_kept(s)}}


_WRITERS: Mapping[str, Callable[[Assignment, list[str], str], dict[str, Any]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "compressed-tensors": _compressed,
    "bnb": _bnb,
    "fp8": _fp8,
}


@dataclass(frozen=True, slots=True)
class _Claimed:
    """A tensor that a configuration alone promises."""

    dtype: str
    shape: tuple[int, ...]


def leaves_out(quant: Mapping[str, Any], name: str) -> bool:
    """Whether a ``quantization_config`` itself says that the linear ``name`` is not quantized.

    Raises InputError when its list is none of names.
    """
    if quant.get("quant_method") == BLOCK_FORMAT:
        return name not in _block_types(quant)
    for key in ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers"):
        entries = quant.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise InputError(f"{WHERE}.{key}", f"is {entries!r:.100}", "a list of module names")
        if any(entry in name for entry in entries):
            return True
    if "ignore" in quant:
        return _targets(quant["ignore"] or [], name, f"{WHERE}.ignore")
    return _dynamic(quant, name) is None


def claimed_tensors(config: Mapping[str, Any], linears: Iterable[str], head: str, embedding: str = "") -> dict[str, Stored]:
    """What ``stored_assignment`` needs to see of a checkpoint of which only ``config.json`` is there."""
    quant = config.get("quantization_config")
    if not isinstance(quant, Mapping):
        return {}
    code = str(quant.get("bnb_4bit_quant_type", "nf4"))
    parts = {"awq": ("qweight",), "gptq": ("qweight",), "fp8": ("weight_scale_inv",)}.get(str(quant.get("quant_method")), ())
    if quant.get("quant_method") == "compressed-tensors":
        return {
            f"{name}.{part}": _Claimed("F16", (1,))
            for name, kind in (*((name, "Linear") for name in linears if name != head), (embedding, "Embedding"))
            for part in _ct_claims(quant, name, kind)
        }
    if quant.get("load_in_4bit"):
        nested = ("weight.nested_absmax",) if quant.get("bnb_4bit_use_double_quant") else ()
        parts = ("weight", "weight.absmax", f"weight.quant_state.bitsandbytes__{code}", *nested)
    elif quant.get("load_in_8bit"):
        parts = ("SCB",)
    claimed: dict[str, Stored] = {}
    for name in linears:
        if name != head and not leaves_out(quant, name):
            claimed |= {f"{name}.{part}": _Claimed("F16", (32, 1) if part == "weight" else (1,)) for part in parts}
    return claimed


def assignment_from_config(config: Mapping[str, Any], linears: Iterable[str], tensors: Mapping[str, Stored]) -> dict[str, LinearScheme]:
    """Read back how a checkpoint on disk stores its linears, from ``config.json`` and the tensor headers.

    Raises InputError for a quantization method, version or setting that quantkit does not read.
    """
    names = list(linears)
    quant = config.get("quantization_config")
    if not quant:
        return dict.fromkeys(names, KEEP)
    if not isinstance(quant, Mapping):
        raise InputError(WHERE, f"is {type(quant).__name__}", "an object")
    method = quant.get("quant_method")
    if method is None and (quant.get("load_in_4bit") or quant.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _READERS:
        raise InputError(WHERE, f"quant_method {method!r}", f"one of {', '.join(_READERS)}")
    return _READERS[method](quant, names, tensors)


def stored_assignment(config: Mapping[str, Any], spec: ModelSpec, tensors: Mapping[str, Stored]) -> dict[str, LinearScheme]:
    """``assignment_from_config`` of every linear of a model, and of its embedding when that is quantized.

    Raises InputError as it does, and for a quantized embedding that a tied head would have to multiply by.
    """
    found = assignment_from_config(config, spec.all_linears(), tensors)
    name, quant = spec.architecture.embedding, config.get("quantization_config")
    if isinstance(quant, Mapping) and quant.get("quant_method") == BLOCK_FORMAT:
        table = _read_blocks(quant, [name], tensors)[name]
        return found if is_kept(table) else {**found, name: table}
    if not isinstance(quant, Mapping) or quant.get("quant_method") != EMBEDDING_FORMAT:
        return found
    scheme = _read_compressed(quant, [name], tensors, "Embedding")[name]
    if is_kept(scheme):
        return found
    if spec.tied:
        raise InputError(name, "is quantized, and config.json ties the head to it", "tie_word_embeddings false, and a head of its own")
    # Nothing is multiplied by it: what its config says of inputs, which are token ids, has no meaning.
    return {**found, name: replace(scheme, activations="")}


def _int(quant: Mapping[str, Any], keys: Sequence[str], default: int) -> int:
    """The first of ``keys`` that is there, a whole number."""
    value = next((quant[key] for key in keys if quant.get(key) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{WHERE}.{keys[0]}", f"is {value!r:.50}", "a whole number")
    return value


def _group(value: int, where: str) -> int:
    if value != -1 and value <= 0:
        raise InputError(where, f"is {value}", "-1 or a positive number")
    return value


def _scale_dtype(tensors: Mapping[str, Stored], name: str) -> str:
    return tensors[name].dtype if name in tensors else "F16"


def _read_awq(quant: Mapping[str, Any], names: list[str], tensors: Mapping[str, Stored]) -> dict[str, LinearScheme]:
    version = str(quant.get("version", "gemm")).lower()
    if version not in ("gemm", "gemv"):
        raise InputError(WHERE, f"AWQ version {version!r}", "gemm or gemv")
    bits, group = _int(quant, ("bits", "w_bit"), 4), _int(quant, ("group_size", "q_group_size"), 128)
    if bits != 4:
        raise InputError(WHERE, f"AWQ of {bits} bits", "4")
    layout = "awq" if version == "gemm" else "awq_gemv"

    def scheme(name: str) -> LinearScheme:
        return LinearScheme("awq", layout, 4, _group(group, f"{WHERE}.group_size"), scale_dtype=_scale_dtype(tensors, f"{name}.scales"))

    return {name: scheme(name) if f"{name}.qweight" in tensors else KEEP for name in names}


def _dynamic(quant: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The overrides of one linear (``formats.md`` 2.5): those of the first pattern that matches, None when it says to leave it."""
    dynamic = quant.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise InputError(f"{WHERE}.dynamic", f"is {type(dynamic).__name__}", "an object")
    for key, value in dynamic.items():
        pattern = key[2:] if key[:2] in ("+:", "-:") else key
        try:
            matches = re.match(pattern, name)
        except re.error as exc:
            raise InputError(f"{WHERE}.dynamic", f"{key!r:.100} is no regular expression ({exc})", "one") from exc
        if matches:
            return None if key.startswith("-:") else value if isinstance(value, Mapping) else {}
    return {}


def _read_gptq(quant: Mapping[str, Any], names: list[str], tensors: Mapping[str, Stored]) -> dict[str, LinearScheme]:
    layout = str(quant.get("checkpoint_format") or quant.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise InputError(f"{WHERE}.checkpoint_format", f"is {layout!r}", "gptq or gptq_v2")

    def scheme(name: str) -> LinearScheme:
        settings = {**quant, **(_dynamic(quant, name) or {})}
        bits, group = _int(settings, ("bits",), 4), _int(settings, ("group_size",), 128)
        act_order = bool(settings.get("desc_act")) and group != -1  # one group for all inputs cannot be scattered
        return LinearScheme(
            "gptq",
            layout,
            bits,
            _group(group, f"{WHERE}.group_size"),
            bool(settings.get("sym", True)),
            _scale_dtype(tensors, f"{name}.scales"),
            act_order=act_order,
        )

    return {name: scheme(name) if f"{name}.qweight" in tensors else KEEP for name in names}


def _targets(entries: Any, name: str, where: str) -> bool:
    """Whether one of a config group's targets, or an ignore list's entries, means the linear ``name``."""
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise InputError(where, f"is {entries!r:.100}", "a list of names")
    for entry in entries:
        if entry.startswith("re:"):
            try:
                if re.match(entry[3:], name):
                    return True
            except re.error as exc:
                raise InputError(where, f"{entry!r:.100} is no regular expression ({exc})", "one") from exc
        elif entry == name:
            return True
    return False


def _ct_activations(group: Mapping[str, Any]) -> str:
    """How the linears of a config group round their inputs: ``LinearScheme.activations``."""
    where, inputs = f"{WHERE}.config_groups", group.get("input_activations")
    if group.get("output_activations") is not None:
        raise InputError(where, f"output_activations {group['output_activations']!r:.100}", "null")
    if inputs is None:
        return ""
    if not isinstance(inputs, Mapping):
        raise InputError(where, f"input_activations {inputs!r:.50}", "an object or null")
    if inputs.get("dynamic") is not True or inputs.get("strategy") != "token":
        found = f"activations quantized {'per ' + str(inputs.get('strategy'))}, dynamic {inputs.get('dynamic')}"
        raise InputError(where, found, "dynamic per-token activations, or none")
    bits, kind, sym = _int(inputs, ("num_bits",), 8), str(inputs.get("type", "int")), bool(inputs.get("symmetric", True))
    if bits != 8 or kind not in ("int", "float") or not sym:
        raise InputError(where, f"activations of {bits} bits, {kind}, {'' if sym else 'a'}symmetric", "8 bits, int or float, symmetric")
    return "fp8_token" if kind == "float" else "int8_token"


def _ct_scheme(group: Mapping[str, Any], name: str, tensors: Mapping[str, Stored]) -> LinearScheme:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise InputError(f"{WHERE}.config_groups", f"a group has weights {weights!r:.50}", "an object")
    bits, kind = _int(weights, ("num_bits",), 8), str(weights.get("type", "int"))
    strategy = str(weights.get("strategy") or ("group" if weights.get("group_size") not in (None, -1) else "tensor"))
    sym = bool(weights.get("symmetric", True))
    activations = _ct_activations(group)
    if f"{name}.weight_packed" in tensors:
        if kind != "int" or strategy not in ("group", "channel"):
            raise InputError(f"{WHERE}.config_groups", f"packed weights of type {kind}, strategy {strategy}", "int, by group or channel")
        group_size = _group(_int(weights, ("group_size",), -1), f"{WHERE}.config_groups") if strategy == "group" else -1
        scale = _scale_dtype(tensors, f"{name}.weight_scale")
        return LinearScheme("packed", "packed", bits, group_size, sym, scale, activations=activations)
    if bits != 8 or kind not in ("int", "float") or strategy not in ("channel", "tensor") or not sym:
        found = f"unpacked weights of {bits} bits, {kind}, {strategy}, {'' if sym else 'a'}symmetric"
        raise InputError(f"{WHERE}.config_groups", found, "8 bits by channel or tensor, symmetric")
    layout, group_size = ("fp8" if kind == "float" else "int8"), (-1 if strategy == "channel" else 0)
    scale = _scale_dtype(tensors, f"{name}.weight_scale")
    return LinearScheme(layout, layout, 8, group_size, True, scale, activations=activations)


def _ct_groups(quant: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = quant.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise InputError(f"{WHERE}.config_groups", f"is {groups!r:.100}", "an object of config groups")
    return list(groups.values())


def _ct_group_of(groups: list[Mapping[str, Any]], name: str, kind: str) -> Mapping[str, Any] | None:
    """The config group whose targets mean the module ``name`` of the class ``kind``; one that names it goes before its class."""
    by_name = [g for g in groups if _targets(g.get("targets"), name, f"{WHERE}.config_groups")]
    by_class = [g for g in groups if kind in g["targets"]]
    return next(iter([*by_name, *by_class]), None)


def _ct_claims(quant: Mapping[str, Any], name: str, kind: str) -> tuple[str, ...]:
    """The part by which a module's format is known, as its config group promises it; none where it is not quantized."""
    group = None if leaves_out(quant, name) else _ct_group_of(_ct_groups(quant), name, kind)
    if group is None:
        return ()
    return ("weight_packed",) if (group.get("format") or quant.get("format")) == "pack-quantized" else ("weight_scale",)


def _read_compressed(
    quant: Mapping[str, Any], names: list[str], tensors: Mapping[str, Stored], kind: str = "Linear"
) -> dict[str, LinearScheme]:
    """``kind`` is the class of the modules ``names``, which targets may name."""
    groups, found = _ct_groups(quant), dict[str, LinearScheme]()
    for name in names:
        if f"{name}.weight_packed" not in tensors and f"{name}.weight_scale" not in tensors:
            found[name] = KEEP
            continue
        chosen = _ct_group_of(groups, name, kind)
        if chosen is None:
            raise InputError(f"{WHERE}.config_groups", f"no group's targets mean {name}", "a group for each quantized linear")
        found[name] = _ct_scheme(chosen, name, tensors)
    return found


def _read_bnb(quant: Mapping[str, Any], names: list[str], tensors: Mapping[str, Stored]) -> dict[str, LinearScheme]:
    storage = quant.get("bnb_4bit_quant_storage", "uint8")
    if storage not in ("uint8", None):
        raise InputError(f"{WHERE}.bnb_4bit_quant_storage", f"is {storage!r:.50}", "uint8")
    found: dict[str, LinearScheme] = {}
    for name in names:
        absmax, packed = tensors.get(f"{name}.weight.absmax"), tensors.get(f"{name}.weight")
        if absmax is not None and packed is not None:
            code = next((c for c in ("nf4", "fp4") if f"{name}.weight.quant_state.bitsandbytes__{c}" in tensors), None)
            if code is None:
                raise InputError(f"{name}.weight.quant_state.bitsandbytes__nf4", "is missing from the checkpoint", "the quant state")
            per_block = 2 * math.prod(packed.shape) / max(1, math.prod(absmax.shape))
            block = 1 << max(0, math.ceil(math.log2(max(per_block, 1))))
            nested = f"{name}.weight.nested_absmax" in tensors
            found[name] = LinearScheme(code, "bnb4", 4, block, True, "F32", code=code, double_quant=nested)
        elif f"{name}.SCB" in tensors:
            found[name] = LinearScheme("int8", "bnb8", 8, -1, True, "F32", activations="int8_outlier")
        else:
            found[name] = KEEP
    return found


def _read_fp8(quant: Mapping[str, Any], names: list[str], tensors: Mapping[str, Stored]) -> dict[str, LinearScheme]:
    block = quant.get("weight_block_size")
    if block != [128, 128]:
        raise InputError(f"{WHERE}.weight_block_size", f"is {block!r:.50}", "[128, 128]")
    if quant.get("activation_scheme", "dynamic") != "dynamic":
        raise InputError(f"{WHERE}.activation_scheme", f"is {quant.get('activation_scheme')!r:.50}", "dynamic")
    scheme = LinearScheme("fp8", "fp8_block", 8, 128, True, "F32")
    return {name: scheme if f"{name}.weight_scale_inv" in tensors else KEEP for name in names}


def _block_types(quant: Mapping[str, Any]) -> Mapping[str, str]:
    """Module -> block type. Raises InputError for what is no block type that a linear may stay in."""
    modules = quant.get("modules")
    if not isinstance(modules, Mapping):
        raise InputError(f"{WHERE}.modules", f"is {modules!r:.50}", "an object: a block type for each module that stays in blocks")
    for name, kind in modules.items():
        if not isinstance(kind, str) or kind not in GGML_BLOCKS:
            raise InputError(f"{WHERE}.modules", f"says {kind!r:.50} of {name!r:.200}", f"one of {', '.join(GGML_BLOCKS)}")
    return modules


def _read_blocks(quant: Mapping[str, Any], names: list[str], tensors: Mapping[str, Stored]) -> dict[str, LinearScheme]:
    types = _block_types(quant)
    return {name: ggml_scheme(types[name]) if name in types else KEEP for name in names}


_READERS: Mapping[str, Callable[[Mapping[str, Any], list[str], Mapping[str, Stored]], dict[str, LinearScheme]]] = {
    "awq": _read_awq,
    "gptq": _read_gptq,
    "compressed-tensors": _read_compressed,
    "bitsandbytes": _read_bnb,
    "fp8": _read_fp8,
    "gguf": _read_blocks,
}
