"""The part of the OpenAI schema that the server honours: requests, error bodies and the shapes of answers.

Every field of a request is honoured or refused by name, never ignored. A null is the same as leaving the field out.
Knows no HTTP library; what runs a request is ``app.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError, from_json

from quantkit.runtime.params import MAX_BIAS, MAX_LOGPROBS, MAX_PENALTY, SamplingParams
from quantkit.text.chat import PART_SEPARATOR

MAX_CHOICES = 128
"""Completions that one request may ask for: prompts times ``n``."""
MAX_STOPS = 4
TOKEN_CHARACTERS = 128
"""The longest tokens of known vocabularies, runs of spaces, have this many characters."""
MAX_NAME = 200
"""Characters of a field's name that an error repeats."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` in ``/v1/completions``; fewer when the context has less room."""
SEED_RANGE = 1 << 63
TOKEN_DIGITS = 10
MAX_STOP_TOKENS = 64
MAX_BIASED = 1024
"""Tokens that one request may bias."""
MAX_SALT = 256
"""Characters of ``cache_salt``."""


class ApiError(Exception):
    """A request that cannot be answered, as status and OpenAI's error body."""

    def __init__(
        self, status: int, message: str, *, type_: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code, self.retry_after = status, message, type_, param, code, retry_after

    @property
    def body(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str = "invalid_value", status: int = 400) -> ApiError:
    """The error of a request that its sender must change; ``param`` names the field."""
    param = param and param[:MAX_NAME]
    return ApiError(status, f"{param}: {message}" if param else message, type_="invalid_request_error", param=param, code=code)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _prompts(value: object) -> list[str | list[int]]:
    """One or more prompts, each text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in value):
            return list(value)
    raise PydanticCustomError("prompt_type", "is not a string, a list of strings, a list of token ids or a list of such lists, none empty")


def _stops(value: object) -> tuple[str, ...]:
    """None, one or at most MAX_STOPS stop strings."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(item, str) and item for item in stops):
        raise PydanticCustomError("stop_type", "is not a string or a list of strings, none empty")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", "holds {count} strings, at most {limit} are served", {"count": len(stops), "limit": MAX_STOPS})
    return tuple(stops)


def _bias(value: object) -> tuple[tuple[int, float], ...]:
    """An object of token ids, as JSON has them: in strings, each with a number from -100 to 100."""
    if not isinstance(value, dict):
        raise PydanticCustomError("bias_type", "is not an object of token ids and numbers")
    if len(value) > MAX_BIASED:
        raise PydanticCustomError("bias", "has {count} tokens, at most {limit} are served", {"count": len(value), "limit": MAX_BIASED})
    for token, amount in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < TOKEN_DIGITS):
            raise PydanticCustomError("bias", "has the key {key}, expected a token id", {"key": repr(token)[:40]})
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not -MAX_BIAS <= amount <= MAX_BIAS:
            raise PydanticCustomError("bias", "has {amount}, expected a number from -100 to 100", {"amount": repr(amount)[:40]})
    return tuple((int(token), float(amount)) for token, amount in value.items())


def _stop_tokens(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise PydanticCustomError("stop_tokens_type", "is not a list of token ids")
    if len(value) > MAX_STOP_TOKENS:
        raise PydanticCustomError(
            "stop_tokens", "holds {count} tokens, at most {limit} are served", {"count": len(value), "limit": MAX_STOP_TOKENS}
        )
    return tuple(value)


def _content(value: object) -> str:
    """A message's text; text parts are joined by PART_SEPARATOR."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("content_type", "is not a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            raise PydanticCustomError("content", "has a part of type {kind}, only text is served", {"kind": repr(kind)[:40]})
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("content", "has a text part with other fields than type and text")
        texts.append(part["text"])
    return PART_SEPARATOR.join(texts)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    """The padding that hides lengths is not made, so it cannot be asked for."""


class ResponseFormat(_Strict):
    type: Literal["text"]


class Message(_Strict):
    """One turn; which roles a model knows is its chat template's business."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str, PlainValidator(_content)]
    tool_call_id: str | None = None


class _Request(_Strict):
    """What both endpoints take. ``user`` is bookkeeping: accepted, and kept nowhere."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    seed: Annotated[int, Field(ge=-SEED_RANGE, lt=SEED_RANGE)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(_bias)] = ()
    top_k: Annotated[int, Field(ge=-1)] = 0
    """Extension: sample among the k likeliest; 0 or -1 is all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Extension: leave out what is less likely than this part of the likeliest."""
    repetition_penalty: Annotated[float, Field(gt=0, le=MAX_PENALTY)] = 1.0
    """Extension: makes what prompt and answer have already less likely, above 1."""
    stop_token_ids: Annotated[tuple[int, ...], PlainValidator(_stop_tokens)] = ()
    """Extension: tokens that end the text, and are none of it."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Extension: nothing ends the text before so many tokens."""
    ignore_eos: bool = False
    """Extension: go on to max_tokens."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Extension: log-probabilities of the prompt's tokens, as vLLM tells them; not in a stream."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None
    """Extension: share computed beginnings with requests of the same salt alone, so that no other client can tell them by the time."""

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """``/v1/completions``."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0 makes nothing: it asks for the prompt's log-probabilities."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False
    best_of: int | None = None
    """Taken when it equals ``n``: then the best of them are all of them."""


class ChatRequest(_Request):
    """``/v1/chat/completions``. Bookkeeping, as ``user``: ``metadata``, ``service_tier``, ``safety_identifier``, ``prompt_cache_key``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] = False
    """Nothing is stored, so only false can be honoured."""
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


R = TypeVar("R", CompletionRequest, ChatRequest)

# Fields of OpenAI's schema that are not served, each with the values that ask for nothing and are therefore taken.
UNSERVED: Mapping[type[BaseModel], Mapping[str, tuple[object, ...]]] = {
    CompletionRequest: {"suffix": ("",)},
    ChatRequest: {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": ("none",),
        "tool_choice": ("none",),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    },
    Message: {"annotations": ([],), "audio": (), "function_call": (), "name": (), "refusal": (), "tool_calls": ([],)},
}


def _served(fields: Mapping[str, object], owner: type[BaseModel], where: str = "") -> dict[str, object]:
    """``fields`` without nulls and without what asks for nothing. Raises ApiError naming a field that asks for what is not served."""
    unserved = UNSERVED[owner]
    kept: dict[str, object] = {}
    for name, value in fields.items():
        if name in unserved:
            if value is not None and value not in unserved[name]:
                raise invalid(where + name, "is not served", "unsupported_parameter")
        elif value is not None or name not in owner.model_fields:
            kept[name] = value
    return kept


def _path(location: Sequence[str | int]) -> str:
    """``messages[0].content`` for ("messages", 0, "content")."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _refusal(error: ValidationError) -> ApiError:
    """The first defect that pydantic found."""
    first = error.errors(include_url=False)[0]
    kind, param = first["type"], _path(first["loc"])
    if kind == "missing":
        return invalid(param, "is missing", "missing_required_parameter")
    if kind == "extra_forbidden":
        return invalid(param, "is not a field that is served here", "unknown_parameter")
    message = first["msg"][:1].lower() + first["msg"][1:]
    return invalid(param, message, "invalid_type" if kind.endswith("_type") else "invalid_value")


def _parse(body: bytes, owner: type[R]) -> R:
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as exc:
        raise invalid(None, f"the body is not JSON ({exc})", "invalid_json") from exc
    if not isinstance(data, dict):
        raise invalid(None, f"the body is {type(data).__name__}, expected a JSON object", "invalid_json")
    fields = _served(data, owner)
    messages = fields.get("messages")
    if owner is ChatRequest and isinstance(messages, list):
        fields["messages"] = [_served(m, Message, f"messages[{i}].") if isinstance(m, dict) else m for i, m in enumerate(messages)]
    try:
        request = owner.model_validate(fields)
    except ValidationError as exc:
        raise _refusal(exc) from exc
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "goes with stream: true")
    if request.prompt_logprobs is not None and request.stream:
        raise invalid("prompt_logprobs", "goes with stream: false", "unsupported_parameter")
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """The request that ``body`` holds. Raises ApiError (400) naming the field that is wrong or not served."""
    request = _parse(body, CompletionRequest)
    if request.best_of not in (None, request.n):
        raise invalid("best_of", f"is {request.best_of}, only n ({request.n}) is served", "unsupported_parameter")
    if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
        raise invalid("max_tokens", "is 0, which goes with echo: true or prompt_logprobs")
    if len(request.prompt) * request.n > MAX_CHOICES:
        raise invalid("prompt", f"{len(request.prompt)} prompts times n={request.n} is more than {MAX_CHOICES}")
    return request


def parse_chat(body: bytes) -> ChatRequest:
    """The request that ``body`` holds. Raises ApiError (400) naming the field that is wrong or not served."""
    request = _parse(body, ChatRequest)
    if None not in (request.max_tokens, request.max_completion_tokens) and request.max_tokens != request.max_completion_tokens:
        raise invalid("max_tokens", f"is {request.max_tokens} where max_completion_tokens is {request.max_completion_tokens}")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "goes with logprobs: true")
    for index, message in enumerate(request.messages):
        if message.tool_call_id is not None and message.role != "tool":
            raise invalid(f"messages[{index}].tool_call_id", "goes with role tool")
    return request


def chat_turns(request: ChatRequest) -> list[dict[str, str]]:
    """The messages as a chat template takes them."""
    return [message.model_dump(exclude_none=True) for message in request.messages]


def check_length(text: str, context: int, param: str) -> None:
    """Raise ApiError (400) for a text that is too long for ``context`` whatever its tokens are: counting those takes a minute of CPU."""
    most = TOKEN_CHARACTERS * context
    if len(text) > most:
        what = f"the prompt has {len(text)} characters, and the model's context of {context} tokens cannot hold more than {most}"
        raise invalid(param, what, "context_length_exceeded")


def token_limit(request: CompletionRequest | ChatRequest, prompt: int, context: int) -> int:
    """How many tokens may follow a prompt of ``prompt`` tokens in a context of ``context``; 0 when none are asked for.

    Raises ApiError (400) when the prompt fills it, or leaves less room than the request asks for.
    """
    chat = isinstance(request, ChatRequest)
    room = context - prompt
    if room < 1:
        what = f"the prompt has {prompt} tokens, and the model's context of {context} must hold at least one more"
        raise invalid("messages" if chat else "prompt", what, "context_length_exceeded")
    name = "max_completion_tokens" if isinstance(request, ChatRequest) and request.max_completion_tokens is not None else "max_tokens"
    asked: int | None = getattr(request, name)
    if asked is None:
        limit = room if chat else min(DEFAULT_COMPLETION_TOKENS, room)
        if request.min_tokens > limit:
            raise invalid("min_tokens", f"is {request.min_tokens}, and at most {limit} tokens are made", "invalid_value")
        return limit
    if asked > room:
        what = f"is {asked}, and {prompt} tokens of prompt leave {room} of the model's context of {context}"
        raise invalid(name, what, "context_length_exceeded")
    if request.min_tokens > asked:
        raise invalid("min_tokens", f"is {request.min_tokens}, more than {name}, {asked}")
    return asked


def check_tokens(request: CompletionRequest | ChatRequest, vocabulary: int) -> None:
    """Raise ApiError (400) for a token that a vocabulary of so many does not have, in a field that names tokens."""
    for name, tokens in (("stop_token_ids", request.stop_token_ids), ("logit_bias", [token for token, _ in request.logit_bias])):
        if any(token >= vocabulary for token in tokens):
            raise invalid(name, f"has a token that the model does not have, expected 0 to {vocabulary - 1}")


def echo_logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    """How many of the likeliest tokens are told beside each of an echoed prompt's; None when those are not scored."""
    return request.logprobs if isinstance(request, CompletionRequest) and request.echo else None


def sampling(request: CompletionRequest | ChatRequest, max_tokens: int, choice: int) -> SamplingParams:
    """How choice ``choice`` (0-based) of a prompt is sampled: a seed counts up with it, so that ``n`` choices differ and repeat.

    ``max_tokens`` 0: one token, which is not told: a prompt's log-probabilities come with the first.
    """
    logprobs = request.logprobs if isinstance(request, CompletionRequest) else (request.top_logprobs or 0) if request.logprobs else None
    of_prompt = [count for count in (request.prompt_logprobs, echo_logprobs(request)) if count is not None]
    return SamplingParams(
        max_tokens=max(max_tokens, 1),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=None if request.seed is None else (request.seed + choice) % SEED_RANGE,
        stop=request.stop,
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        stop_ids=request.stop_token_ids,
        min_tokens=request.min_tokens,
        prompt_logprobs=max(of_prompt, default=None),
    )
