"""The tokenizer of a Hugging Face checkpoint, as the metadata of a GGUF file.

The way back is ``gguf_tokenizer``; ``gguf.md`` 5.5 lists the keys. Two kinds of vocabulary exist there: byte-level BPE with its merges
("gpt2") and SentencePiece BPE, whose scores stand for the order of the merges ("llama"). A reader of GGUF knows neither normalizers
nor spaces that belong to a special token; what it will do otherwise than the checkpoint's tokenizer is said in ``notes``. Runs no
model code, reads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantkit import fs
from quantkit.errors import InputError
from quantkit.formats.gguf import F32, I32, Value, array, boolean, text, texts, u32
from quantkit.formats.jsonfile import parse_object
from quantkit.text import sentencepiece_model
from quantkit.text.gguf_tokenizer import CONTROL, NORMAL, PREFIX, TEMPLATE, UNUSED, USER_DEFINED
from quantkit.text.tiktoken_ranks import TIKTOKEN, from_ranks
from quantkit.text.tokenizer import (
    DEFAULT_TEMPLATE,
    GENERATION,
    LIMITS,
    NO_TOKENIZER,
    SENTENCEPIECE,
    SPECIAL_TOKENS,
    TEMPLATE_FILE,
    TEMPLATE_JSON,
    TOKENIZER,
    TOKENIZER_CONFIG,
    named_tokens,
)
from quantkit.text.vocabulary import ADDED_TOKENS, MAX_VOCABULARY, Body, Token, declared_added, from_json, from_sentencepiece, refuse_name

MORE_TEMPLATES, MAX_TEMPLATES = "additional_chat_templates", 64
FILE_LIMITS: Mapping[str, int] = MappingProxyType({**LIMITS, ADDED_TOKENS: 8 << 20, SENTENCEPIECE: 64 << 20, TIKTOKEN: 16 << 20})
"""The files that are read, and the most bytes that each may have."""
PAD_SCORE = -10000.0
ID_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "sep_token": "seperator_token_id",  # so spelled in the format
        "pad_token": "padding_token_id",
        "mask_token": "mask_token_id",
    }
)
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>", "<end_of_utterance>", "[EOT]", "<EOT>")
"""Tokens that end a turn wherever they exist; the first of them that a vocabulary has."""
END_OF_MESSAGE = "<|eom_id|>"


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """``metadata``: every ``tokenizer.*`` key. ``notes``: where readers of it will make other tokens than the checkpoint's tokenizer."""

    metadata: Mapping[str, Value]
    notes: tuple[str, ...]


def gguf_vocabulary(root: Path, config: Mapping[str, Any], architecture: str, pre: str | None = None) -> GgufVocabulary:
    """The tokenizer in ``root`` for a model whose ``config.json`` is ``config``; ``pre`` names how it cuts, where that cannot be told.

    There are as many tokens as ``vocab_size`` of the config says. Raises InputError when there is no tokenizer, one of a kind that GGUF
    does not have or cuts in a way without a name, a broken one, or one with more tokens than the model.
    """
    files = _read(root)
    where = str(root)
    settings = {name: parse_object(files[name], f"{where}: {name}") if name in files else {} for name in (TOKENIZER_CONFIG, GENERATION)}
    body = _body(root, files, settings[TOKENIZER_CONFIG], architecture, pre)
    model = _flat(config)
    named = {**body.named, **named_tokens({**_object(files, SPECIAL_TOKENS, where), **settings[TOKENIZER_CONFIG]})}
    needed = frozenset(named[name] for name in ("bos_token", "eos_token") if name in named)
    tokens, notes = _filled(body.tokens, model.get("vocab_size"), needed, where)
    ids = _special_ids(tokens, named, settings[GENERATION], model, where)
    around, more = _around(body, ids, settings[TOKENIZER_CONFIG], f"{where}: {TOKENIZER_CONFIG}")
    metadata = {
        f"{PREFIX}model": text(body.model),
        f"{PREFIX}pre": text(body.pre),
        f"{PREFIX}tokens": texts([token.text for token in tokens]),
    }
    if body.merges is None:
        metadata[f"{PREFIX}scores"] = array(F32, [token.score for token in tokens])
    metadata[f"{PREFIX}token_type"] = array(I32, [token.kind for token in tokens])
    if body.merges is not None:
        # The space between two pieces is the only one: one inside a piece is written as byte-level vocabularies write it.
        metadata[f"{PREFIX}merges"] = texts([" ".join(piece.replace(" ", "\u0120") for piece in pair) for pair in body.merges])
    metadata |= {f"{PREFIX}{key}": u32(index) for key, index in ids.items()}
    metadata |= {f"{PREFIX}add_{name}": boolean(add) for name, add in around.items()}
    if body.space_prefix is not None:
        metadata[f"{PREFIX}add_space_prefix"] = boolean(body.space_prefix)
    metadata |= _templates(root, files, settings[TOKENIZER_CONFIG])
    return GgufVocabulary(MappingProxyType(metadata), (*body.notes, *notes, *more))


def _read(root: Path) -> dict[str, bytes]:
    names = [name for name in FILE_LIMITS if (root / name).is_file()]
    return {name: fs.read_bytes(fs.confined(root, name, str(root)), FILE_LIMITS[name]) for name in names}


def _object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    return parse_object(files[name], f"{where}: {name}") if name in files else {}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return {**(inner if isinstance(inner, Mapping) else {}), **config}


def _body(root: Path, files: Mapping[str, bytes], config: Mapping[str, Any], architecture: str, pre: str | None) -> Body:
    where = str(root)
    if TOKENIZER in files:
        return from_json(files, where, pre)
    if SENTENCEPIECE in files:
        refuse_name(pre, f"{where}: {SENTENCEPIECE}")
        model = sentencepiece_model.parse(files[SENTENCEPIECE], f"{where}: {SENTENCEPIECE}")
        prefix = model.space_prefix and not architecture.startswith("gemma")  # their tokenizers take it back
        return from_sentencepiece(model, declared_added(files, config, where), prefix, where)
    if TIKTOKEN in files:
        return from_ranks(files[TIKTOKEN], f"{where}: {TIKTOKEN}", pre)
    hint = "copy the tokenizer files of the original model into the directory"
    if (root / "vocab.json").is_file():
        hint = "save it with a fast tokenizer of transformers: that writes a tokenizer.json"
    raise InputError(where, "has no tokenizer", NO_TOKENIZER, hint)


def _filled(tokens: Mapping[int, Token], declared: object, needed: frozenset[str], where: str) -> tuple[list[Token], list[str]]:
    """A token for every id of the model; what is missing is padding. Added tokens past the model's end have no embedding and go."""
    size = declared if isinstance(declared, int) and not isinstance(declared, bool) else 1 + max(tokens, default=-1)
    if not 0 < size <= MAX_VOCABULARY:
        raise InputError(f"{where}: vocab_size", f"is {size}", f"1 to {MAX_VOCABULARY}")
    beyond = {index: token for index, token in tokens.items() if index >= size}
    wrong = [token for token in beyond.values() if token.kind not in (CONTROL, USER_DEFINED) or token.text in needed]
    if wrong:
        what = f"has {1 + max(tokens)} tokens ({wrong[0].text!r:.50} is one), the model {size}"
        raise InputError(f"{where}: tokenizer", what, "a model with an embedding for every token", "this is the tokenizer of another model")
    notes = [f"{len(beyond)} added tokens have ids past the {size} of the model and are left out"] if beyond else []
    used = {token.text for index, token in tokens.items() if index < size}
    if len(used) != len(tokens) - len(beyond):
        raise InputError(
            f"{where}: tokenizer", "has two tokens that GGUF would spell alike", "tokens that differ in more than their spaces"
        )
    found = []
    for index in range(size):
        token = tokens.get(index, Token(f"[PAD{index}]", UNUSED, PAD_SCORE))
        if index not in tokens and token.text in used:
            raise InputError(f"{where}: tokenizer", f"has a token {token.text!r}, the name of padding", "another text for it")
        found.append(token)
    return found, notes


def _special_ids(
    tokens: Sequence[Token], named: Mapping[str, str], generation: Mapping[str, Any], model: Mapping[str, Any], where: str
) -> dict[str, int]:
    """The ``*_token_id`` keys. A name of the tokenizer's own counts before an id of the generation config, that before the config's."""
    by_text = {token.text: index for index, token in enumerate(tokens)}
    found: dict[str, int] = {}
    for name, key in ID_KEYS.items():
        if name in named and (index := by_text.get(named[name])) is not None:
            found[key] = index
        elif name in named and name in ("bos_token", "eos_token"):
            raise InputError(f"{where}: {TOKENIZER_CONFIG}", f"{name} {named[name]!r:.100} is not in the vocabulary", "a token of it")
        else:
            given = [*_ids_of(generation, f"{name}_id", len(tokens), where), *_ids_of(model, f"{name}_id", len(tokens), where)]
            if given:
                found[key] = given[0]
    ends = [*_ids_of(generation, "eos_token_id", len(tokens), where), *_ids_of(model, "eos_token_id", len(tokens), where)]
    turns = [by_text[name] for name in ENDS_OF_TURN if name in by_text and tokens[by_text[name]].kind != NORMAL]
    message = by_text.get(END_OF_MESSAGE)
    rest = [index for index in dict.fromkeys(ends) if index not in (found.get("eos_token_id"), message, *turns[:1])]
    for key, first in (("eot_token_id", turns[0] if turns else None), ("eom_token_id", message)):
        chosen = first if first is not None else rest.pop(0) if rest else None
        if chosen is not None:
            found[key] = chosen
    return found


def _ids_of(values: Mapping[str, Any], key: str, size: int, where: str) -> list[int]:
    """One id or several; None and -1 stand for none. Raises InputError for anything else, or for an end that the model does not have."""
    value = values.get(key)
    found = [] if value is None else value if isinstance(value, list) else [value]
    for index in found:
        known = isinstance(index, int) and not isinstance(index, bool)
        if not known or (key == "eos_token_id" and not -1 <= index < size):
            raise InputError(f"{where}: {key}", f"is {index!r:.100}", f"token ids from 0 to {size - 1}")
    return [index for index in found if 0 <= index < size]  # a padding id past the end is common, and never used


def _around(body: Body, ids: dict[str, int], config: Mapping[str, Any], where: str) -> tuple[dict[str, bool], list[str]]:
    """Whether BOS goes before a text and EOS after it. What the tokenizer config says wins; a first id that has no name becomes BOS."""
    notes = []
    bos, eos = ids.get("bos_token_id"), ids.get("eos_token_id")
    if body.around is None:
        does = {"bos_token": bos is not None, "eos_token": False}
    else:
        before, after = body.around
        if bos is None and len(before) == 1:
            ids["bos_token_id"] = bos = before[0]
        does = {"bos_token": bos is not None and before == (bos,), "eos_token": eos is not None and after == (eos,)}
        if (before and not does["bos_token"]) or (after and not does["eos_token"]):
            notes.append(f"the tokenizer puts ids {before} before and {after} after a text, GGUF readers at most BOS and EOS")
    around = {}
    for name, computed in does.items():
        stated = config.get(f"add_{name}")
        around[name] = stated if isinstance(stated, bool) else computed
        if around[name] and ids.get(ID_KEYS[name]) is None:
            raise InputError(f"{where}: add_{name}", f"is true and there is no {name}", f"a {name}")
        if body.around is not None and around[name] != computed:
            notes.append(
                f"add_{name} of {TOKENIZER_CONFIG} is {str(around[name]).lower()} and {TOKENIZER} does not do so: written as stated"
            )
    return around, notes


def _templates(root: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, Value]:
    """The chat templates: files of their own win, as in transformers, then the tokenizer config's, then a chat_template.json."""
    found = _template_files(root, files)
    if not found:
        where, stated = f"{root}: {TOKENIZER_CONFIG}: chat_template", config.get("chat_template")
        if stated is None and TEMPLATE_JSON in files:
            where = f"{root}: {TEMPLATE_JSON}"
            stated = parse_object(files[TEMPLATE_JSON], where).get("chat_template")
        found = _named_templates(stated, where)
    values = {TEMPLATE if name == DEFAULT_TEMPLATE else f"{TEMPLATE}.{name}": text(found[name]) for name in sorted(found)}
    others = sorted(name for name in found if name != DEFAULT_TEMPLATE)
    return {**values, f"{TEMPLATE}s": texts(others)} if others else values


def _template_files(root: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    found = {DEFAULT_TEMPLATE: _decoded(files[TEMPLATE_FILE], f"{root}: {TEMPLATE_FILE}")} if TEMPLATE_FILE in files else {}
    folder = root / MORE_TEMPLATES
    if folder.is_dir() and not folder.is_symlink():
        paths = sorted(folder.glob("*.jinja"))
        if len(paths) > MAX_TEMPLATES:
            raise InputError(str(folder), f"holds {len(paths)} templates", f"at most {MAX_TEMPLATES}")
        for path in paths:
            data = fs.read_bytes(fs.confined(folder, path.name, str(folder)), LIMITS[TEMPLATE_FILE])
            found.setdefault(_template_name(path.stem, str(folder)), _decoded(data, str(path)))
    return found


def _named_templates(stated: object, where: str) -> dict[str, str]:
    if stated is None:
        return {}
    if isinstance(stated, str):
        return {DEFAULT_TEMPLATE: stated}
    if not isinstance(stated, list) or not all(isinstance(t, dict) and isinstance(t.get("template"), str) for t in stated):
        raise InputError(where, f"is {type(stated).__name__}", "a template, or a list of templates with names")
    found = {_template_name(t.get("name"), where): t["template"] for t in stated}
    if len(found) != len(stated) or len(found) > MAX_TEMPLATES:
        raise InputError(where, f"has {len(stated)} templates", f"at most {MAX_TEMPLATES}, each with a name of its own")
    return found


def _template_name(name: object, where: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise InputError(where, f"names a template {name!r:.100}", "letters, digits, - and _")
    return name


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise InputError(where, f"is not UTF-8 at byte {exc.start}", "UTF-8 text") from exc
