"""The HTTP face of an engine: OpenAI's endpoints, health, metrics and version.

One engine, one model, one event loop; deltas come from the engine's thread through ``call_soon_threadsafe``. What a client
may ask for is ``protocol.py``'s business; how processes start and end is the serve command's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette.sse import EventSourceResponse
from starlette.background import BackgroundTask

from quantkit import __version__
from quantkit.errors import QuantkitError
from quantkit.runtime.engine import Delta, Front
from quantkit.runtime.sampler import SamplingParams, TokenLogprob
from quantkit.server import metrics
from quantkit.server.dialect import CHAT, COMPLETION, Choice, Dialect, Json, Offsets, TokenTexts, prompt_offsets, prompt_scores
from quantkit.server.edge import CLIENT_GONE, add_error_handlers, api_error, key_check, read_body, until_gone
from quantkit.server.protocol import (
    ChatRequest,
    CompletionRequest,
    chat_turns,
    check_length,
    check_tokens,
    echo_logprobs,
    invalid,
    parse_chat,
    parse_completion,
    sampling,
    token_limit,
)
from quantkit.text.chat import render_chat
from quantkit.text.tokenizer import Tokenizer

T = TypeVar("T")

STREAM_GRACE = 7.0
"""Seconds that a stream may go on once the process is asked to end; the serve command closes the engine before."""


@dataclass(slots=True)
class Served:
    """What the server has answered since it started."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the text that an echo of them begins with, and how many tokens may follow."""

    ids: list[int]
    echo: str
    limit: int


@dataclass(frozen=True, slots=True)
class Job:
    """One engine request. ``silent``: nothing that is made is told, as of ``max_tokens`` 0."""

    prompt: Sequence[int]
    params: SamplingParams
    silent: bool = False


class Generation:
    """The engine requests behind one HTTP request, and what comes out of them, in the order in which it comes."""

    def __init__(self, engine: Front, jobs: Sequence[Job], cache_salt: str) -> None:
        """Submit all of ``jobs`` or, when one is refused, none. Raises as ``Engine.submit``. Runs in the event loop."""
        self._engine = engine
        self._silent = frozenset(index for index, job in enumerate(jobs) if job.silent)
        self._events: asyncio.Queue[tuple[int, Delta | QuantkitError]] = asyncio.Queue()
        self._running: dict[int, int] = {}
        loop = asyncio.get_running_loop()
        try:
            for index, job in enumerate(jobs):
                self._running[index] = engine.submit(job.prompt, job.params, self._deliver(loop, index), cache_salt=cache_salt)
        except QuantkitError:
            self.cancel()
            raise

    def _deliver(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Delta | QuantkitError], None]:
        def deliver(event: Delta | QuantkitError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to tell
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return deliver

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(job, delta) until all jobs are done. Raises the error of the first job that fails."""
        while self._running:
            index, event = await self._events.get()
            if isinstance(event, QuantkitError):
                del self._running[index]
                raise event
            if event.finish_reason is not None:
                del self._running[index]
            yield index, Delta("", (), (), "length", event.prompt_logprobs) if index in self._silent else event

    def cancel(self) -> None:
        """Free what still runs; a second call does nothing."""
        for request in self._running.values():
            self._engine.cancel(request)
        self._running.clear()


@dataclass(frozen=True, slots=True)
class Answer:
    """One accepted request: its choices, what they run as, and how they are told."""

    dialect: Dialect
    model: str
    choices: tuple[Choice, ...]
    generation: Generation
    prompt_tokens: int
    scored: bool
    echo_scores: int | None
    """How many of the likeliest tokens go with each of an echoed prompt's; None when those have no scores."""
    prompt_scores: int | None
    """The same, for the prompt's scores beside the text."""
    tokenizer: Tokenizer
    served: Served
    id: str
    created: int

    def _envelope(self, kind: str, choices: Sequence[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": list(choices)}

    def _usage(self) -> Json:
        completion = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion, "total_tokens": self.prompt_tokens + completion}

    def _take(self, index: int, delta: Delta) -> Choice:
        choice = self.choices[index]
        choice.add(delta)
        self.served.completion_tokens += len(delta.tokens)
        return choice

    def _scores(self, choice: Choice, scored: Sequence[TokenLogprob], offsets: Offsets, texts: TokenTexts) -> Json | None:
        return self.dialect.scores(scored, offsets.of(scored), texts) if self.scored else None

    def _echoed(self, choice: Choice, texts: TokenTexts) -> Json | None:
        """The scores of the prompt that ``choice`` echoes."""
        if self.echo_scores is None:
            return None
        return self.dialect.scores(choice.echoed(self.echo_scores), prompt_offsets(self.tokenizer, choice, texts), texts)

    async def whole(self) -> Json:
        """The answer in one piece. Raises the engine's error."""
        async for index, delta in self.generation.deltas():
            self._take(index, delta)
        texts = TokenTexts(self.tokenizer)
        items = []
        beside: Json = {}
        for choice in self.choices:
            scores, echoed = self._scores(choice, choice.logprobs, Offsets(self.tokenizer, choice), texts), self._echoed(choice, texts)
            if scores is not None and echoed is not None:
                scores = {name: [*before, *scores[name]] for name, before in echoed.items()}  # type: ignore[misc]
            items.append(self.dialect.whole(choice, scores))
            if self.prompt_scores is not None:
                of_prompt: Json = {"prompt_logprobs": prompt_scores(choice, self.prompt_scores, texts)}
                if self.dialect is COMPLETION:
                    items[-1] |= of_prompt
                else:
                    beside = of_prompt  # of all choices alike
        return {**self._envelope(self.dialect.kind, items), **beside, "usage": self._usage()}

    async def stream(self, include_usage: bool) -> AsyncIterator[str]:
        """The data of server-sent events; an engine error is the last one, in place of ``[DONE]``."""
        texts = TokenTexts(self.tokenizer)
        offsets = [Offsets(self.tokenizer, choice) for choice in self.choices]

        def chunk(items: Sequence[Json], usage: Json | None = None) -> str:
            body = self._envelope(self.dialect.chunk_kind, items)
            return json.dumps({**body, "usage": usage} if include_usage else body, ensure_ascii=False)

        try:
            late = self.echo_scores is not None  # the scores of an echo come with the first token
            firsts = [] if late else [self.dialect.first(choice, None) for choice in self.choices]
            for first in firsts:
                if first is not None:
                    yield chunk([first])
            async for index, delta in self.generation.deltas():
                choice = self._take(index, delta)
                if late and choice.tokens == len(delta.tokens):
                    first = self.dialect.first(choice, self._echoed(choice, texts))
                    if first is not None:
                        yield chunk([first])
                if not (delta.text or delta.finish_reason or (self.scored and delta.logprobs)):
                    continue
                scores = self._scores(choice, delta.logprobs, offsets[index], texts) if delta.logprobs else None
                for item in self.dialect.piece(choice, delta.text, scores, delta.finish_reason):
                    yield chunk([item])
            if include_usage:
                yield chunk([], self._usage())
            yield "[DONE]"
        except QuantkitError as exc:
            yield json.dumps(api_error(exc).body, ensure_ascii=False)
        finally:
            self.generation.cancel()


class _Endpoints:
    """What the OpenAI endpoints share."""

    def __init__(self, engine: Front, name: str, served: Served, texts: ThreadPoolExecutor) -> None:
        self._engine, self._name, self._served, self._texts = engine, name, served, texts
        self._started = int(time.time())

    def model(self) -> Json:
        return {"id": self._name, "object": "model", "created": self._started, "owned_by": "quantkit"}

    def check_model(self, name: str) -> None:
        if name != self._name:
            raise invalid("model", f"{name[:200]!r} is not served here, expected {self._name!r}", "model_not_found", 404)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        """Reading and tokenizing megabytes takes seconds, in which other clients' streams go on: one thread does it for all in turn."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, work)

    async def completions(self, request: Request) -> Response:
        body = await read_body(request)
        asked, prompts = await self._off_loop(lambda: self._read_completion(body))
        return await self._answer(request, asked, COMPLETION, prompts, asked.logprobs is not None)

    def _read_completion(self, body: bytes) -> tuple[CompletionRequest, list[Prompt]]:
        asked = parse_completion(body)
        self.check_model(asked.model)
        tokenizer, vocabulary = self._engine.tokenizer, self._engine.spec.dims["vocab"].elements
        prompts = []
        for prompt in asked.prompt:
            if isinstance(prompt, str):
                prompts.append(self._prompt(asked, prompt, prompt if asked.echo else ""))
                continue
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                raise invalid("prompt", f"has a token that the model does not have, expected 0 to {vocabulary - 1}")
            limit = token_limit(asked, len(prompt), self._engine.max_model_len)
            prompts.append(Prompt(prompt, tokenizer.decode(prompt, special=True) if asked.echo else "", limit))
        return asked, prompts

    def _prompt(self, asked: CompletionRequest | ChatRequest, text: str, echo: str = "") -> Prompt:
        """``text`` as tokens. Raises ApiError when they are none or too many, before another text of the request is read."""
        chat, context = isinstance(asked, ChatRequest), self._engine.max_model_len
        param = "messages" if chat else "prompt"
        check_length(text, context, param)
        ids = self._engine.tokenizer.encode(text, special=not chat)
        if not ids:
            raise invalid(param, "holds no token")
        return Prompt(ids, echo, token_limit(asked, len(ids), context))

    async def chat(self, request: Request) -> Response:
        body = await read_body(request)
        asked, prompt = await self._off_loop(lambda: self._read_chat(body))
        return await self._answer(request, asked, CHAT, [prompt], asked.logprobs)

    def _read_chat(self, body: bytes) -> tuple[ChatRequest, Prompt]:
        """The template alone decides on BOS, as it did when the model was trained: none is added to what it wrote."""
        asked = parse_chat(body)
        self.check_model(asked.model)
        return asked, self._prompt(asked, render_chat(self._engine.tokenizer, chat_turns(asked)))

    async def _answer(
        self,
        request: Request,
        asked: CompletionRequest | ChatRequest,
        dialect: Dialect,
        prompts: Sequence[Prompt],
        scored: bool,
    ) -> Response:
        """Run ``asked`` for ``prompts`` and send what comes, whole or as a stream; stop when the client leaves."""
        check_tokens(asked, self._engine.spec.dims["vocab"].elements)
        jobs: list[Job] = []
        choices: list[Choice] = []
        for prompt in prompts:
            for number in range(asked.n):
                choices.append(Choice(len(choices), prompt.ids, prompt.echo))
                jobs.append(Job(prompt.ids, sampling(asked, prompt.limit, number), silent=prompt.limit == 0))
        if len(jobs) > self._engine.capacity:  # waiting would not help
            what = f"asks for {len(jobs)} completions, this server takes at most {self._engine.capacity} at once"
            raise invalid("n" if asked.n > 1 else "prompt", what)
        prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        answer = Answer(
            dialect=dialect,
            model=self._name,
            choices=tuple(choices),
            generation=Generation(self._engine, jobs, asked.cache_salt or ""),
            prompt_tokens=prompt_tokens,
            scored=scored,
            echo_scores=echo_logprobs(asked),
            prompt_scores=asked.prompt_logprobs,
            tokenizer=self._engine.tokenizer,
            served=self._served,
            id=dialect.prefix + uuid.uuid4().hex,
            created=int(time.time()),
        )
        self._served.requests += 1
        self._served.prompt_tokens += prompt_tokens
        if asked.stream:

            async def free() -> None:
                """For a client that left before the first event: then the stream has never begun, and ends nothing itself."""
                answer.generation.cancel()

            events = answer.stream(asked.include_usage)
            return EventSourceResponse(events, sep="\n", background=BackgroundTask(free), shutdown_grace_period=STREAM_GRACE)
        try:
            body = await until_gone(request, asyncio.create_task(answer.whole()))
        finally:
            answer.generation.cancel()
        return Response(status_code=CLIENT_GONE) if body is None else JSONResponse(body)


def _health(engine: Front) -> JSONResponse:
    if engine.failure is not None:
        return JSONResponse({"status": "failed", "reason": engine.failure.line}, 503)
    stats = engine.stats()
    figures = {"running": stats.running, "waiting": stats.waiting}
    tokens = {"kv_tokens_used": stats.kv_tokens_used, "kv_tokens_total": stats.kv_tokens_total}
    return JSONResponse({"status": "ok", **figures, **tokens})


def create_app(engine: Front, *, served_model_name: str, api_key: str | None) -> FastAPI:
    """The application that serves ``engine`` under ``served_model_name``; with ``api_key``, ``/v1`` wants it as a bearer token.

    ``app.state.served`` counts what was answered (``Served``). Closing the engine is the caller's.
    """
    texts = ThreadPoolExecutor(max_workers=1, thread_name_prefix="quantkit-text")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Mapping[str, object]]:
        yield {}
        texts.shutdown(wait=False, cancel_futures=True)

    # No schema pages: bodies are parsed by protocol.py, so FastAPI has nothing true to say about them.
    app = FastAPI(title="quantkit", version=__version__, lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.served = Served()
    endpoints = _Endpoints(engine, served_model_name, app.state.served, texts)
    add_error_handlers(app)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(key_check(api_key))])

    @v1.get("/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [endpoints.model()]})

    @v1.get("/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        endpoints.check_model(name)
        return JSONResponse(endpoints.model())

    v1.add_api_route("/completions", endpoints.completions, methods=["POST"], response_model=None)
    v1.add_api_route("/chat/completions", endpoints.chat, methods=["POST"], response_model=None)
    app.include_router(v1)

    @app.get("/health")
    async def health() -> JSONResponse:
        return _health(engine)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.exposition(engine.stats()), media_type=metrics.CONTENT_TYPE)

    @app.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse({"version": __version__})

    return app
