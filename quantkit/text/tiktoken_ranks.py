"""tiktoken's ranks, as the first Qwen models have them (``qwen.tiktoken``): byte strings, of which the merges are made again.

No model code is run: what it would say (the special tokens, how text is cut) is written here.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from itertools import pairwise

from quantkit.errors import InputError
from quantkit.text.gguf_tokenizer import CONTROL, MAX_PIECE, NORMAL
from quantkit.text.vocabulary import Body, Token, checked_name

TIKTOKEN = "qwen.tiktoken"
MAX_MERGE_WORK = 1 << 28
"""The pairs of bytes that rebuilding merges may look at, so that a file cannot choose how long it takes."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
"""What these models have after the ranks."""


def from_ranks(data: bytes, where: str, pre: str | None) -> Body:
    """A first-generation Qwen: byte strings and their ranks, of which the merges are made again."""
    ranks = _ranks(data, where)
    if sum(len(piece) ** 2 for piece in ranks) > MAX_MERGE_WORK:
        raise InputError(where, "has too many long tokens", f"lengths whose squares add up to {MAX_MERGE_WORK}")
    spelled = {piece: _spell(piece) for piece in ranks}
    merges = []
    for piece, rank in ranks.items():
        if len(piece) > 1:
            left, right = _halves(ranks, piece, rank, where)
            merges.append((spelled[left], spelled[right]))
    tokens = {rank: Token(spelled[piece], NORMAL) for piece, rank in ranks.items()}
    first = len(ranks)
    tokens |= {first + number: Token(content, CONTROL) for number, content in enumerate(SPECIAL)}
    end = SPECIAL[0]
    named = {"bos_token": end, "eos_token": end, "unk_token": end}
    notes = () if pre is None else tuple(checked_name(pre))
    return Body("gpt2", pre or "qwen2", tokens, merges, None, ((), ()), named, notes)


def _ranks(data: bytes, where: str) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n")):
        if not line.strip():
            continue
        encoded, _, rank = line.strip().partition(b" ")
        try:
            piece, index = base64.b64decode(encoded, validate=True), int(rank) if rank.isdigit() and len(rank) < 10 else -1
        except binascii.Error as exc:
            raise InputError(f"{where}: line {number + 1}", "is not base64", "a token in base64 and its rank") from exc
        if not piece or index != len(found) or piece in found or len(piece) > MAX_PIECE:
            expected = f"a new token of at most {MAX_PIECE} bytes in base64, and rank {len(found)}"
            raise InputError(f"{where}: line {number + 1}", f"is {line!r:.100}", expected)
        found[piece] = index
    missing = [byte for byte in range(256) if bytes([byte]) not in found]
    if missing:
        raise InputError(where, f"has no token for byte {missing[0]}", "tokens for all 256 bytes")
    return found


def _halves(ranks: Mapping[bytes, int], piece: bytes, rank: int, where: str) -> tuple[bytes, bytes]:
    """The two tokens that merged to ``piece``: what the merges before it leave of its bytes."""
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while len(parts) > 2:
        best = min((ranks.get(a + b, rank), at) for at, (a, b) in enumerate(pairwise(parts)))
        if best[0] >= rank:
            break
        parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
    if len(parts) != 2:
        raise InputError(where, f"token {rank} is made of {len(parts)} earlier ones", "two, as merges make it")
    return parts[0], parts[1]


def _byte_spelling() -> tuple[str, ...]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it is printable, one after U+0100 where not."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


_SPELLING = _byte_spelling()


def _spell(piece: bytes) -> str:
    return "".join(_SPELLING[byte] for byte in piece)
