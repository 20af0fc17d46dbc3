"""How answers are told in OpenAI's words: choices and their logprobs, whole or in pieces, for completions and for chat.

Plain dictionaries, ready for JSON. Knows no HTTP and runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quantkit.runtime.engine import Delta
from quantkit.runtime.sampler import TokenLogprob
from quantkit.text.tokenizer import StreamDecoder, Tokenizer

Json = dict[str, object]
LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON cannot say."""


class TokenTexts:
    """The text of single tokens, as it stands inside a longer text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str | None] = {}

    def whole(self, token: int) -> str | None:
        """The token's text, or None when it holds a part of a character."""
        if token not in self._known:
            alone = self._tokenizer.decode([token], special=True)
            twice = self._tokenizer.decode([token, token], special=True)  # the second keeps the space that decoders strip from the first
            self._known[token] = None if "\ufffd" in alone else twice[len(alone) :]
        return self._known[token]

    def label(self, token: int) -> str:
        """The token's text, or its id where it has none of its own."""
        text = self.whole(token)
        return _by_id(token) if text is None else text


def _by_id(token: int) -> str:
    return f"token_id:{token}"


@dataclass(slots=True)
class Choice:
    """One completion as it grows."""

    index: int
    prompt: Sequence[int] = ()
    opening: str = ""
    """Text before the first token: the prompt, when it is echoed."""
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Those of the prompt's tokens from the second on."""
    tokens: int = 0
    finish_reason: str | None = None

    def echoed(self, count: int) -> list[TokenLogprob]:
        """The prompt's tokens with the ``count`` likeliest beside each; of the first, that nothing is known."""
        rest = [TokenLogprob(one.token, one.logprob, one.top[:count]) for one in self.prompt_logprobs]
        return [TokenLogprob(self.prompt[0], math.nan, ()), *rest]

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.prompt_logprobs += delta.prompt_logprobs
        self.tokens += len(delta.tokens)
        self.finish_reason = delta.finish_reason


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an endpoint says what happens: functions that make one item of ``choices``."""

    kind: str
    chunk_kind: str
    prefix: str
    whole: Callable[[Choice, Json | None], Json]
    first: Callable[[Choice, Json | None], Json | None]
    """What a stream begins with, and the logprobs of an echoed prompt."""
    piece: Callable[[Choice, str, Json | None, str | None], list[Json]]
    scores: Callable[[Sequence[TokenLogprob], Sequence[int], TokenTexts], Json]
    """Logprobs of tokens that start at these offsets of the choice's text."""


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _completion_item(index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _ranked(scored: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    """The likeliest tokens and the chosen one, by text; one whose text another has too goes by its id."""
    found: dict[str, float] = {}
    for token, logprob in dict([*scored.top, (scored.token, scored.logprob)]).items():
        label = texts.label(token)
        found[_by_id(token) if label in found else label] = _finite(logprob)
    return found


def _completion_scores(scored: Sequence[TokenLogprob], offsets: Sequence[int], texts: TokenTexts) -> Json:
    return {
        "tokens": [texts.label(one.token) for one in scored],
        "token_logprobs": [None if math.isnan(one.logprob) else _finite(one.logprob) for one in scored],
        "top_logprobs": [None if math.isnan(one.logprob) else _ranked(one, texts) for one in scored],
        "text_offset": list(offsets),
    }


COMPLETION = Dialect(
    kind="text_completion",
    chunk_kind="text_completion",
    prefix="cmpl-",
    whole=lambda choice, scores: _completion_item(choice.index, choice.opening + "".join(choice.texts), scores, choice.finish_reason),
    first=lambda choice, scores: _completion_item(choice.index, choice.opening, scores, None) if choice.opening else None,
    piece=lambda choice, text, scores, reason: [_completion_item(choice.index, text, scores, reason)],
    scores=_completion_scores,
)


def _chat_whole(choice: Choice, scores: Json | None) -> Json:
    message: Json = {"role": "assistant", "content": "".join(choice.texts), "refusal": None}
    return {"index": choice.index, "message": message, "logprobs": scores, "finish_reason": choice.finish_reason}


def _chat_delta(choice: Choice, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _chat_piece(choice: Choice, text: str, scores: Json | None, finish_reason: str | None) -> list[Json]:
    """The text and the reason come in two items, as OpenAI sends them."""
    items = [_chat_delta(choice, {"content": text}, scores)] if text or scores else []
    return [*items, _chat_delta(choice, {}, None, finish_reason)] if finish_reason else items


def _chat_scores(scored: Sequence[TokenLogprob], offsets: Sequence[int], texts: TokenTexts) -> Json:
    def entry(token: int, logprob: float) -> Json:
        text = texts.whole(token)
        return {"token": texts.label(token), "logprob": _finite(logprob), "bytes": None if text is None else list(text.encode())}

    content = [{**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]} for one in scored]
    return {"content": content, "refusal": None}


CHAT = Dialect(
    kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    prefix="chatcmpl-",
    whole=_chat_whole,
    first=lambda choice, scores: _chat_delta(choice, {"role": "assistant", "content": ""}),
    piece=_chat_piece,
    scores=_chat_scores,
)


class Offsets:
    """Where each token of a choice starts in its text."""

    def __init__(self, tokenizer: Tokenizer, choice: Choice) -> None:
        self._decoder = StreamDecoder(tokenizer, choice.prompt)
        self._length = len(choice.opening)

    def of(self, scored: Sequence[TokenLogprob]) -> list[int]:
        starts = []
        for one in scored:
            starts.append(self._length)
            self._length += len(self._decoder.push(one.token))
        return starts


def prompt_offsets(tokenizer: Tokenizer, choice: Choice, texts: TokenTexts) -> list[int]:
    """Where each token of an echoed prompt starts in it; a special token has a place where the echo shows it."""
    decoder, starts, length = StreamDecoder(tokenizer), list[int](), 0
    for token in choice.prompt:
        starts.append(length)
        piece = decoder.push(token)
        label = texts.whole(token)
        length += len(label) if not piece and label and choice.opening.startswith(label, length) else len(piece)
    return starts


def prompt_scores(choice: Choice, count: int, texts: TokenTexts) -> list[Json | None]:
    """Log-probabilities of the prompt's tokens as vLLM tells them: by token id, the chosen one's and the ``count`` likeliest's."""
    told: list[Json | None] = []
    for one in choice.echoed(count):
        ranked = {token: (logprob, place) for place, (token, logprob) in enumerate(one.top, 1)}
        entries = {**ranked, one.token: ranked.get(one.token, (one.logprob, None))}
        known = not math.isnan(one.logprob)
        told.append(
            {
                str(token): {"logprob": _finite(logprob), "rank": rank, "decoded_token": texts.label(token)}
                for token, (logprob, rank) in entries.items()
            }
            if known
            else None
        )
    return told
