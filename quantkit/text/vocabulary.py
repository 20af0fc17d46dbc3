"""The vocabulary of Hugging Face tokenizer files: tokens with their kinds, merges or scores, and what is put around a text.

Byte-level BPE keeps its merges; SentencePiece BPE has scores that stand for the order of the merges. Knows the numbers and spellings
that ``gguf.md`` 5.5 gives tokens, and no key of a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from quantkit.errors import InputError
from quantkit.formats.jsonfile import parse_object
from quantkit.text import sentencepiece_model
from quantkit.text.gguf_tokenizer import BYTE, CONTROL, MAX_PIECE, NORMAL, SPACE, UNKNOWN, USER_DEFINED, implied_merges
from quantkit.text.pre_tokenizers import PRE_TOKENIZERS, Step, name_of, steps_of
from quantkit.text.tokenizer import SENTENCEPIECE, TOKENIZER, TOKENIZER_CONFIG, parse_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

ADDED_TOKENS = "added_tokens.json"
ADDED_SCORE = -1000.0
MAX_VOCABULARY = 1 << 22
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
PRE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD", "Precompiled")
OPTION = "--pre-tokenizer"


@dataclass(frozen=True, slots=True)
class Token:
    """One id: its text as GGUF spells it, its type, and for SentencePiece its score."""

    text: str
    kind: int
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Body:
    """What the kind of tokenizer decides: tokens by id (with holes), and ``named`` special tokens of its own, by text."""

    model: str
    pre: str
    tokens: Mapping[int, Token]
    merges: Sequence[tuple[str, str]] | None
    space_prefix: bool | None
    around: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Ids before and after a text, or None where the files do not say."""
    named: Mapping[str, str]
    notes: tuple[str, ...] = ()


def from_json(files: Mapping[str, bytes], root: str, pre: str | None) -> Body:
    """From ``tokenizer.json``; a ``tokenizer.model`` beside it gives the scores, where it agrees. ``pre``: a name instead of the one found.

    Raises InputError for a tokenizer that is no byte-level and no SentencePiece BPE, or changes or cuts a text as GGUF cannot say.
    """
    from tokenizers.models import BPE

    where = f"{root}: {TOKENIZER}"
    backend, data = parse_backend(files[TOKENIZER], where), parse_object(files[TOKENIZER], where)
    model, kind = data["model"], type(backend.model).__name__
    if not isinstance(backend.model, BPE):
        raise InputError(where, f"is a {kind} tokenizer", "a BPE tokenizer: GGUF readers have no other for these models")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise InputError(where, "marks the parts of a word", "a BPE tokenizer without marks inside or after a word")
    steps = steps_of(data.get("pre_tokenizer"))
    if ("bytes",) in steps:
        return _byte_level(backend, data, steps, where, pre)
    refuse_name(pre, where)
    return _sentencepiece_json(backend, data, steps, files, root)


def checked_name(pre: str) -> list[str]:
    """What to say of a name that the user gave. Raises InputError when it cannot be one."""
    if not PRE_NAME.fullmatch(pre):
        raise InputError(OPTION, f"is {pre!r:.100}", f"a name such as {', '.join([*PRE_TOKENIZERS][1:4])}")
    if pre in PRE_TOKENIZERS:
        return []
    return [f"quantkit does not know the pre-tokenizer {pre!r}: whether it cuts as the tokenizer does is open"]


def refuse_name(pre: str | None, where: str) -> None:
    """Raises InputError for a name that the user gave to a tokenizer that needs none."""
    if pre is not None:
        raise InputError(OPTION, f"is {pre!r:.100}, and the tokenizer of {where} is SentencePiece, which does not cut", f"no {OPTION}")


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, which are strings "A B" or pairs; the tokenizers library has checked them."""
    found = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.append((left, right))
    return found


def _added(backend: Backend, *, pieces: bool) -> dict[int, Token]:
    """Added tokens by id. With ``pieces`` a space is spelled ``SPACE``, which readers look for in the text itself as a space."""
    found = {}
    for index, token in backend.get_added_tokens_decoder().items():
        found[int(index)] = _added_token(token.content, special=token.special, pieces=pieces)
    return found


def _added_token(content: str, *, special: bool, pieces: bool) -> Token:
    if special or LOOKS_SPECIAL.fullmatch(content):
        return Token(content, CONTROL, ADDED_SCORE)
    return Token(content.replace(SPACE, " ") if pieces else content, USER_DEFINED, ADDED_SCORE)


def _base(backend: Backend, where: str) -> dict[int, str]:
    vocabulary = backend.get_vocab(with_added_tokens=False)
    found = {index: token for token, index in vocabulary.items()}
    if len(found) != len(vocabulary):
        raise InputError(where, "gives two tokens one id", "an id for each token")
    return found


def _surroundings(processor: Mapping[str, Any] | None, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before and after a text. Read and not tried: the library panics at some broken templates."""
    before: list[int] = []
    after: list[int] = []
    for node in _nodes(processor, "processors"):
        kind = node.get("type")
        if kind == "TemplateProcessing":
            sides = _template_sides(node, f"{where}: post_processor")
        elif kind in ("BertProcessing", "RobertaProcessing"):
            sides = [node["cls"][1]], [node["sep"][1]]
        else:
            continue
        before, after = [*sides[0], *before], [*after, *sides[1]]
    return tuple(before), tuple(after)


def _template_sides(node: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
    sides: tuple[list[int], list[int]] = ([], [])
    seen = 0
    for part in node["single"]:
        token = part.get("SpecialToken") if isinstance(part, dict) else None
        if token is None:
            seen = 1
        elif token["id"] not in node["special_tokens"]:
            raise InputError(where, f"names {token['id']!r:.100} and has no ids for it", "ids for every special token of its template")
        else:
            sides[seen].extend(node["special_tokens"][token["id"]]["ids"])
    return sides


def _stripping_notes(backend: Backend) -> list[str]:
    tokens = [t for t in backend.get_added_tokens_decoder().values() if t.lstrip or t.rstrip or t.single_word]
    if not tokens:
        return []
    return [f"{len(tokens)} added tokens ({tokens[0].content!r:.50}, ...) take the spaces beside them, or whole words; GGUF cannot say it"]


def _byte_level(backend: Backend, data: Mapping[str, Any], steps: Sequence[Step], where: str, pre: str | None) -> Body:
    merges = _pairs(data["model"])
    nodes = list(_nodes(data.get("normalizer"), "normalizers"))
    kinds = [str(node["type"]) for node in nodes]
    notes = _stripping_notes(backend)
    if "NFC" in kinds:
        notes.append("the tokenizer brings text into Unicode form NFC, GGUF readers do not: combining accents give other tokens")
    if pre is not None:
        notes += checked_name(pre)
    else:
        if kinds not in ([], ["NFC"]):
            raise _unnamed(f"{where}: normalizer", f"changes the text by {', '.join(kinds)}", "no normalizer but NFC")
        pre = _name(backend, data, merges, steps, where)
    known = PRE_TOKENIZERS.get(pre)
    if known is not None and known.approximated:
        notes.append(f"llama.cpp cuts otherwise than {pre} at combining marks, and between capitals outside ASCII")
    tokens = {index: Token(token, NORMAL) for index, token in _base(backend, where).items()} | _added(backend, pieces=False)
    unknown = data["model"].get("unk_token")
    named = {"unk_token": unknown} if isinstance(unknown, str) else {}
    return Body("gpt2", pre, tokens, merges, None, _surroundings(data.get("post_processor"), where), named, tuple(notes))


def _nodes(node: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    if node is None:
        return
    if node.get("type") != "Sequence":
        yield node
        return
    for part in node[inner]:
        yield from _nodes(part, inner)


def _unnamed(where: str, what: str, expected: str) -> InputError:
    return InputError(where, what, expected, f"{OPTION} NAME writes the name that you choose: llama.cpp then cuts as that name says")


def _name(backend: Backend, data: Mapping[str, Any], merges: Sequence[tuple[str, str]], steps: Sequence[Step], where: str) -> str:
    ignore = bool(data["model"].get("ignore_merges"))
    cuts, nfc = data.get("pre_tokenizer"), data.get("normalizer") is not None and any(_nodes(data["normalizer"], "normalizers"))
    name = name_of(cuts, nfc=nfc, ignore_merges=ignore)
    if name is None:
        other = name_of(cuts, nfc=nfc, ignore_merges=not ignore)
        if other is not None and _merges_reach_all(backend, merges):
            name = other  # then it is the same whether a piece of the vocabulary is taken whole or merged
    if name is None:
        shown = "; ".join(" ".join(step) for step in steps)
        expected = f"one of {', '.join(name for name in PRE_TOKENIZERS if name != 'default')}"
        raise _unnamed(f"{where}: pre_tokenizer", f"cuts in a way that GGUF has no name for ({shown:.400})", expected)
    return name


def _merges_reach_all(backend: Backend, merges: Sequence[tuple[str, str]]) -> bool:
    from tokenizers.models import BPE

    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    model = BPE(vocabulary, list(merges))
    return all(token in added or len(model.tokenize(token)) == 1 for token in vocabulary)


def _sentencepiece_json(backend: Backend, data: Mapping[str, Any], steps: Sequence[Step], files: Mapping[str, bytes], root: str) -> Body:
    where = f"{root}: {TOKENIZER}"
    base, added = _base(backend, where), _added(backend, pieces=True)
    prefix, notes = _spaces(data, steps, any(SPACE in piece[1:] for piece in base.values()), where)
    notes += _stripping_notes(backend)
    bytes_ = bool(data["model"].get("byte_fallback"))
    unknown = data["model"].get("unk_token")
    merges = _pairs(data["model"])
    tokens = _scored(base, merges, unknown, bytes_)
    if SENTENCEPIECE in files:
        model = sentencepiece_model.parse(files[SENTENCEPIECE], f"{root}: {SENTENCEPIECE}")
        if _agrees(model, base, added, merges):
            tokens |= {index: Token(piece.text, piece.kind, piece.score) for index, piece in enumerate(model.pieces)}
    special = {index for index, token in added.items() if token.kind == CONTROL}
    scores = {t.text: t.score for i, t in tokens.items() if t.kind in (NORMAL, USER_DEFINED) and i not in special}
    notes += _merge_notes(merges, scores, where)
    tokens |= {index: _kept(token, tokens.get(index)) for index, token in added.items()}
    _need_bytes(tokens, where)
    named = {"unk_token": unknown} if isinstance(unknown, str) else {}
    return Body("llama", "default", tokens, None, prefix, _surroundings(data.get("post_processor"), where), named, tuple(notes))


def _agrees(
    model: sentencepiece_model.Model, base: Mapping[int, str], added: Mapping[int, Token], merges: Sequence[tuple[str, str]]
) -> bool:
    """Whether ``tokenizer.model`` has the pieces of the tokenizer.json, and scores in the order of its merges; the latter is what runs."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    made = dict.fromkeys(left + right for left, right in merges if len({*left, *right}) > 1)
    ordered = [scores[piece] for piece in made if piece in scores]
    same = all(base.get(index) == piece.text or index in added for index, piece in enumerate(model.pieces))
    return same and all(first >= second for first, second in pairwise(ordered))


def _kept(token: Token, piece: Token | None) -> Token:
    """An added token; the unknown token stays one."""
    return piece if piece is not None and piece.kind == UNKNOWN and piece.text == token.text else token


def _spaces(data: Mapping[str, Any], steps: Sequence[Step], inner: bool, where: str) -> tuple[bool, list[str]]:
    """Whether a space goes before a text; ``inner``: there are pieces with a space inside.

    Raises InputError where a text is changed or cut otherwise than SentencePiece does it.
    """
    prefix, notes, replaced = False, [], False
    for node in _nodes(data.get("normalizer"), "normalizers"):
        kind = str(node["type"])
        if kind == "Prepend" and node.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and node.get("pattern") == {"String": " "} and node.get("content") == SPACE:
            replaced = True
        elif kind in UNICODE_FORMS:
            notes.append(f"the tokenizer normalizes text ({kind}), GGUF readers do not")
        else:
            raise InputError(f"{where}: normalizer", f"changes the text by {kind}", f"spaces that become {SPACE!r}, and no other change")
    for step in steps:
        if step[:2] == ("split at", " ") and replaced:
            continue  # no space is left where it would cut
        settings = dict(part.split("=", 1) for part in step[1:]) if step[0] == "Metaspace" else {}
        if settings.get("replacement") != SPACE:
            raise InputError(f"{where}: pre_tokenizer", f"is {' '.join(step):.300}", "the cuts of a byte-level or SentencePiece tokenizer")
        scheme = settings.get("prepend_scheme", "always" if settings.get("add_prefix_space", "True") == "True" else "never")
        prefix, replaced = scheme != "never", True
        if scheme == "first":
            notes.append("the tokenizer puts a space before the first word only, GGUF readers after every special token too")
        elif scheme == "always":
            notes.append("the tokenizer puts no second space before a text that begins with one, GGUF readers do")
        if inner and settings.get("split", "True") == "True":
            notes.append("the tokenizer merges nothing across a space, GGUF readers do")
    if not replaced:
        raise InputError(where, "is neither a byte-level nor a SentencePiece tokenizer", f"one that writes spaces as {SPACE!r} or as bytes")
    return prefix, notes


def _scored(base: Mapping[int, str], merges: Sequence[tuple[str, str]], unknown: object, byte_fallback: bool) -> dict[int, Token]:
    """Pieces with the scores that SentencePiece gives: 0 for the first that a merge makes, -1 for the next; what no merge makes is last."""
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    tokens, last = {}, len(order)
    for index in sorted(base):
        piece = base[index]
        if byte_fallback and BYTE_PIECE.fullmatch(piece):
            tokens[index] = Token(piece, BYTE)
        elif piece == unknown:
            tokens[index] = Token(piece, UNKNOWN)
        elif piece in order:
            tokens[index] = Token(piece, NORMAL, float(-order[piece]))
        else:
            tokens[index] = Token(piece, NORMAL, float(-last))
            last += 1
    return tokens


def _need_bytes(tokens: Mapping[int, Token], where: str) -> None:
    if sum(token.kind == BYTE for token in tokens.values()) < 256:
        raise InputError(where, "has no tokens for the 256 bytes", "byte fallback: llama.cpp ends at a character it has no token for")


def _merge_notes(merges: Sequence[tuple[str, str]], scores: Mapping[str, float], where: str) -> list[str]:
    """Whether scores can stand for ``merges``: every pair of pieces that makes a piece merges, and all for one piece together."""
    longest = max(scores, key=len, default="")
    if len(longest) > MAX_PIECE:
        raise InputError(where, f"holds a piece of {len(longest)} characters", f"at most {MAX_PIECE}")
    implied = set(implied_merges(list(scores), {piece: -score for piece, score in scores.items()}, set(scores)))
    used = [(left, right) for left, right in merges if {left, right, left + right} <= scores.keys()]
    # Runs of one character may take turns: the longest that fits is found in any order.
    results = [left + right for left, right in used if len({*left, *right}) > 1]
    turns = sum(a != b for a, b in pairwise(["", *results]))
    if implied == set(used) and turns == len(set(results)):
        return []
    return ["the order of the tokenizer's merges is none that scores can say: GGUF readers will sometimes merge other pieces first"]


def from_sentencepiece(model: sentencepiece_model.Model, added: Mapping[int, tuple[str, bool]], space_prefix: bool, where: str) -> Body:
    """From ``tokenizer.model`` alone; ``added`` is text and whether special, by id. Raises InputError without tokens for the bytes."""
    tokens = {}
    for index, piece in enumerate(model.pieces):
        spelled = piece.text.replace(SPACE, " ") if piece.kind == USER_DEFINED else piece.text
        tokens[index] = Token(spelled, piece.kind, piece.score)
    for index, (content, special) in added.items():
        tokens[index] = _kept(_added_token(content, special=special, pieces=True), tokens.get(index))
    _need_bytes(tokens, f"{where}: {SENTENCEPIECE}")
    notes = ["the tokenizer normalizes text, GGUF readers do not"] if model.normalizes else []
    return Body("llama", "default", tokens, None, space_prefix, None, model.named, tuple(notes))


def declared_added(files: Mapping[str, bytes], config: Mapping[str, Any], where: str) -> dict[int, tuple[str, bool]]:
    """Added tokens of ``added_tokens.json`` and of the tokenizer config, which wins."""
    found: dict[int, tuple[str, bool]] = {}
    listed = parse_object(files[ADDED_TOKENS], f"{where}: {ADDED_TOKENS}") if ADDED_TOKENS in files else {}
    for content, index in listed.items():
        found[_id(index, f"{where}: {ADDED_TOKENS}: {content!r:.100}")] = (content, False)
    declared = config.get("added_tokens_decoder")
    for key, token in (declared if isinstance(declared, dict) else {}).items():
        place = f"{where}: {TOKENIZER_CONFIG}: added_tokens_decoder: {key!r:.100}"
        text_of = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text_of, str) or not text_of:
            raise InputError(place, "has no content", "an added token with its text")
        index = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else None
        found[_id(index, place)] = (text_of, bool(token.get("special")))
    return found


def _id(index: object, where: str) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < MAX_VOCABULARY:
        raise InputError(where, f"is {index!r:.100}", f"an id from 0 to {MAX_VOCABULARY - 1}")
    return index
