"""The tokenizer that a GGUF file's metadata describes, as the files of a Hugging Face checkpoint.

``gguf.md`` 5.5 lists the keys. The same file gives the same bytes. Nothing here reads a file: metadata comes checked from
``formats.gguf``; what it means is checked here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantkit.errors import InputError
from quantkit.text.pre_tokenizers import BYTE_LEVEL, PRE_TOKENIZERS
from quantkit.text.tokenizer import GENERATION, TEMPLATE_FILE, TOKENIZER, TOKENIZER_CONFIG, parse_backend

if TYPE_CHECKING:
    from quantkit.formats.gguf import GgufFile

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
"""What SentencePiece writes for a space."""
MAX_PIECE = 256
"""Characters of a SentencePiece piece: every place to cut it is tried, so a file must not choose how long that takes."""
NAMED_IDS: Mapping[str, str] = MappingProxyType(
    {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
)
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""End of text, of a turn, of a message: a model may write any of them to end."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The arrays and flags of the metadata, checked: every id is below ``len(tokens)``."""

    where: str
    architecture: str
    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    metadata: Mapping[str, Any]

    def key(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """``tokenizer.ggml.NAME``, or ``default``. Raises InputError when it is there and is no ``kind``."""
        value = self.metadata.get(PREFIX + name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{self.where}: {PREFIX}{name}", f"is {type(value).__name__}", str(getattr(kind, "__name__", kind)))
        return value

    def id(self, name: str) -> int | None:
        """A token id of the metadata. Raises InputError when it is not in the vocabulary."""
        value: int | None = self.key(name, int)
        if value is not None and not 0 <= value < len(self.tokens):
            raise InputError(f"{self.where}: {PREFIX}{name}", f"is {value}", f"an id from 0 to {len(self.tokens) - 1}")
        return value

    def strings(self, name: str) -> Sequence[str]:
        """An array of strings. Raises InputError when it is missing or is anything else."""
        value = self.metadata.get(PREFIX + name)
        if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
            raise InputError(f"{self.where}: {PREFIX}{name}", "is missing" if value is None else "is no array of strings", "strings")
        return value

    def numbers(self, name: str) -> Sequence[Any] | None:
        """An array of one number per token, or None when there is none. Raises InputError for another length or kind."""
        value = self.metadata.get(PREFIX + name)
        if value is None:
            return None
        length = getattr(value, "shape", (None,))[0]
        if length != len(self.tokens):
            raise InputError(f"{self.where}: {PREFIX}{name}", f"has {length} numbers", f"{len(self.tokens)}, one per token")
        return list(value.tolist())

    @property
    def named(self) -> dict[str, str]:
        """``bos_token`` and the like -> the token's text."""
        ids = {name: self.id(key) for name, key in NAMED_IDS.items()}
        return {name: self.tokens[index] for name, index in ids.items() if index is not None}


def hf_files(file: GgufFile) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and, where there is one, ``chat_template.jinja``.

    Raises InputError when the file has no tokenizer, one of a kind that quantkit does not build, or a broken one.
    """
    vocabulary = _vocabulary(file)
    builder = BUILDERS.get(vocabulary.model)
    if builder is None:
        raise InputError(f"{vocabulary.where}: {PREFIX}model", f"is {vocabulary.model!r:.100}", f"one of {', '.join(BUILDERS)}")
    body = builder(vocabulary)
    around = _around(vocabulary, body.adds_bos)
    tokenizer = _dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(_added_tokens(vocabulary, body.tokens)),
            "normalizer": body.normalizer,
            "pre_tokenizer": body.pre_tokenizer,
            "post_processor": _post_processor(vocabulary, around),
            "decoder": body.decoder,
            "model": body.model,
        },
        indent=None,  # with an indent a large vocabulary takes seconds to write
    )
    parse_backend(tokenizer, f"{vocabulary.where}: {PREFIX}tokens and merges")
    templates = _templates(vocabulary)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"add_{name}": add for name, add in around.items()},
        **vocabulary.named,
    }
    length = file.metadata.get(f"{vocabulary.architecture}.context_length")
    if isinstance(length, int):
        config["model_max_length"] = length
    if len(templates) > 1:  # a list of templates has its place in the config; one alone has its own file
        config["chat_template"] = [{"name": name, "template": text} for name, text in sorted(templates.items())]
    files = {TOKENIZER: tokenizer, TOKENIZER_CONFIG: _dumps(config), GENERATION: _dumps(_generation(vocabulary))}
    return files if len(templates) != 1 else {**files, TEMPLATE_FILE: next(iter(templates.values())).encode()}


def _dumps(data: Mapping[str, Any], indent: int | None = 2) -> bytes:
    return (json.dumps(data, indent=indent, ensure_ascii=False) + "\n").encode()


def _vocabulary(file: GgufFile) -> _Vocabulary:
    metadata, where = file.metadata, str(file.path)
    architecture, model = metadata.get("general.architecture"), metadata.get(f"{PREFIX}model")
    if model is None or model == "none":
        raise InputError(where, "has no tokenizer", f"{PREFIX}model and {PREFIX}tokens in its metadata")
    bare = _Vocabulary(where, str(architecture), str(model), (), (), metadata)
    tokens = bare.strings("tokens")
    if not tokens:
        raise InputError(f"{where}: {PREFIX}tokens", "is empty", "the vocabulary")
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise InputError(f"{where}: {PREFIX}tokens", f"holds {twice!r:.100} twice", "each token once")
    typed = _Vocabulary(where, str(architecture), str(model), tokens, (), metadata)
    types = typed.numbers("token_type")
    return _Vocabulary(where, str(architecture), str(model), tokens, types or (NORMAL,) * len(tokens), metadata)


@dataclass(frozen=True, slots=True)
class _Body:
    """The parts of a tokenizer.json that the kind of vocabulary decides. ``tokens`` is each id's text as the tokenizer has it."""

    model: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None
    pre_tokenizer: Mapping[str, Any] | None
    decoder: Mapping[str, Any]
    tokens: Sequence[str]
    adds_bos: bool


def _bpe(tokens: Sequence[str], merges: Sequence[tuple[str, str]], **options: Any) -> dict[str, Any]:
    base = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    vocab = {token: index for index, token in enumerate(tokens)}
    return {"type": "BPE", **base, **flags, **options, "vocab": vocab, "merges": [list(pair) for pair in merges]}


def _byte_level(vocabulary: _Vocabulary) -> _Body:
    name = vocabulary.key("pre", str, "default")
    if name not in PRE_TOKENIZERS:
        where = f"{vocabulary.where}: {PREFIX}pre"
        hint = "convert the original checkpoint instead: its tokenizer.json is used as it is"
        raise InputError(where, f"is {name!r:.100}", f"one of {', '.join(PRE_TOKENIZERS)}", hint)
    pre, merges = PRE_TOKENIZERS[name], []
    for number, merge in enumerate(vocabulary.strings("merges")):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise InputError(f"{vocabulary.where}: {PREFIX}merges", f"entry {number} is {merge!r:.100}", "two pieces and a space between")
        merges.append((left, right))
    return _Body(
        model=_bpe(vocabulary.tokens, merges, ignore_merges=pre.ignore_merges),
        normalizer=pre.normalizer,
        pre_tokenizer=pre.pre_tokenizer,
        decoder={**BYTE_LEVEL, "add_prefix_space": True},
        tokens=vocabulary.tokens,
        adds_bos=pre.adds_bos,
    )


def _sentencepiece(vocabulary: _Vocabulary) -> _Body:
    """SentencePiece BPE: the merges are those that its pieces and their scores imply."""
    gemma = vocabulary.architecture.startswith("gemma")
    scores = vocabulary.numbers("scores")
    if scores is None:
        raise InputError(f"{vocabulary.where}: {PREFIX}scores", "is missing", "the scores of a SentencePiece vocabulary")
    longest = max(vocabulary.tokens, key=len)
    if len(longest) > MAX_PIECE:
        raise InputError(f"{vocabulary.where}: {PREFIX}tokens", f"holds a piece of {len(longest)} characters", f"at most {MAX_PIECE}")
    # User-defined pieces are stored with real spaces; Gemma's runs of spaces are pieces that merges must reach.
    tokens = [SPACE * len(t) if gemma and t and not t.strip(" ") else t for t in vocabulary.tokens]
    if len(set(tokens)) != len(tokens):
        raise InputError(f"{vocabulary.where}: {PREFIX}tokens", "holds a run of spaces in both spellings", "each token once")
    # Gemma's scores do not follow the order in which its pieces were merged; the order of its ids does.
    rank = {token: index if gemma else -score for index, (token, score) in enumerate(zip(tokens, scores, strict=True))}
    prefix = vocabulary.key("add_space_prefix", bool, not gemma)
    unknown = vocabulary.id("unknown_token_id")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    options: dict[str, Any] = {"fuse_unk": True, "byte_fallback": True, "unk_token": None if unknown is None else tokens[unknown]}
    mergeable = {t for t, kind in zip(tokens, vocabulary.types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    return _Body(
        model=_bpe(tokens, implied_merges(tokens, rank, mergeable), **options),
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]} if prefix else spaces,
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        tokens=tokens,
        adds_bos=True,
    )


def implied_merges(tokens: Sequence[str], rank: Mapping[str, float], mergeable: set[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best piece first; among the pairs of one piece, by the ids of the two."""
    ids = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        if token not in mergeable:
            continue
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in mergeable and token[cut:] in mergeable]
        merges += [(rank[token], ids[left], ids[right], left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]


BUILDERS: Mapping[str, Callable[[_Vocabulary], _Body]] = MappingProxyType({"gpt2": _byte_level, "llama": _sentencepiece})
"""``tokenizer.ggml.model`` -> how its tokenizer.json is built."""


def _added_tokens(vocabulary: _Vocabulary, tokens: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Tokens that are found in a text before anything else: control tokens are special, user-defined ones are not."""
    named = {vocabulary.id(key) for key in (*NAMED_IDS.values(), *END_IDS)}
    for index, (token, kind) in enumerate(zip(tokens, vocabulary.types, strict=True)):
        special = kind in (UNKNOWN, CONTROL) or index in named
        if token and (special or kind == USER_DEFINED):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            yield {"id": index, "content": token, **flags, "special": special}


def _around(vocabulary: _Vocabulary, adds_bos: bool) -> dict[str, bool]:
    """Whether the tokenizer puts BOS before a text and EOS after it. Raises InputError when it would and there is none."""
    around = {
        "bos_token": vocabulary.key("add_bos_token", bool, adds_bos and "bos_token" in vocabulary.named),
        "eos_token": vocabulary.key("add_eos_token", bool, False),
    }
    for name, add in around.items():
        if add and name not in vocabulary.named:
            raise InputError(f"{vocabulary.where}: {PREFIX}add_{name}", f"is true and there is no {name}", f"{PREFIX}{NAMED_IDS[name]}")
    return around


def _post_processor(vocabulary: _Vocabulary, around: Mapping[str, bool]) -> dict[str, Any] | None:
    named = vocabulary.named
    added = {name: named[name] for name, add in around.items() if add}
    if not added:
        return None

    def template(*sequences: str) -> list[dict[str, Any]]:
        body: list[dict[str, Any]] = []
        for number, sequence in enumerate(sequences):
            texts = [{"Sequence": {"id": sequence, "type_id": number}}]
            before = [{"SpecialToken": {"id": added["bos_token"], "type_id": number}}] if "bos_token" in added else []
            after = [{"SpecialToken": {"id": added["eos_token"], "type_id": number}}] if "eos_token" in added else []
            body += [*before, *texts, *after]
        return body

    ids = {text: vocabulary.id(NAMED_IDS[name]) for name, text in added.items()}
    pieces = {text: {"id": text, "ids": [index], "tokens": [text]} for text, index in ids.items()}
    return {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"), "special_tokens": pieces}


def _templates(vocabulary: _Vocabulary) -> dict[str, str]:
    """Chat templates by name; the plain key is "default"."""
    found = {}
    for key, value in vocabulary.metadata.items():
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}."):
            if not isinstance(value, str):
                raise InputError(f"{vocabulary.where}: {key}", f"is {type(value).__name__}", "a template")
            found[key.removeprefix(TEMPLATE).removeprefix(".") or "default"] = value
    return found


def _generation(vocabulary: _Vocabulary) -> dict[str, Any]:
    ends = list(dict.fromkeys(index for key in END_IDS if (index := vocabulary.id(key)) is not None))
    ids = {
        "bos_token_id": vocabulary.id("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": vocabulary.id("padding_token_id"),
    }
    return {key: value for key, value in ids.items() if value is not None}
