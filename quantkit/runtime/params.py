"""How a request is sampled, and what comes out: plain data with its limits. Knows no torch, so that it is cheap to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import InputError

MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_BIAS = 100.0
MAX_PENALTY = 100.0
INVALID = -1
"""The token of logits that are not numbers."""
GREEDY_BELOW = 1e-5
"""A temperature below this takes the likeliest token."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it ends. Raises InputError for a value out of range.

    ``temperature`` 0 takes the likeliest token. ``top_k`` 0 or -1 means all. ``seed`` None draws a new one per request.
    ``logprobs`` None asks for none, n for the chosen token's and those of the n likeliest; ``prompt_logprobs`` the same for the
    prompt's tokens. ``repetition_penalty`` is over prompt and answer, the two others over the answer. ``logit_bias`` adds to logits by
    token id; a mapping is taken too. Generation ends at a ``stop`` string or a ``stop_ids`` token (neither becomes text), at the model's
    end token unless ``ignore_eos``, none of them before ``min_tokens``; or at ``max_tokens``.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, 1 << 31)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InputError("top_p", "is 0", "more than 0, up to 1", "temperature 0 takes the likeliest token")
        _integer("top_k", self.top_k, -1, 1 << 31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, MAX_PENALTY)
        if self.repetition_penalty == 0:
            raise InputError("repetition_penalty", "is 0", f"more than 0, up to {MAX_PENALTY:g}", "1 changes nothing")
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _integer(name, count, 0, MAX_LOGPROBS)
        self._check_lists()

    def _check_lists(self) -> None:
        """Stops and biases, which become the tuples that travel."""
        stop: object = self.stop
        stops = (stop,) if isinstance(stop, str) else _tuple("stop", stop)
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_ids", _tuple("stop_ids", self.stop_ids))
        given: object = self.logit_bias
        bias = _tuple("logit_bias", list(given.items()) if isinstance(given, Mapping) else given)
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in bias):
            raise InputError("logit_bias", "has an item that is no pair", "token ids, each with a number")
        object.__setattr__(self, "logit_bias", tuple(tuple(pair) for pair in bias))
        if len(stops) > MAX_STOPS or not all(isinstance(each, str) and each for each in stops):
            raise InputError("stop", f"has {len(stops)} strings, {stops.count('')} of them empty", f"at most {MAX_STOPS} texts, none empty")
        for token in self.stop_ids:
            _integer("stop_ids", token, 0, (1 << 31) - 1)
        for token, amount in self.logit_bias:
            _integer("logit_bias", token, 0, (1 << 31) - 1)
            _number("logit_bias", amount, -MAX_BIAS, MAX_BIAS)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def cut(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def reads_prompt(self) -> bool:
        """Whether sampling needs the prompt's tokens."""
        return self.repetition_penalty != 1 or self.prompt_logprobs is not None


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(name, f"is {value!r:.100}", "a list")
    return tuple(value)


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise InputError(name, f"is {value!r:.100}", f"a number from {low:g} to {high:g}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(name, f"is {value!r:.100}", f"a whole number from {low} to {high}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities (natural) of one position in the model's own distribution: before penalties, temperature and cuts.

    ``top`` are the likeliest tokens with theirs, likeliest first; the chosen ``token`` need not be among them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of one position, INVALID when its logits are not numbers, and its log-probabilities if they were asked for.

    ``prompt``, with a request's first token alone: those of the prompt's tokens from the second on.
    """

    token: int
    logprob: TokenLogprob | None = None
    prompt: tuple[TokenLogprob, ...] = ()
