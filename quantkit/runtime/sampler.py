"""From the logits of one position to the next token: penalties, temperature, top-k, top-p, min-p, and a random number.

Pure functions: what comes out depends on the logits, the request's own parameters and its own history, never on which
other requests share the batch. This module knows no text and no batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import InputError

MAX_LOGPROBS = 20
MAX_STOPS = 64
INVALID = -1
"""The token of logits that are not numbers."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it ends. Raises InputError for a value out of range.

    ``temperature`` 0 takes the likeliest token. ``top_k`` 0 means all. ``seed`` None draws a new one per request.
    ``logprobs`` None asks for none, n for the chosen token's and those of the n likeliest. Generation ends at a ``stop``
    string or a ``stop_ids`` token (neither becomes text), at the model's end token unless ``ignore_eos``, or at ``max_tokens``.
    """

    max_tokens: int
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

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, 1 << 31)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InputError("top_p", "is 0", "more than 0, up to 1", "temperature 0 takes the likeliest token")
        _integer("top_k", self.top_k, 0, 1 << 31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise InputError(
                "stop", f"has {len(self.stop)} strings, {self.stop.count('')} of them empty", f"at most {MAX_STOPS}, none empty"
            )
        for token in self.stop_ids:
            _integer("stop_ids", token, 0, (1 << 31) - 1)

    @property
    def penalized(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not low <= value <= high:
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
    """The token of one position, INVALID when its logits are not numbers, and its log-probabilities if they were asked for."""

    token: int
    logprob: TokenLogprob | None = None


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of position ``index`` of a request with ``seed``: a hash, so it has no state to lose or to share."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52  # 52 bits: times any positive total it stays below the total


def greedy(logits: Tensor) -> list[Sampled]:
    """The likeliest token of each row of ``logits [B, V]``, the lowest id where several are equal."""
    best = logits.max(-1)
    return [
        Sampled(token if math.isfinite(value) else INVALID)
        for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def sample(logits: Tensor, params: SamplingParams, *, seed: int, index: int, counts: Mapping[int, int]) -> Sampled:
    """The next token from ``logits [V]`` float32.

    In this order: presence and frequency penalties over ``counts`` (how often each token was generated), temperature,
    top-k, top-p (over what top-k left), min-p (relative to the likeliest); then the token at ``uniform(seed, index)`` of
    the distribution that is left.
    """
    shaped = penalized(logits, params, counts)
    if params.temperature == 0:
        token = greedy(shaped.unsqueeze(0))[0].token
    else:
        token = _draw(shaped, params, uniform(seed, index))
    if token == INVALID or params.logprobs is None:
        return Sampled(token)
    return Sampled(token, token_logprob(logits, token, params.logprobs))


def penalized(logits: Tensor, params: SamplingParams, counts: Mapping[int, int]) -> Tensor:
    """``logits`` less ``presence + frequency * count`` for every generated token (OpenAI's definition)."""
    if not params.penalized or not counts:
        return logits
    tokens = torch.tensor(list(counts), device=logits.device)
    amounts = torch.tensor([params.presence_penalty + params.frequency_penalty * count for count in counts.values()])
    return logits.index_add(0, tokens, -amounts.to(logits.device, logits.dtype))


def token_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Log-probabilities of ``token`` and of the ``count`` likeliest tokens under ``softmax(logits [V])``."""
    logprobs = torch.log_softmax(logits, -1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        best = logprobs.topk(min(count, logprobs.numel()))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)


def _draw(logits: Tensor, params: SamplingParams, point: float) -> int:
    """The token at ``point`` of the cut distribution of ``logits [V]`` at the request's temperature."""
    peak = logits.max()
    if not math.isfinite(float(peak)):
        return INVALID
    weights = ((logits - peak) / params.temperature).exp()  # [V], the likeliest is 1: a tiny temperature cannot overflow
    if params.top_k or params.top_p < 1:
        tokens, weights = _cut(weights, params)
    else:
        tokens = None
    if params.min_p:
        weights = torch.where(weights >= params.min_p, weights, 0)
    below = weights.cumsum(0, dtype=torch.float64)
    place = int(torch.searchsorted(below, below[-1] * point, right=True))
    return place if tokens is None else int(tokens[place])


def _cut(weights: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens, likeliest first, that top-k and then top-p leave, and their weights; the likeliest always stays."""
    vocab = weights.numel()
    if params.top_k:
        best = weights.topk(min(params.top_k, vocab))
        tokens, values = best.indices, best.values
        total = values.sum(dtype=torch.float64)
    else:
        # Tokens below this share of the mass hold less than 1 - top_p of it all together: they need not be sorted.
        total = weights.sum(dtype=torch.float64)
        tokens = (weights >= (1 - params.top_p) * total / vocab).nonzero().squeeze(1)
        values, order = weights[tokens].sort(descending=True, stable=True)
        tokens = tokens[order]
    if params.top_p == 1:
        return tokens, values
    kept = int((values.cumsum(0, dtype=torch.float64) < params.top_p * total).sum()) + 1  # up to the first that reaches the mass
    return tokens[:kept], values[:kept]
