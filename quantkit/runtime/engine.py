"""Requests in, text out: one thread that schedules, has steps run, and turns sampled tokens into deltas.

The engine knows requests, tokens and text; where and how a step is computed is the executor's affair.
"""

from __future__ import annotations

import atexit
import itertools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantkit.arch.spec import ModelSpec
from quantkit.arch.table import spec_for
from quantkit.checkpoint.blocks import as_blocks
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_manifest, resolve_path
from quantkit.errors import InputError, MachineError, QuantkitError, RuntimeDied
from quantkit.model.attention import BACKENDS
from quantkit.ops.dtypes import float_dtype
from quantkit.plan import KV_DTYPES, LM_HEADS, PASS_SEQUENCES, PASS_TOKENS, make_plan
from quantkit.progress import Progress, silent
from quantkit.quant_config import stored_assignment
from quantkit.runtime.blocks import BLOCK, blocks_for
from quantkit.runtime.devices import default_dtype, place_for
from quantkit.runtime.executor import Executor, Hosts, LocalExecutor, start_executors
from quantkit.runtime.processes import ThisHost
from quantkit.runtime.ray_hosts import RayHosts
from quantkit.runtime.sampler import INVALID, Sampled, SamplingParams, TokenLogprob
from quantkit.runtime.scheduler import Limits, Schedule, Scheduler
from quantkit.runtime.stops import StopText
from quantkit.runtime.wire import Begin, RankJob, Step
from quantkit.shard import open_rank
from quantkit.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

__all__ = ["Delta", "Engine", "EngineStats", "QueueFull", "SamplingParams", "TokenLogprob", "start_engine"]

MEMORY_SHARE = 0.9
EXECUTORS = ("local", "ray")
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
            self._scheduler.add(number, prompt, room, cache_salt, reuse=params.prompt_logprobs is None)
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
            error = self._failure = exc if isinstance(exc, RuntimeDied) else RuntimeDied(exc.where, exc.what, exc.expected, exc.hint)
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
            begin.append(Begin(number, request.params, request.seed, ends, request.prompt))
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


def start_engine(
    path: str,
    *,
    tp: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    seqs_by_device: Mapping[str, int] = PASS_SEQUENCES,
    max_num_batched_tokens: int | None = None,
    memory_share: float = MEMORY_SHARE,
    kv_cache_dtype: str = "auto",
    lm_head: str = "auto",
    attention_backend: str = "auto",
    prefix_caching: bool = True,
    max_queue: int = 64,
    timeout: float = 60.0,
    parity: bool = False,
    dp: int = 1,
    executor: str = "local",
    progress: Progress = silent,
) -> Front:
    """Load the model PATH and start serving it: one rank in this process, more as processes of their own or as actors of Ray's.

    ``dp`` replicas, each of ``tp`` ranks and with the limits below, stand behind one front. ``executor`` "local" runs all on this host,
    "ray" on the hosts of the cluster RAY_ADDRESS, or of one that it starts here.

    A shard directory brings its own ``tp``; anything else is cut for ``tp`` ranks (1 when None) as it is read. ``device``
    "auto" is CUDA where there is any. ``dtype`` None is bfloat16, whatever the checkpoint stores (float16 on a GPU without
    it, float32 with ``parity``). ``max_model_len`` None is what the model was trained for, or less where the memory is less.
    ``memory_share`` of a GPU's memory (on a CPU of what is free) is for weights, passes, and keys and values; those are stored in
    ``kv_cache_dtype``: "auto" as computed, "fp8" in half the memory of 16 bits. ``lm_head`` "q8_0" encodes a head in floats to 8 bits.
    ``attention_backend``: one of ``attention.BACKENDS``.
    ``max_num_seqs`` None is what ``seqs_by_device`` says; ``max_num_batched_tokens``, of one pass, is 4096 then on a GPU and 1024 on a CPU.
    ``timeout`` in seconds ends a rank that others wait for. Raises InputError and MachineError for what cannot be.
    """
    if (max_num_seqs is not None and max_num_seqs < 1) or max_queue < 0 or timeout <= 0:
        raise InputError("engine", f"max_num_seqs {max_num_seqs}, max_queue {max_queue}, timeout {timeout}", "at least 1, 0 and above 0")
    if not 0 < memory_share <= 1:
        raise InputError("--gpu-memory-utilization", f"is {memory_share}", "more than 0, up to 1")
    if kv_cache_dtype not in KV_DTYPES:
        raise InputError("--kv-cache-dtype", f"is {kv_cache_dtype!r}", f"one of {', '.join(KV_DTYPES)}")
    if lm_head not in LM_HEADS:
        raise InputError("--lm-head", f"is {lm_head!r}", f"one of {', '.join(LM_HEADS)}")
    if attention_backend not in BACKENDS:
        raise InputError("--attention-backend", f"is {attention_backend!r}", f"one of {', '.join(BACKENDS)}")
    from quantkit.runtime.replicas import Replicas  # which is made of engines

    root = resolve_path(path)
    manifest = read_manifest(root)
    sharded = manifest is not None and manifest.get("kind") == "shards"
    checkpoint, ranks = _open(root, sharded, tp)
    spec = spec_for(checkpoint.config)
    longest = _longest(spec, max_model_len)
    tokenizer = load_tokenizer(root)
    if dp < 1:
        raise InputError("--dp", f"is {dp}", "at least 1")
    if executor not in EXECUTORS:
        raise InputError("--executor", f"is {executor!r}", f"one of {', '.join(EXECUTORS)}")
    if dtype is not None:
        float_dtype(dtype)
    with ExitStack() as undo:
        hosts: Hosts = RayHosts(device, ranks, dp, timeout) if executor == "ray" else ThisHost(place_for(device, ranks * dp), ranks, dp)
        undo.callback(hosts.close)
        place, name = hosts.place, dtype or default_dtype(hosts.place, parity)
        seats = max_num_seqs or seqs_by_device[place]
        tokens = max_num_batched_tokens or max(seats, PASS_TOKENS[place])
        if tokens < seats:
            raise InputError("--max-num-batched-tokens", f"is {tokens}", f"at least --max-num-seqs, {seats}")
        fp8 = kv_cache_dtype == "fp8"
        given = (str(root), sharded, ranks, name, place, parity, timeout, fp8, memory_share, tokens, seats)
        job = RankJob(*given, lm_head=lm_head, attention=attention_backend)
        alone = executor == "local" and ranks == dp == 1
        executors: Sequence[Executor] = [LocalExecutor(job, progress)] if alone else start_executors(job, hosts, dp, progress)
        for each in executors:
            undo.callback(each.close)
        rooms = [_kv_room(each, place, longest, max_model_len is not None, seats) for each in executors]
        longest = min(length for length, _ in rooms)
        engines: list[Engine] = []
        for each, (_, blocks) in zip(executors, rooms, strict=True):
            limits = EngineLimits(longest, seats, max_queue, blocks, tokens, prefix_caching)
            engines.append(Engine(each, tokenizer, spec, limits, dtype=name))
            undo.callback(engines[-1].close)
        undo.pop_all()
    return engines[0] if dp == 1 else Replicas(engines, prefix_caching=prefix_caching)


def _open(root: Path, sharded: bool, tp: int | None) -> tuple[Checkpoint, int]:
    """The checkpoint (of a shard directory, rank 0's) and the number of ranks, once it is known that the model can be cut so."""
    if sharded:
        checkpoint, plan, _ = open_rank(root, 0)
        if tp not in (None, plan.tp):
            hint = f"leave --tp out, or shard again: quantkit shard ART OUT --tp {tp}"
            raise InputError(str(root), f"was cut for {plan.tp} ranks, --tp says {tp}", f"--tp {plan.tp}", hint)
        return checkpoint, plan.tp
    checkpoint, ranks = as_blocks(open_checkpoint(root)), 1 if tp is None else tp
    spec = spec_for(checkpoint.config)
    make_plan(spec, stored_assignment(checkpoint.config, spec, checkpoint.tensors), ranks, dtype="BF16")
    return checkpoint, ranks


def _longest(spec: ModelSpec, asked: int | None) -> int:
    """The tokens of the longest text: as asked, else as trained."""
    if asked is None:
        return spec.max_positions
    stretches = spec.position_table is None and any(rope.kind == "dynamic" for rope in spec.ropes)
    if asked < 2 or (asked > spec.max_positions and not stretches):
        raise InputError("--max-model-len", f"is {asked}", f"2 to {spec.max_positions}, which the model was made for")
    return asked


def _kv_room(executor: Executor, place: str, longest: int, asked: bool, max_num_seqs: int) -> tuple[int, int]:
    """The longest text and the blocks that the caches hold: what every rank has memory for.

    On a CPU no more than the seats can fill: what is left belongs to others too.
    """
    full = blocks_for(longest) * max_num_seqs
    blocks = min((rank.kv_blocks for rank in executor.facts if rank.kv_blocks is not None), default=full)
    fits = BLOCK * blocks
    if not fits or (asked and fits < longest):
        where = "--max-model-len" if asked else "keys and values"
        raise MachineError(
            where, f"{longest} tokens do not fit into the memory that the weights leave", f"at most {fits}", "more memory or ranks"
        )
    return min(longest, fits), min(blocks, full) if place == "cpu" else blocks
