"""What the engine and its ranks say to each other: steps, answers, errors; and their form on a socket.

A message is one JSON object behind its length in four bytes: nothing that comes in is ever executed. This module knows no
model and no process.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import CheckFailed, InputError, MachineError, QuantkitError, RuntimeDied
from quantkit.runtime.params import Sampled, SamplingParams, TokenLogprob
from quantkit.runtime.scheduler import Chunk

MAX_FRAME = 64 << 20
_LENGTH = struct.Struct("<I")
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RankJob:
    """What the ranks load. ``sharded``: from a shard directory. ``device`` "cpu" or "cuda"; ``timeout`` of an exchange in seconds.

    ``kv_fp8``: keys and values are stored as float8. ``memory_share``: of a device's memory, what weights, a pass of
    ``step_tokens`` tokens that samples for ``sequences``, and keys and values may take together.
    """

    path: str
    sharded: bool
    tp: int
    dtype: str
    device: str
    parity: bool
    timeout: float
    kv_fp8: bool
    memory_share: float
    step_tokens: int
    sequences: int
    lm_head: str = "auto"
    """How the head is held: a key of ``plan.LM_HEADS``."""
    attention: str = "auto"
    """One of ``attention.BACKENDS``."""


@dataclass(frozen=True, slots=True)
class Begin:
    """A sequence that enters: how it is sampled, and the seed of its random numbers.

    ``ends``: tokens that it must not sample before ``params.min_tokens``; ``prompt``: its tokens, where ``params.reads_prompt``;
    ``length``: how many tokens its prompt has.
    """

    sequence: int
    params: SamplingParams
    seed: int
    ends: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    length: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of every rank: forget ``free``, take the blocks of ``preempted``, begin ``begin``, run ``chunks`` as one batch, sample
    those that ask for it."""

    free: tuple[int, ...]
    preempted: tuple[int, ...]
    begin: tuple[Begin, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What a rank tells once it has loaded. ``kv_blocks``: how many fit into its memory, None when it holds no KV head."""

    weight_bytes: int
    kv_bytes_per_token: int
    kv_blocks: int | None


def step_to_json(step: Step) -> Message:
    return {
        "free": list(step.free),
        "preempted": list(step.preempted),
        "begin": [[b.sequence, asdict(b.params), b.seed, b.ends, b.prompt, b.length] for b in step.begin],
        "chunks": [[c.sequence, c.start, list(c.tokens), c.sample, list(c.blocks)] for c in step.chunks],
    }


def step_from_json(data: Message) -> Step:
    return Step(
        tuple(data["free"]),
        tuple(data["preempted"]),
        tuple(
            Begin(sequence, SamplingParams(**fields), seed, tuple(ends), tuple(prompt), length)
            for sequence, fields, seed, ends, prompt, length in data["begin"]
        ),
        tuple(Chunk(sequence, start, tuple(tokens), sample, tuple(blocks)) for sequence, start, tokens, sample, blocks in data["chunks"]),
    )


def sampled_to_json(sampled: list[Sampled]) -> list[Any]:
    def scores(one: TokenLogprob) -> list[Any]:
        return [one.token, one.logprob, [list(pair) for pair in one.top]]

    return [
        s.token if s.logprob is None and not s.prompt else [s.token, s.logprob and scores(s.logprob), [scores(one) for one in s.prompt]]
        for s in sampled
    ]


def sampled_from_json(data: list[Any]) -> list[Sampled]:
    def scores(item: list[Any]) -> TokenLogprob:
        token, logprob, top = item
        return TokenLogprob(token, logprob, tuple((t, p) for t, p in top))

    def one(item: Any) -> Sampled:
        if isinstance(item, int):
            return Sampled(item)
        token, logprob, prompt = item
        return Sampled(token, logprob and scores(logprob), tuple(scores(each) for each in prompt))

    return [one(item) for item in data]


def error_to_json(error: QuantkitError) -> Message:
    return {"exit": error.exit_code, "where": error.where, "what": error.what, "expected": error.expected, "hint": error.hint}


def error_from_json(data: Message) -> QuantkitError:
    """The error that a rank raised, by its branch of the exception tree."""
    kinds: dict[int, type[QuantkitError]] = {kind.exit_code: kind for kind in (CheckFailed, InputError, MachineError, RuntimeDied)}
    kind = kinds.get(data["exit"], QuantkitError)
    return kind(data["where"], data["what"], data["expected"], data["hint"])


def frame(message: Message) -> bytes:
    """``message`` as bytes on a socket."""
    body = json.dumps(message, separators=(",", ":")).encode()
    assert len(body) <= MAX_FRAME
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Bytes in, messages out. Raises RuntimeDied for what is no message."""

    def __init__(self, where: str) -> None:
        self._where, self._buffer = where, bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that ``data`` completes."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise RuntimeDied(self._where, f"sent a message of {length} bytes", f"at most {MAX_FRAME}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = json.loads(body)
            except (ValueError, RecursionError) as exc:
                raise RuntimeDied(self._where, "sent what is no message", "JSON") from exc
            if not isinstance(message, dict):
                raise RuntimeDied(self._where, "sent what is no message", "a JSON object")
            yield message


def received(connection: socket.socket, where: str) -> Iterator[Message]:
    """What comes over ``connection``, from ``where``, until its other end is gone. Raises RuntimeDied for what is no message."""
    frames = Frames(where)
    while True:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            return
        if not data:
            return
        yield from frames.feed(data)
