"""Which tensor of a GGUF file gets which type: llama.cpp's mixtures as tables, and the order in which they are asked (``gguf.md`` 4).

Knows the names and shapes of tensors and four numbers of a model; never data, files or encoders.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.errors import InputError

BLOCKS: Mapping[str, int] = MappingProxyType(
    {"F32": 1, "F16": 1, "BF16": 1}
    | dict.fromkeys(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"), 32)
    | dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"), 256)
)
"""Types that a tensor can be given -> values in a block; a row must be whole blocks."""
FALLBACKS: Mapping[str, str] = MappingProxyType(
    {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
)
"""What a type gives way to where rows are no whole blocks; F16 where they are none of these either (``gguf.md`` 4.6)."""


@dataclass(frozen=True, slots=True)
class FileType:
    """A mixture: ``id`` is its ``general.file_type``, ``default`` the type of a tensor for which no rule says otherwise."""

    name: str
    id: int
    default: str


_TYPES = tuple(
    FileType(*row)
    for row in (
        ("f32", 0, "F32"),
        ("f16", 1, "F16"),
        ("bf16", 32, "BF16"),
        ("q8_0", 7, "Q8_0"),
        ("q6_k", 18, "Q6_K"),
        ("q5_k_m", 17, "Q5_K"),
        ("q5_k_s", 16, "Q5_K"),
        ("q5_1", 9, "Q5_1"),
        ("q5_0", 8, "Q5_0"),
        ("q4_k_m", 15, "Q4_K"),
        ("q4_k_s", 14, "Q4_K"),
        ("q4_1", 3, "Q4_1"),
        ("q4_0", 2, "Q4_0"),
        ("iq4_nl", 25, "IQ4_NL"),
        ("iq4_xs", 30, "IQ4_XS"),
        ("q3_k_l", 13, "Q3_K"),
        ("q3_k_m", 12, "Q3_K"),
        ("q3_k_s", 11, "Q3_K"),
        ("q2_k", 10, "Q2_K"),
        ("q2_k_s", 21, "Q2_K"),
    )
)
_BY_NAME = {item.name: item for item in _TYPES}
FILE_TYPES: Mapping[str, FileType] = MappingProxyType(
    _BY_NAME | {alias: _BY_NAME[f"{alias}_m"] for alias in ("q5_k", "q4_k", "q3_k")},
)
"""What a file can be asked to be, and three short names."""
FILE_TYPE_NAMES: Mapping[int, str] = MappingProxyType(
    {item.id: item.name.upper() for item in _TYPES}
    | {19: "IQ2_XXS", 20: "IQ2_XS", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M"}
    | {31: "IQ1_M", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0"}
)
"""``general.file_type`` -> name, of everything that a file may say it is (``gguf.md`` 1)."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rules ask of a model: ``architecture`` as GGUF calls it, ``layers`` its block count, heads of the first layer."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int


@dataclass(frozen=True, slots=True)
class MixtureOptions:
    """What the user decides (``gguf.md`` 4.7). Types are names of BLOCKS in either case.

    ``pure``: no rules, the default type everywhere. ``tensor_types``: (pattern, type), the first pattern that is found in a name.
    ``output_type`` and ``embedding_type`` win over everything. ``leave_output``: ``output.weight`` stays as it is.
    """

    pure: bool = False
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    leave_output: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The type of a tensor; ``wanted`` is what the rules said, and differs where the tensor's rows are no whole blocks of it."""

    type: str
    wanted: str


# which tensors (4.1, 4.2)

OUTPUT, EMBEDDING, LAYER_EMBEDDING = "output.weight", "token_embd.weight", "per_layer_token_embd.weight"
_KEPT_NAMES = frozenset({"position_embd.weight", "token_types.weight"})
_KEPT = re.compile(
    "|".join(
        re.escape(part)
        for part in (
            *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
            *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
            *(".position_embd", ".patch_embd", ".patch_merger", ".rel_pos", "sam.pos_embd", "sam.neck.", "sam.net_"),
            *("a.rvq.codebook", "mm.a.code_embd", "time_mix_first.weight", "time_mix_lerp_fused.weight"),
            *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight"),
            *(f"time_mix_{small}.weight" for small in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
        )
    )
)
"""Found anywhere in a name: norms, routers, tables, and what is too small or too touchy to be quantized."""
_LAYER = re.compile(r"blk\.(\d+)\.")

ATTN_V, ATTN_K, ATTN_OUT, FFN_DOWN = "attn_v", "attn_k", "attn_output", "ffn_down"
_ROLES = (
    *(("attn_qkv.weight", ATTN_V), ("attn_kv_b.weight", ATTN_V), ("attn_v.weight", ATTN_V)),
    *(("attn_k.weight", ATTN_K), ("attn_output.weight", ATTN_OUT), ("ffn_down", FFN_DOWN)),
)
"""Found anywhere in a name -> the role of the tensor, the first that is found."""


def quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor (``shape`` slowest axis first) is ever quantized; leading axes of size 1 do not count (``gguf.md`` 4.1)."""
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    return len(sizes) > 1 and name.endswith("weight") and name not in _KEPT_NAMES and not _KEPT.search(name)


def _role(name: str) -> str:
    if name in (OUTPUT, EMBEDDING, LAYER_EMBEDDING):
        return EMBEDDING if name == LAYER_EMBEDDING else name
    return next((role for part, role in _ROLES if part in name), "")


def _layer(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


# the rules (4.3, 4.5)


@dataclass(frozen=True, slots=True)
class _Place:
    """Which tensor of its role this is: ``index`` of ``count``, in a model with ``sharing`` query heads to a KV head."""

    index: int
    count: int
    sharing: int
    importance: bool


_Holds = Callable[[_Place], bool]
_Rules = Mapping[str, tuple[tuple[str, _Holds], ...]]
"""Role -> (type, when), the first that holds; the file type's default where none does."""


def _first(count: int) -> _Holds:
    return lambda at: at.index < count


def _part(of: int) -> _Holds:
    return lambda at: at.index < at.count // of


def _more(at: _Place) -> bool:
    """The first and the last eighth of the layers, and every third of those between."""
    eighth = at.count // 8
    return at.index < eighth or at.index >= 7 * at.count // 8 or (at.index - eighth) % 3 == 2


def _always(_: _Place) -> bool:
    return True


def _all(kind: str) -> tuple[tuple[str, _Holds], ...]:
    return ((kind, _always),)


def _shared(at: _Place) -> bool:
    return at.sharing >= 4


def _first_weighed(at: _Place) -> bool:
    return at.importance and _part(8)(at)


def _first_unweighed(at: _Place) -> bool:
    return not at.importance and _part(8)(at)


_IQ4: _Rules = {ATTN_V: (("Q5_K", _shared),), FFN_DOWN: (("Q5_K", _first_unweighed),)}
_MIXTURES: Mapping[str, _Rules] = {
    "q2_k": {ATTN_V: (("Q4_K", _shared), ("Q3_K", _always)), FFN_DOWN: _all("Q3_K"), ATTN_OUT: _all("Q3_K")},
    "q2_k_s": {ATTN_V: (("Q4_K", _shared),), FFN_DOWN: (("Q4_K", _part(8)),)},
    "q3_k_m": {
        ATTN_V: (("Q5_K", _first(2)), ("Q4_K", _always)),
        FFN_DOWN: (("Q5_K", _part(16)), ("Q4_K", _always)),
        ATTN_OUT: _all("Q4_K"),
    },
    "q3_k_l": {ATTN_V: _all("Q5_K"), FFN_DOWN: _all("Q5_K"), ATTN_OUT: _all("Q5_K")},
    "q4_k_s": {ATTN_V: (("Q5_K", _first(4)),), FFN_DOWN: (("Q5_K", _part(8)),)},
    "q4_k_m": {ATTN_V: (("Q6_K", _more),), FFN_DOWN: (("Q6_K", _more),)},
    "q5_k_m": {ATTN_V: (("Q6_K", _more),), FFN_DOWN: (("Q6_K", _more),)},
    "iq4_nl": _IQ4,
    "iq4_xs": _IQ4,
    "q4_0": {FFN_DOWN: (("Q4_1", _first_weighed),)},
    "q5_0": {FFN_DOWN: (("Q5_1", _first_weighed),)},
}
"""Of the file types that are not here every tensor gets the default."""
_FALCON: Mapping[str, _Rules] = {
    "q3_k_m": {FFN_DOWN: (("Q5_K", _part(16)), ("Q4_K", _more))},
    "q3_k_l": {FFN_DOWN: _all("Q4_K"), ATTN_OUT: _all("Q4_K")},
    "q4_k_s": {FFN_DOWN: ()},
    "q4_k_m": {FFN_DOWN: (("Q6_K", _part(16)), ("Q5_K", _more))},
}
"""What a Falcon has instead."""
_EIGHT_EXPERTS: _Rules = {ATTN_V: _all("Q8_0"), ATTN_K: _all("Q8_0")}
_EIGHT_EXPERTS_OUT = frozenset({"q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs"})
"""File types that give a model of eight experts Q5_K for the attention's output; the others give it the default."""
_SEVENTY_BILLION = frozenset({("llama", 80), ("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)})
"""(architecture, layers) of models that share their V among so many heads that more bits for it cost nothing; a Llama only if it does."""


def _rules(file_type: FileType, facts: ModelFacts) -> _Rules:
    rules = dict(_MIXTURES.get(file_type.name, {}))
    if facts.experts == 8:
        rules |= {**_EIGHT_EXPERTS, ATTN_OUT: _all("Q5_K") if file_type.name in _EIGHT_EXPERTS_OUT else ()}
    if facts.architecture == "falcon":
        rules |= {ATTN_OUT: (), **_FALCON.get(file_type.name, {})}
    return rules


def _more_for_v(facts: ModelFacts) -> bool:
    known = (facts.architecture, facts.layers) in _SEVENTY_BILLION
    return known and not (facts.architecture == "llama" and facts.heads == facts.kv_heads)


def _output_type(columns: int, default: str, facts: ModelFacts) -> str:
    return "Q8_0" if default == "Q8_0" or columns % BLOCKS[default] or facts.architecture == "falcon" else "Q6_K"


# the choice


def file_type_of(name: str) -> FileType:
    """The mixture called ``name``, in either case. Raises InputError listing those that there are."""
    if name.lower() not in FILE_TYPES:
        raise InputError(f"--type {name!r:.100}", "is not known", f"one of {', '.join(FILE_TYPES)}")
    return FILE_TYPES[name.lower()]


def tensor_type_of(name: str) -> str:
    """The tensor type called ``name``, in either case. Raises InputError listing those that there are."""
    if name.upper() not in BLOCKS:
        raise InputError(f"tensor type {name!r:.100}", "is not known", f"one of {', '.join(BLOCKS).lower()}")
    return name.upper()


def tensor_type_pairs(text: str) -> tuple[tuple[str, str], ...]:
    """``NAME=TYPE`` pairs between white space, as an option or a file has them. Raises InputError for what is no pair."""
    pairs = []
    for word in text.split():
        pattern, separator, kind = word.partition("=")
        if not (pattern and separator and kind):
            raise InputError(f"--tensor-type {word!r:.100}", "is no pair", "PATTERN=TYPE, like ffn_down=q6_k")
        pairs.append((pattern, tensor_type_of(kind)))
    return tuple(pairs)


def needs_importance(name: str, kind: str, file_type: FileType) -> bool:
    """Whether a tensor of this type is of no use without an importance matrix: Q2_K inside Q2_K_S (``gguf.md`` 4.7)."""
    return file_type.name == "q2_k_s" and kind == "Q2_K" and _role(name) not in (OUTPUT, EMBEDDING)


def _by_pattern(options: MixtureOptions, names: Collection[str], file_type: FileType) -> dict[str, str]:
    """The types that ``tensor_types`` give to ``names``. Raises InputError for a pattern that is none, or is found in no name."""
    if options.tensor_types and BLOCKS[file_type.default] == 1:
        raise InputError(f"--type {file_type.name}", "has one type for all tensors", "a quantized file type, to choose types in")
    found: dict[str, str] = {}
    for text, kind in options.tensor_types:
        try:
            pattern = re.compile(text.lower())
        except re.error as exc:
            raise InputError(f"--tensor-type {text!r:.100}", f"is not a regular expression ({exc})", "a Python regular expression") from exc
        matched = [name for name in names if pattern.search(name)]
        if not matched:
            raise InputError(f"--tensor-type {text!r:.100}", "matches no tensor", f"a part of a name, like {', '.join(list(names)[:3])}")
        found = dict.fromkeys(matched, tensor_type_of(kind)) | found
    return found


def _fitting(wanted: str, columns: int) -> str:
    """``wanted``, or what it gives way to for rows of ``columns`` values."""
    if columns % BLOCKS[wanted] == 0:
        return wanted
    fallback = FALLBACKS.get(wanted, wanted)
    return "F16" if columns % BLOCKS[fallback] else fallback


def _forced(name: str, options: MixtureOptions, by_pattern: Mapping[str, str]) -> str | None:
    """What ``output_type`` and ``embedding_type`` say of a tensor; a pattern that finds the per-layer table goes before the latter."""
    role = _role(name)
    if role == EMBEDDING and options.embedding_type and not (name == LAYER_EMBEDDING and name in by_pattern):
        return tensor_type_of(options.embedding_type)
    return tensor_type_of(options.output_type) if role == OUTPUT and options.output_type else None


def _by_rules(
    columns: Mapping[str, int], all_names: Sequence[str], file_type: FileType, facts: ModelFacts, output_type: str | None, importance: bool
) -> dict[str, str]:
    """The types of the tensors that no option decides, name -> columns; what an option decides is not counted (``gguf.md`` 4.3)."""
    rules, default = _rules(file_type, facts), file_type.default
    tied, values = OUTPUT not in all_names, sum(_role(name) == ATTN_V for name in all_names)
    sharing = facts.heads // facts.kv_heads if facts.kv_heads else 0
    seen, chosen = Counter[str](), dict[str, str]()
    for name in sorted(columns, key=lambda name: (_layer(name), name)):
        role = _role(name)
        if role == OUTPUT or (role == EMBEDDING and tied):
            chosen[name] = output_type or _output_type(columns[name], default, facts)
            continue
        # The tensors of experts are many to a layer in some files, so that counting them says nothing.
        index = _layer(name) if role == FFN_DOWN and facts.experts > 1 else seen[role]
        place = _Place(index, values if role == ATTN_V else facts.layers, sharing, importance)
        seen[role] += 1
        kind = next((kind for kind, holds in rules.get(role, ()) if holds(place)), default)
        chosen[name] = "Q5_K" if role == ATTN_V and kind in ("Q3_K", "Q4_K") and _more_for_v(facts) else kind
    return chosen


def choose_types(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    file_type: FileType,
    facts: ModelFacts,
    options: MixtureOptions,
    importance: bool,
) -> dict[str, Choice]:
    """The type of each of ``tensors`` (name, type it has, shape slowest axis first), by name and in their order (``gguf.md`` 4).

    What is never quantized keeps its type. ``importance``: there is an importance matrix. Raises InputError for an option that names
    no type or no tensor, for rows that an option's type cannot hold, and for a mixture that needs an importance matrix and has none.
    """
    skipped = OUTPUT if options.leave_output else None
    columns = {name: shape[-1] for name, _, shape in tensors if name != skipped and quantizable(name, shape)}
    by_pattern = _by_pattern(options, columns, file_type)
    forced = {name: kind for name in columns if (kind := _forced(name, options, by_pattern)) is not None}
    for name, kind in forced.items():
        if columns[name] % BLOCKS[kind]:
            raise InputError(name, f"has rows of {columns[name]} values, which {kind} cannot hold", f"a multiple of {BLOCKS[kind]}")
    wanted = dict.fromkeys(columns, file_type.default)
    if not options.pure and BLOCKS[file_type.default] > 1:
        left = {name: count for name, count in columns.items() if name not in forced and name not in by_pattern}
        output_type = options.output_type and tensor_type_of(options.output_type)
        wanted |= _by_rules(left, [name for name, _, _ in tensors], file_type, facts, output_type, importance)
    wanted |= by_pattern | forced
    chosen = {
        name: Choice(_fitting(wanted[name], columns[name]), wanted[name]) if name in wanted else Choice(source, source)
        for name, source, _ in tensors
    }
    unweighed = [name for name in columns if needs_importance(name, chosen[name].type, file_type)]
    if unweighed and not importance:
        what = f"makes {len(unweighed)} tensors Q2_K, {unweighed[0]} first, which need an importance matrix"
        raise InputError(f"--type {file_type.name}", what, "an importance matrix, or q2_k")
    return chosen
