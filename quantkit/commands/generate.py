"""``quantkit generate``: one prompt, or a file of them, through an engine that runs many at once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import fs
from quantkit.commands.prompt_file import Line, read_prompts, text_line
from quantkit.errors import InputError
from quantkit.progress import Progress, silent
from quantkit.report import Report
from quantkit.runtime.params import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from quantkit.runtime.llm import LLM, Generated

MAX_TOKENS = 256
"""Tokens of an answer where nothing else is said."""
FLUSH_SECONDS = 2.0
"""How long finished answers may wait until they are written."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is loaded and run; ``timeout`` is of a rank that hangs, in seconds; limits are of each of ``dp`` replicas."""

    tp: int | None = None
    device: str = "auto"
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"
    prefix_caching: bool = True
    timeout: float = 60.0
    dp: int = 1
    executor: str = "local"
    lm_head: str = "auto"
    attention_backend: str = "auto"

    def start(self, path: str, progress: Progress) -> LLM:
        """Load the model. Raises InputError and MachineError."""
        from quantkit.runtime.llm import LLM

        return LLM(
            path,
            tp=self.tp,
            dp=self.dp,
            executor=self.executor,
            device=self.device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            memory_share=self.gpu_memory_utilization,
            kv_cache_dtype=self.kv_cache_dtype,
            lm_head=self.lm_head,
            attention_backend=self.attention_backend,
            prefix_caching=self.prefix_caching,
            timeout=self.timeout,
            progress=progress,
        )


SAMPLING, ENGINE = SamplingParams(MAX_TOKENS, temperature=0.0), EngineOptions()


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """``prompt``, or the file ``prompts``: JSONL (``.jsonl``), or a prompt per line. ``out``: a JSONL file for the answers.

    ``chat``: prompts are a user's messages, behind ``system``. ``sampling`` holds for what a line of the file does not say itself.
    """

    path: str
    prompt: str | None = None
    prompts: Path | None = None
    out: Path | None = None
    overwrite: bool = False
    chat: bool = False
    system: str | None = None
    sampling: SamplingParams = SAMPLING
    engine: EngineOptions = ENGINE


def run(options: GenerateOptions, progress: Progress = silent) -> Report:
    """Generate. Raises InputError for a bad prompt before any runs, MachineError, RuntimeDied."""
    lines = _lines(options)
    if options.out is not None:
        if options.out.exists() and not options.overwrite:
            raise InputError(str(options.out), "exists", "a new file, or --overwrite")
        fs.write_bytes(options.out, b"")  # before the weights are read: a place that cannot be written is known at once
    with options.engine.start(options.path, progress) as llm:
        jobs = [(line.tokens(llm), line.sampling) for line in lines]
        writer = _Writer(options.out)
        start = time.monotonic()
        progress("generate", 0, len(jobs))

        def done(number: int, result: Generated) -> None:
            writer.take(number, _record(number, lines[number], result))
            progress("generate", writer.taken, len(jobs))

        try:
            llm.run(jobs, done)
        finally:
            writer.flush()
        seconds = time.monotonic() - start
        facts = (llm.engine.tp, llm.engine.dp, llm.engine.dtype)
    return _report(options, writer, seconds, *facts)


def _report(options: GenerateOptions, writer: _Writer, seconds: float, tp: int, dp: int, dtype: str) -> Report:
    prompt, made = writer.prompt_tokens, writer.tokens
    data: dict[str, Any] = {"prompts": writer.taken, "prompt_tokens": prompt, "completion_tokens": made, "seconds": seconds}
    data |= {"tokens_per_second": made / seconds, "tp": tp, "dp": dp, "dtype": dtype}
    if options.out is None:
        alone = options.prompt is not None
        text = writer.records[0]["text"] if alone else "\n".join(json.dumps(record) for record in writer.records)
        return Report("generate", {**data, "results": writer.records}, text=text)
    facts = (
        ("written", str(options.out)),
        ("prompts", f"{writer.taken} of {prompt} tokens"),
        ("generated", f"{made} tokens in {seconds:.1f} s: {made / seconds:.0f} per second, {ranks_named(tp, dp)}, {dtype}"),
    )
    return Report("generate", {**data, "out": str(options.out)}, facts=facts)


def ranks_named(tp: int, dp: int) -> str:
    """How many ranks a model runs on, as reports say it."""
    return f"tp {tp}, dp {dp}" if dp > 1 else f"tp {tp}"


class _Writer:
    """Keeps answers in the order of their prompts; with a file, writes them there as soon as all before them are finished."""

    def __init__(self, out: Path | None) -> None:
        self._out, self._length, self._flushed = out, 0, time.monotonic()
        self._early: dict[int, dict[str, Any]] = {}
        self.records: list[dict[str, Any]] = []
        """Those that are in order and not in the file."""
        self.taken = self._next = self.prompt_tokens = self.tokens = 0

    def take(self, number: int, record: dict[str, Any]) -> None:
        self.taken += 1
        self.prompt_tokens += record["prompt_tokens"]
        self.tokens += len(record["token_ids"])
        self._early[number] = record
        while self._next in self._early:
            self.records.append(self._early.pop(self._next))
            self._next += 1
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._out is not None and self.records:
            data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records).encode()
            self._length = fs.append(self._out, data, at=self._length)
            self.records = []
        self._flushed = time.monotonic()


def _record(number: int, line: Line, result: Generated) -> dict[str, Any]:
    record = {"index": number, **line.given, "text": result.text, "finish_reason": result.finish_reason}
    record |= {"prompt_tokens": len(result.prompt_ids), "token_ids": list(result.token_ids)}
    if result.logprobs:
        record["logprobs"] = _scores(result.logprobs)
    if line.sampling.prompt_logprobs is not None:
        record["prompt_logprobs"] = [None, *_scores(result.prompt_logprobs)]
    return record


def _scores(scored: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [{"token": one.token, "logprob": max(one.logprob, -9999.0), "top": [list(pair) for pair in one.top]} for one in scored]


def _lines(options: GenerateOptions) -> list[Line]:
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("generate", "has no prompt" if options.prompt is None else "has two", "PROMPT, or --prompts FILE")
    if options.system is not None and not options.chat:
        raise InputError("--system", "is given without --chat", "both, for a conversation")
    if options.prompts is None:
        assert options.prompt is not None
        return [text_line(options.prompt, options.sampling, chat=options.chat, system=options.system)]
    return read_prompts(options.prompts, options.sampling, chat=options.chat, system=options.system)
