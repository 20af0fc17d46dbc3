"""How byte-level tokenizers cut a text before they merge: GGUF's names for it, and the ``pre_tokenizer`` JSON of each.

A GGUF file has a name only (``tokenizer.ggml.pre``, ``gguf.md`` 5.5), a tokenizer.json the cuts themselves. The table serves both
directions: a name gives the JSON, and ``name_of`` finds the name of a JSON by what it does, however it is spelled. Knows no
vocabulary and no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_BYTES: Mapping[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_MERGE_ALL_BYTES: Mapping[str, Any] = {**_BYTES, "use_regex": False}
BYTE_LEVEL = _BYTES
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ``use_regex`` of a ByteLevel pre-tokenizer cuts by."""
NFC: Mapping[str, Any] = {"type": "NFC"}

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"|\s*[\r\n]+"
_SPACES = r"|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _LINES + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _LINES + _SPACES
_DEEPSEEK_CJK = "[一-龥\u0800-一가-\ud7ff]+"
_DEEPSEEK_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _LINES + _SPACES
)
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z"
    "\u00b5À-ÖØ-öø-ƺƼ-ƿ\u01c4-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-\u03f5Ϸ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-"
    "\u1fbc\u1fbeῂ-ῄῆ-\u1fccῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0"
    "-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)


def _cased(contraction: str, digits: str) -> str:
    """Words cut where lower case turns into upper, digits, punctuation with the slashes and line ends after it, spaces."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{_UPPER}*{_LOWER}+{contraction}|{lead}{_UPPER}+{_LOWER}*{contraction}|{digits}{_SLASH_TAIL}"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _cuts(*patterns: str) -> dict[str, Any]:
    """Cut at every match of the first pattern, the pieces at every match of the next; then bytes as characters."""
    return {"type": "Sequence", "pretokenizers": [*map(_split, patterns), dict(_MERGE_ALL_BYTES)]}


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a byte-level vocabulary cuts a text before it merges."""

    pre_tokenizer: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    """Readers of GGUF files apply none; the original tokenizers of this name do."""
    ignore_merges: bool = False
    """A piece that is in the vocabulary is a token, whatever the merges say."""
    adds_bos: bool = False
    """Where the file does not say."""
    approximated: bool = False
    """llama.cpp cuts otherwise at combining marks, and between capitals outside ASCII."""


_GPT2 = PreTokenizer(_BYTES)
_GPT2_NFC = PreTokenizer(_BYTES, NFC)
_DIGITS = PreTokenizer({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, dict(_BYTES)]})
_CL100K = _cuts(f"{_CONTRACTION}|{_WORD}" + r"\p{N}{1,3}" + _TAIL)
_LLAMA3 = PreTokenizer(_CL100K, ignore_merges=True, adds_bos=True)
_GLM = PreTokenizer(_CL100K)
_ONE_DIGIT = _cuts(f"{_CONTRACTION}|{_WORD}" + r"\p{N}" + _TAIL)
_QWEN2 = PreTokenizer(_ONE_DIGIT, NFC)
_STABLELM2 = PreTokenizer(_ONE_DIGIT)
_DEEPSEEK3 = PreTokenizer(_cuts(r"\p{N}{1,3}", _DEEPSEEK_KANA, _DEEPSEEK_WORDS))
_GPT4O = PreTokenizer(_cuts(_cased(f"{_CONTRACTION}?", r"\p{N}{1,3}")), approximated=True)
_FALCON: Mapping[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        dict(_BYTES),
        {"type": "Digits", "individual_digits": False},
        _split("[0-9][0-9][0-9]"),
    ],
}
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "default": _GPT2,
        "gpt-2": _GPT2,
        "phi-2": _GPT2,
        "mpt": _GPT2_NFC,
        "olmo": _GPT2_NFC,
        "jais": _GPT2,
        "trillion": _GPT2,
        "granite-docling": _GPT2,
        "smollm": _DIGITS,
        "starcoder": _DIGITS,
        "refact": _DIGITS,
        "codeshell": _DIGITS,
        "exaone": _DIGITS,
        "minerva-7b": _DIGITS,
        "command-r": PreTokenizer(_DIGITS.pre_tokenizer, NFC),
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "falcon3": _LLAMA3,
        "falcon-h1": _LLAMA3,
        "lfm2": _LLAMA3,
        "smaug-bpe": _GLM,
        "dbrx": _GLM,
        "chatglm-bpe": _GLM,
        "glm4": PreTokenizer(_CL100K, ignore_merges=True),
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
        "stablelm2": _STABLELM2,
        "hunyuan": _STABLELM2,
        "megrez": _STABLELM2,
        "grok-2": _STABLELM2,
        "bailingmoe": _STABLELM2,
        "qwen35": PreTokenizer(
            _cuts(_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _LINES + _SPACES)
        ),
        "deepseek-llm": PreTokenizer(
            _cuts(r"[\r\n]", _DEEPSEEK_LETTERS, "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _DEEPSEEK_CJK, r"\p{N}")
        ),
        "deepseek-coder": PreTokenizer(_cuts(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
        "deepseek-v3": _DEEPSEEK3,
        "hunyuan-dense": _DEEPSEEK3,
        "falcon": PreTokenizer(_FALCON),
        "tekken": PreTokenizer(_cuts(_cased("", r"\p{N}")), ignore_merges=True, adds_bos=True, approximated=True),
        "gpt-4o": _GPT4O,
        "llama4": _GPT4O,
        "bloom": PreTokenizer(_cuts(_BLOOM)),
        "gpt3-finnish": PreTokenizer(_cuts(_BLOOM)),
        "poro-chat": PreTokenizer(_cuts(_BLOOM)),
        "viking": PreTokenizer(_cuts(_BLOOM, r"\p{N}")),
        "seed-coder": PreTokenizer(_cuts(_CONTRACTION + "|" + _WORD + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _LINES + _SPACES)),
    }
)
"""``tokenizer.ggml.pre`` -> how the original tokenizer cuts; a file without the key was made before there was one but GPT-2's.

Of names that mean the same, ``name_of`` gives the first that is no ``default``.
"""

_SAME = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTION),
    (r"'(?i:[sdmt]|ll|ve|re)", _CONTRACTION),
    (r"(?i:[sdmt]|ll|ve|re)", "(?i:s|t|re|ve|m|ll|d)"),
    (r"[^\r\n\p{L}\p{N}]?+", r"[^\r\n\p{L}\p{N}]?"),
    (r"\p{L}++", r"\p{L}+"),
    (r"[^\s\p{L}\p{N}]++", r"[^\s\p{L}\p{N}]+"),
    (r"\p{N}{1}", r"\p{N}"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
)
"""Spellings that cut alike wherever these patterns have them: what may not be given back is never what the rest needs, and a greedy
run of spaces reaches the last line end with or without a repetition."""


def _regex(pattern: str) -> str:
    for spelled, same in _SAME:
        pattern = pattern.replace(spelled, same)
    return pattern


Step = tuple[str, ...]


def steps_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[Step, ...]:
    """What a ``pre_tokenizer`` does, one step after the other, spelled in one way only; a step of an unknown kind is its JSON.

    Raises ValueError when it is no pre-tokenizer of the tokenizers library.
    """
    return tuple(_steps(pre_tokenizer))


def _steps(node: Mapping[str, Any] | None) -> Iterator[Step]:
    if node is None:
        return
    match node.get("type"):
        case "Sequence":
            for part in node["pretokenizers"]:
                yield from _steps(part)
        case "ByteLevel":
            if node.get("add_prefix_space", True):
                yield ("prefix",)
            if node.get("use_regex", True):
                yield ("split", _regex(GPT2))
            yield ("bytes",)
        case "Split":
            yield _cut(node)
        case "Digits":
            yield ("split", r"\p{N}" if node.get("individual_digits") else r"\p{N}+")
        case kind:
            yield (str(kind), *(f"{key}={node[key]}" for key in sorted(node) if key != "type"))


def _cut(node: Mapping[str, Any]) -> Step:
    pattern = node["pattern"]
    behavior, invert = node.get("behavior"), bool(node.get("invert"))
    if "Regex" not in pattern:
        return ("split at", str(pattern.get("String")), str(behavior), str(invert))
    regex = _regex(str(pattern["Regex"]))
    # Keeping the matches alone is cutting at them where they cover every text, as those of the table do that are used so.
    if behavior == "Isolated" or (behavior == "Removed" and invert and regex.endswith(_SPACES)):
        return ("split", regex)
    return ("split", regex, str(behavior), str(invert))


def name_of(pre_tokenizer: Mapping[str, Any] | None, *, nfc: bool, ignore_merges: bool) -> str | None:
    """The name of what ``pre_tokenizer`` does, or None. ``ignore_merges`` must fit; ``nfc`` chooses where it can.

    A reader normalizes nothing, so names that differ in that alone mean the same to it.
    """
    wanted = steps_of(pre_tokenizer)
    alike = [
        name
        for name, pre in PRE_TOKENIZERS.items()
        if name != "default" and pre.ignore_merges == ignore_merges and steps_of(pre.pre_tokenizer) == wanted
    ]
    return next((name for name in alike if (PRE_TOKENIZERS[name].normalizer is not None) == nfc), next(iter(alike), None))
