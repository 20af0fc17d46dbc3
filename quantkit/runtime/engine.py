"""Requests in, text out: one thread that schedules, has steps run, and turns sampled tokens into deltas.

The engine knows requests, tokens and text; where and how a step is computed is the executor's affair.
"""

from __future__ import annotations

import atexit
import itertools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from quantkit.arch.spec import ModelSpec
from quantkit.errors import InputError, QuantkitError, RuntimeDied
from quantkit.model.rope import length_class
from quantkit.plan import PASS_TOKENS
from quantkit.runtime.blocks import BLOCK
from quantkit.runtime.executor import Executor
from quantkit.runtime.sampler import INVALID, Sampled, SamplingParams, TokenLogprob
from quantkit.runtime.scheduler import Limits, Schedule, Scheduler
from quantkit.runtime.stops import StopText
from quantkit.runtime.wire import Begin, Step
from quantkit.text.tokenizer import StreamDecoder, Tokenizer

__all__ = ["Delta", "Engine", "EngineStats", "QueueFull", "SamplingParams", "TokenLogprob"]

IDLE_SECONDS = 1.0
CLOSE_SECONDS = 10.0


class QueueFull(QuantkitError):
    """So many requests wait that another is not taken; trying again later is right. Exit 3."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Delta:
    """What a request got from one step.

    ``tokens`` are all that were sampled, an end token included; ``text`` may lag behind them (a character or a stop string
    that is not whole yet) and never holds an end token or a stop string. ``logprobs``, if asked for, go with ``tokens``.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    """"stop", "length", or None while there is more to come."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With the first token, if asked for: those of the prompt's tokens from the second on."""


OnDelta = Callable[[Delta | QuantkitError], None]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Requests and tokens now and since the start; bytes per rank."""

    running: int
    waiting: int
    kv_tokens_used: int
    """Of the blocks that running requests hold, a shared one once."""
    kv_tokens_kept: int
    """Of the free blocks that may serve another request of the same beginning."""
    kv_tokens_total: int
    weight_bytes: tuple[int, ...]
    kv_bytes_per_token: tuple[int, ...]
    prompt_tokens: int
    generated_tokens: int
    steps: int
    prefix_tokens_looked_up: int
    prefix_tokens_found: int
    """Prompt tokens that were not computed, because another text began with them."""
    preemptions: int
    """How often a running request had to give its memory back and was computed again."""


class Front(Protocol):
    """What takes requests: an Engine, or several as one."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def dtype(self) -> str: ...

    @property
    def tp(self) -> int:
        """Ranks of a replica."""

    @property
    def dp(self) -> int:
        """Replicas."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    @property
    def failure(self) -> QuantkitError | None: ...

    def submit(self, prompt: Sequence[int], params: SamplingParams, on_delta: OnDelta, *, cache_salt: str = "") -> int: ...

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None: ...

    def cancel(self, request: int) -> None: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Request:
    prompt_tokens: int
    params: SamplingParams
    seed: int
    on_delta: OnDelta
    ends: frozenset[int]
    most: int
    """Tokens to generate at most."""
    stream: StreamDecoder
    stop: StopText
    prompt: tuple[int, ...]
    """The prompt's tokens, where sampling needs them."""
    generated: int = 0


@dataclass(slots=True)
class _Counts:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """``max_model_len``: tokens of prompt and answer; ``max_num_seqs`` run at once, ``max_queue`` more may wait.

    ``kv_blocks``: what the caches hold, at least one whole text. ``step_tokens``: tokens of one pass; longer prompts are computed
    in pieces, between which the others go on. ``prefix_caching``: what texts begin with alike is computed once.
    """

    max_model_len: int
    max_num_seqs: int
    max_queue: int
    kv_blocks: int
    step_tokens: int = PASS_TOKENS["cpu"]
    prefix_caching: bool = True


class Engine:
    """Takes requests from any thread and runs them together on ``executor``, which it ends. Made by ``start_engine``."""

    def __init__(self, executor: Executor, tokenizer: Tokenizer, spec: ModelSpec, limits: EngineLimits, *, dtype: str) -> None:
        self.tokenizer, self.spec, self.dtype = tokenizer, spec, dtype
        self.max_model_len, self.tp, self.dp = limits.max_model_len, len(executor.facts), 1
        self.max_num_seqs = limits.max_num_seqs
        self._executor, self._limits = executor, limits
        step_tokens = max(limits.step_tokens, limits.max_num_seqs)
        self._scheduler = Scheduler(Limits(limits.max_num_seqs, step_tokens, limits.kv_blocks, limits.prefix_caching))
        executor.open_cache(limits.kv_blocks)
        self._ahead = int(executor.ahead)
        self._under_way: deque[Schedule] = deque()
        self._eos = frozenset((*tokenizer.eos_ids, *spec.eos_ids))
        self._requests: dict[int, _Request] = {}
        self._numbers = itertools.count(1)
        self._counts = _Counts()
        self._changed = threading.Condition()  # over an RLock: a callback may submit and cancel
        self._closing = False
        self._failure: QuantkitError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    # from any thread

    def submit(self, prompt: Sequence[int], params: SamplingParams, on_delta: OnDelta, *, cache_salt: str = "") -> int:
        """Queue a request and return its number, for ``cancel``.

        It shares what was computed before with requests of the same ``cache_salt`` alone, so that no other can tell by its speed.
        ``on_delta`` is called from the engine's thread and must neither block nor raise; its last call has a finish reason
        or is the error. Raises InputError for a prompt that is empty, too long or no tokens of the model, QueueFull, and the
        failure of an engine that died.
        """
        self.check(prompt, params)
        most = min(params.max_tokens, self.max_model_len - len(prompt))
        seed = secrets.randbits(63) if params.seed is None else params.seed
        ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self._eos)
        read = tuple(prompt) if params.reads_prompt else ()
        stream, stop = StreamDecoder(self.tokenizer, prompt), StopText(params.stop)
        request = _Request(len(prompt), params, seed, on_delta, ends, most, stream, stop, read)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._closing:
                raise RuntimeDied("engine", "is closed", "an open engine")
            if len(self._requests) >= self.capacity:
                raise QueueFull(
                    "engine", f"{self._scheduler.waiting} requests wait", f"at most {self._limits.max_queue}", "try again later"
                )
            number = next(self._numbers)
            room = len(prompt) + most - 1  # the last token's keys are never needed
            salt = f"{length_class(self.spec.ropes, self.spec.max_positions, len(prompt))}/{cache_salt}"
            self._scheduler.add(number, prompt, room, salt, reuse=params.prompt_logprobs is None)
            self._requests[number] = request
            self._changed.notify()
        return number

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise InputError for a prompt that is empty, too long or no tokens of the model, and for parameters that name such tokens."""
        vocab = self.spec.dims["vocab"].elements
        if not prompt:
            raise InputError("prompt", "is empty", "at least one token")
        if len(prompt) >= self.max_model_len:
            raise InputError("prompt", f"has {len(prompt)} tokens", f"fewer than {self.max_model_len}, the longest text of this engine")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise InputError("prompt", "has a token that the model does not have", f"0 to {vocab - 1}")
        for name, tokens in (("stop_ids", params.stop_ids), ("logit_bias", [token for token, _ in params.logit_bias])):
            if any(token >= vocab for token in tokens):
                raise InputError(name, "has a token that the model does not have", f"0 to {vocab - 1}")

    def cancel(self, request: int) -> None:
        """Forget a request: nothing more is computed for it, nor said. One that is done or unknown is ignored."""
        with self._changed:
            if self._requests.pop(request, None) is not None:
                self._scheduler.remove(request)
                self._changed.notify()  # its keys and values are freed now, not with the next request

    @property
    def capacity(self) -> int:
        """Requests that are taken at once: those that run and those that wait."""
        return self._limits.max_num_seqs + self._limits.max_queue

    @property
    def load(self) -> int:
        """Requests that it has now, running and waiting."""
        return len(self._requests)

    @property
    def failure(self) -> QuantkitError | None:
        """Why the engine died; None while it lives."""
        return self._failure

    def stats(self) -> EngineStats:
        facts, scheduler = self._executor.facts, self._scheduler
        with self._changed:
            return EngineStats(
                running=scheduler.running,
                waiting=scheduler.waiting,
                kv_tokens_used=BLOCK * scheduler.blocks_held,
                kv_tokens_kept=BLOCK * scheduler.blocks_kept,
                kv_tokens_total=BLOCK * scheduler.limits.blocks,
                weight_bytes=tuple(rank.weight_bytes for rank in facts),
                kv_bytes_per_token=tuple(rank.kv_bytes_per_token for rank in facts),
                prompt_tokens=self._counts.prompt_tokens,
                generated_tokens=self._counts.generated_tokens,
                steps=self._counts.steps,
                prefix_tokens_looked_up=scheduler.counts.looked_up,
                prefix_tokens_found=scheduler.counts.found,
                preemptions=scheduler.counts.preemptions,
            )

    def close(self) -> None:
        """End the thread and the ranks. Requests that still run get an error. A second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)
        self._executor.close()
        atexit.unregister(self.close)

    # on the engine's thread

    def _run(self) -> None:
        error: QuantkitError = RuntimeDied("engine", "was closed before this request was done", "an open engine")
        try:
            while self._turn():
                pass
        except QuantkitError as exc:
            died = RuntimeDied(exc.where, exc.what, exc.expected, exc.hint)  # anew: the traceback of the other holds the model
            if not self._closing:  # else it is we who ended the ranks
                error = self._failure = died
        except BaseException as exc:
            error = self._failure = RuntimeDied("engine", f"failed with {type(exc).__name__}: {exc}", "no such bug")
            raise
        finally:
            with self._changed:
                left, self._requests = self._requests, {}
                for number, request in left.items():
                    self._scheduler.remove(number)
                    request.on_delta(error)
            if self._failure is not None:
                self._executor.close()

    def _turn(self) -> bool:
        """Launch the next step and take the tokens of the last, or wait for something to do; False when the engine is to end.

        With ``ahead`` the last step is still running when the next is launched: who gets a token from it runs on in the next, and where
        that was its end, what the next makes of it is dropped.
        """
        woken = False
        with self._changed:
            if self._closing:
                return False
            schedule = self._scheduler.schedule()
            if schedule:
                step = self._step(schedule)
                self._scheduler.expect(schedule)
            elif not self._under_way:
                woken = self._changed.wait(IDLE_SECONDS)
        if schedule:
            self._executor.launch(step)
            self._under_way.append(schedule)
        if len(self._under_way) > (self._ahead if schedule else 0):
            sampled = self._executor.collect()
            with self._changed:
                self._take(self._under_way.popleft(), sampled)
        elif not schedule and not woken:
            self._executor.check()
        return True

    def _step(self, schedule: Schedule) -> Step:
        begin = []
        for number in schedule.admitted:
            request = self._requests[number]
            self._counts.prompt_tokens += request.prompt_tokens
            ends = tuple(sorted(request.ends)) if request.params.min_tokens else ()
            begin.append(Begin(number, request.params, request.seed, ends, request.prompt, request.prompt_tokens))
        return Step(schedule.freed, schedule.preempted, tuple(begin), schedule.chunks)

    def _take(self, schedule: Schedule, sampled: list[Sampled]) -> None:
        """Give each sampled token to its request, unless that was cancelled while the step ran."""
        self._counts.steps += bool(schedule.chunks)
        wanted = [chunk.sequence for chunk in schedule.chunks if chunk.sample]
        for number, got in zip(wanted, sampled, strict=True):
            request = self._requests.get(number)
            if request is None or self._closing:
                continue
            if got.token == INVALID:
                self._end(number)
                hint = "--dtype float32 or bfloat16" if self.dtype == "float16" else "quantkit verify"
                request.on_delta(RuntimeDied("model", "gave logits that are not numbers", "finite logits", hint))
                continue
            self._counts.generated_tokens += 1
            delta = _advance(request, got)
            if delta.finish_reason is None:
                self._scheduler.append(number, got.token)
            else:
                self._end(number)
            request.on_delta(delta)

    def _end(self, number: int) -> None:
        del self._requests[number]
        self._scheduler.remove(number)


def _advance(request: _Request, got: Sampled) -> Delta:
    """What ``got`` adds to its request's text, and whether it was the last token."""
    request.generated += 1
    heed = request.generated > request.params.min_tokens  # a stop string that min_tokens holds off is text

    def delta(text: str, reason: str | None) -> Delta:
        return Delta(text, (got.token,), () if got.logprob is None else (got.logprob,), reason, got.prompt)

    if got.token in request.ends:
        text, _ = request.stop.push(request.stream.finish(), heed=heed)
        return delta(text + request.stop.finish(), "stop")
    text, stopped = request.stop.push(request.stream.push(got.token), heed=heed)
    if stopped or request.generated < request.most:
        return delta(text, "stop" if stopped else None)
    rest, stopped = request.stop.push(request.stream.finish(), heed=heed)
    return delta(text + rest, "stop") if stopped else delta(text + rest + request.stop.finish(), "length")
