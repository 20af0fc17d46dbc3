"""SentencePiece's ``tokenizer.model``: the pieces and the settings that matter, read from its protobuf wire format.

Read here and not by the library because the file is a stranger's, and because the library's processor does not tell the settings.
Knows nothing of tokenizers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantkit.errors import InputError

PIECE, TRAINER, NORMALIZER = 1, 2, 3
"""Fields of the model."""
TEXT, SCORE, KIND = 1, 2, 3
"""Fields of a piece; the kinds are numbered as GGUF numbers token types."""
MODEL_TYPE, IDS = 3, {40: "unk_token", 41: "bos_token", 42: "eos_token", 43: "pad_token"}
DEFAULT_IDS = {"unk_token": 0, "bos_token": 1, "eos_token": 2, "pad_token": -1}
"""Of the trainer's settings: what was trained, and the ids of special pieces."""
CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES = 2, 3, 4
UNIGRAM, BPE = 1, 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_PIECES = 1 << 22


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece: ``kind`` 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class Model:
    """``space_prefix``: a space goes before a text. ``normalizes``: characters are replaced, or extra spaces removed, before anything else.

    ``named``: the text of the special pieces that the model names.
    """

    pieces: tuple[Piece, ...]
    space_prefix: bool
    normalizes: bool
    named: Mapping[str, str]


def _fields(data: bytes, where: str) -> Iterator[tuple[int, int, int | bytes]]:
    """(field, wire type, value) of a message. Raises InputError for what is none."""
    at, end = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= end or shift > 63:
                raise InputError(where, f"is no protobuf message (at byte {at})", "a SentencePiece model")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < end:
        head = varint()
        field, wire = head >> 3, head & 7
        if wire == VARINT:
            yield field, wire, varint()
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(wire) or (varint() if wire == BYTES else -1)
        if wire not in (FIXED64, BYTES, FIXED32) or length < 0 or length > end - at:
            raise InputError(where, f"is no protobuf message (at byte {at})", "a SentencePiece model")
        yield field, wire, data[at : at + length]
        at += length


def _piece(data: bytes, where: str) -> Piece:
    text, score, kind = "", 0.0, 1
    for field, wire, value in _fields(data, where):
        if (field, wire) == (TEXT, BYTES) and isinstance(value, bytes):
            try:
                text = value.decode()
            except UnicodeDecodeError as exc:
                raise InputError(where, "has a piece that is not UTF-8", "UTF-8 pieces") from exc
        elif (field, wire) == (SCORE, FIXED32) and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif (field, wire) == (KIND, VARINT) and isinstance(value, int):
            kind = value
    if not 1 <= kind <= 6 or not text or score != score or abs(score) == float("inf"):
        raise InputError(where, f"has a piece {text!r:.100} of kind {kind} and score {score}", "a text, a kind from 1 to 6, a number")
    return Piece(text, score, kind)


def parse(data: bytes, where: str) -> Model:
    """The model in ``data``. Raises InputError when it is none, or one of another kind than BPE: scores mean something else there."""
    pieces: list[Piece] = []
    ids, trained, prefix, normalizes = dict(DEFAULT_IDS), UNIGRAM, True, True
    charsmap, extra = b"", True
    for field, wire, value in _fields(data, where):
        if wire != BYTES or not isinstance(value, bytes):
            continue
        if field == PIECE:
            pieces.append(_piece(value, where))
        elif field == TRAINER:
            for inner, _, number in _fields(value, where):
                if inner == MODEL_TYPE and isinstance(number, int):
                    trained = number
                elif inner in IDS and isinstance(number, int):
                    ids[IDS[inner]] = -1 if number >> 63 else number
        elif field == NORMALIZER:
            for inner, _, setting in _fields(value, where):
                if inner == DUMMY_PREFIX:
                    prefix = bool(setting)
                elif inner == EXTRA_SPACES:
                    extra = bool(setting)
                elif inner == CHARSMAP and isinstance(setting, bytes):
                    charsmap = setting
    if not pieces or len(pieces) > MAX_PIECES:
        raise InputError(where, f"has {len(pieces)} pieces", f"1 to {MAX_PIECES} pieces: a SentencePiece model")
    if trained != BPE:
        kind = "a unigram model" if trained == UNIGRAM else f"a model of type {trained}"
        raise InputError(where, f"is {kind}", "a BPE model: GGUF readers merge by score")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise InputError(where, "holds a piece twice", "each piece once")
    normalizes = bool(charsmap) or extra
    named = {name: pieces[index].text for name, index in ids.items() if 0 <= index < len(pieces)}
    return Model(tuple(pieces), prefix, normalizes, named)
