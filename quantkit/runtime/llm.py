"""A model in this program: ``LLM(path).generate(prompts, SamplingParams(...))``. Prompts to texts over an engine, many at once.

Knows prompts, messages and texts; how they are computed is the engine's affair.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from quantkit.errors import InputError, QuantkitError
from quantkit.progress import Progress, silent
from quantkit.runtime.engine import Delta, Front
from quantkit.runtime.params import SamplingParams, TokenLogprob
from quantkit.runtime.start import MEMORY_SHARE, start_engine
from quantkit.text.chat import render_chat

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
BATCH = {"cpu": 64, "cuda": 128}
"""Sequences that run at once where nothing else is said: more than a server's, as nobody waits for a first token."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What became of one prompt. ``token_ids`` are all that were sampled, an end token included, which is not in ``text``.

    ``finish_reason``: "stop" or "length". ``prompt_logprobs`` are of the prompt's tokens from the second on.
    """

    prompt_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class _Growing:
    """What came of a prompt that runs."""

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs


class LLM:
    """A loaded model. Use it in ``with``, or ``close`` it.

    ``tp`` ranks (None: as sharded, else 1), ``device`` "auto", "cpu" or "cuda", ``dtype`` of the computation, ``max_model_len`` tokens of
    prompt and answer together, ``max_num_seqs`` prompts at once (None: 128 on a GPU, 64 on a CPU), ``memory_share`` of the device's memory,
    ``kv_cache_dtype`` "auto" or "fp8", ``lm_head`` "auto" or "q8_0", ``timeout`` in seconds for a rank that hangs. ``dp`` replicas, each of
    ``tp`` ranks and with these limits, share the prompts; ``executor`` "local", or "ray" for the hosts of a cluster. Raises InputError and
    MachineError for what cannot be.
    """

    def __init__(
        self,
        path: str,
        *,
        tp: int | None = None,
        device: str = "auto",
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        memory_share: float = MEMORY_SHARE,
        kv_cache_dtype: str = "auto",
        lm_head: str = "auto",
        attention_backend: str = "auto",
        prefix_caching: bool = True,
        timeout: float = 60.0,
        dp: int = 1,
        executor: str = "local",
        progress: Progress = silent,
    ) -> None:
        self.engine: Front = start_engine(
            path,
            tp=tp,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            seqs_by_device=BATCH,
            max_num_batched_tokens=max_num_batched_tokens,
            memory_share=memory_share,
            kv_cache_dtype=kv_cache_dtype,
            lm_head=lm_head,
            attention_backend=attention_backend,
            prefix_caching=prefix_caching,
            timeout=timeout,
            dp=dp,
            executor=executor,
            progress=progress,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and its ranks; a second call does nothing."""
        self.engine.close()

    def tokens(self, prompt: Prompt) -> list[int]:
        """A prompt as tokens, with what the tokenizer puts around a text; tokens stay as they are."""
        return self.engine.tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else list(prompt)

    def chat_tokens(self, messages: Messages) -> list[int]:
        """``messages`` (``role``, ``content``) as the model's chat template has them. Raises InputError without one."""
        return self.engine.tokenizer.encode(render_chat(self.engine.tokenizer, messages), special=False)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress = silent,
    ) -> list[Generated]:
        """What each of ``prompts`` (texts, or lists of tokens) becomes, in order. ``params``: of all, or one of each.

        Raises InputError before anything runs when a prompt is empty, too long or no tokens of the model; RuntimeDied.
        """
        several = _several(prompts)
        each = [params or SamplingParams()] * len(several) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(several):
            raise InputError("params", f"are {len(each)}", f"one, or one for each of {len(several)} prompts")
        done: dict[int, Generated] = {}

        def keep(number: int, result: Generated) -> None:
            done[number] = result
            progress("generate", len(done), len(several))

        progress("generate", 0, len(several))
        self.run([(self.tokens(prompt), own) for prompt, own in zip(several, each, strict=True)], keep)
        return [done[number] for number in range(len(several))]

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> Generated:
        """The answer to a conversation. Raises as ``generate`` does, and InputError for a model without a chat template."""
        [answer] = self.generate([self.chat_tokens(messages)], params)
        return answer

    def run(self, jobs: Sequence[tuple[Sequence[int], SamplingParams]], done: Callable[[int, Generated], None]) -> None:
        """Run every (tokens, how) of ``jobs`` and call ``done(number, result)``, on this thread, as each is finished.

        As many as the engine takes are under way at a time. Nothing runs on when this raises.
        """
        for number, (ids, params) in enumerate(jobs):
            try:
                self.engine.check(ids, params)
            except InputError as exc:
                raise InputError(f"{exc.where} {number}" if len(jobs) > 1 else exc.where, exc.what, exc.expected, exc.hint) from exc
        grown = [_Growing() for _ in jobs]
        with closing(self.deltas(jobs)) as deltas:
            for number, _, delta in deltas:
                grown[number].add(delta)
                if delta.finish_reason is not None:
                    done(number, _finished(jobs[number][0], grown[number], delta.finish_reason))

    def deltas(self, jobs: Iterable[tuple[Sequence[int], SamplingParams]]) -> Generator[tuple[int, float, Delta], None, None]:
        """What comes of ``jobs``, as it comes: (number of the job, ``time.perf_counter()`` of that moment, delta).

        As many as the engine takes are under way at a time; the next is asked for when there is room. Nothing runs on when this is closed
        or raises. Raises InputError for a bad job when its turn comes; RuntimeDied.
        """
        said: queue.SimpleQueue[tuple[int, float, Delta | QuantkitError]] = queue.SimpleQueue()
        running: dict[int, int] = {}
        left = iter(enumerate(jobs))
        try:
            while True:
                while len(running) < self.engine.capacity and (job := next(left, None)) is not None:
                    number, (ids, params) = job
                    running[number] = self.engine.submit(ids, params, _into(said, number))
                if not running:
                    return
                number, when, event = said.get()
                if isinstance(event, QuantkitError):
                    raise event
                if event.finish_reason is not None:
                    del running[number]
                yield number, when, event
        finally:
            for request in running.values():
                self.engine.cancel(request)

    def stream(self, ids: Sequence[int], params: SamplingParams) -> Generator[Delta, None, None]:
        """What comes of ``ids``, as it comes. The request is dropped when the iterator is closed. Raises as ``generate`` does."""
        with closing(self.deltas([(ids, params)])) as deltas:
            for _, _, delta in deltas:
                yield delta


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    given: list[Any] = list(prompts)
    return [given] if given and all(isinstance(item, int) for item in given) else given


def _into(said: queue.SimpleQueue[tuple[int, float, Delta | QuantkitError]], number: int) -> Callable[[Delta | QuantkitError], None]:
    return lambda event: said.put((number, time.perf_counter(), event))


def _finished(prompt: Sequence[int], grown: _Growing, reason: str) -> Generated:
    return Generated(tuple(prompt), "".join(grown.texts), tuple(grown.tokens), reason, tuple(grown.logprobs), grown.prompt_logprobs)
