"""``quantkit generate``: one prompt, or a file of them, through an engine that runs many at once."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import fs
from quantkit.errors import InputError
from quantkit.progress import Progress, silent
from quantkit.report import Report
from quantkit.runtime.params import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from quantkit.runtime.llm import LLM, Generated

MAX_FILE = 1 << 30
MAX_TOKENS = 256
"""Tokens of an answer where nothing else is said."""
FLUSH_SECONDS = 2.0
"""How long finished answers may wait until they are written."""
NAMES: Mapping[str, str] = {"stop_ids": "stop_token_ids"}
"""Fields of SamplingParams that go by another name in a file, which is the API's."""
FIELDS: Mapping[str, str] = {NAMES.get(field.name, field.name): field.name for field in dataclasses.fields(SamplingParams)}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is loaded and run; ``timeout`` is of a rank that hangs, in seconds."""

    tp: int | None = None
    device: str = "auto"
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"
    prefix_caching: bool = True
    timeout: float = 60.0

    def start(self, path: str, progress: Progress) -> LLM:
        """Load the model. Raises InputError and MachineError."""
        from quantkit.runtime.llm import LLM

        return LLM(
            path,
            tp=self.tp,
            device=self.device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            memory_share=self.gpu_memory_utilization,
            kv_cache_dtype=self.kv_cache_dtype,
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


@dataclass(frozen=True, slots=True)
class Line:
    """One prompt: a text, tokens, or the messages of a conversation; ``given``: what names it in the answer."""

    prompt: str | list[int] | list[dict[str, Any]]
    chat: bool
    sampling: SamplingParams
    given: Mapping[str, Any]


def run(options: GenerateOptions, progress: Progress = silent) -> Report:
    """Generate. Raises InputError for a bad prompt before any runs, MachineError, RuntimeDied."""
    lines = _lines(options)
    if options.out is not None:
        if options.out.exists() and not options.overwrite:
            raise InputError(str(options.out), "exists", "a new file, or --overwrite")
        fs.write_bytes(options.out, b"")  # before the weights are read: a place that cannot be written is known at once
    with options.engine.start(options.path, progress) as llm:
        jobs = [(_tokens(llm, line), line.sampling) for line in lines]
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
        facts = (llm.engine.tp, llm.engine.dtype)
    return _report(options, writer, seconds, *facts)


def _report(options: GenerateOptions, writer: _Writer, seconds: float, tp: int, dtype: str) -> Report:
    prompt, made = writer.prompt_tokens, writer.tokens
    data: dict[str, Any] = {"prompts": writer.taken, "prompt_tokens": prompt, "completion_tokens": made, "seconds": seconds}
    data |= {"tokens_per_second": made / seconds, "tp": tp, "dtype": dtype}
    if options.out is None:
        alone = options.prompt is not None
        text = writer.records[0]["text"] if alone else "\n".join(json.dumps(record) for record in writer.records)
        return Report("generate", {**data, "results": writer.records}, text=text)
    facts = (
        ("written", str(options.out)),
        ("prompts", f"{writer.taken} of {prompt} tokens"),
        ("generated", f"{made} tokens in {seconds:.1f} s: {made / seconds:.0f} per second, tp {tp}, {dtype}"),
    )
    return Report("generate", {**data, "out": str(options.out)}, facts=facts)


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


def _tokens(llm: LLM, line: Line) -> list[int]:
    prompt: Any = line.prompt
    if not line.chat:
        return llm.tokens(prompt)
    return llm.chat_tokens(prompt)


# what is asked


def _lines(options: GenerateOptions) -> list[Line]:
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("generate", "has no prompt" if options.prompt is None else "has two", "PROMPT, or --prompts FILE")
    if options.system is not None and not options.chat:
        raise InputError("--system", "is given without --chat", "both, for a conversation")
    if options.prompts is None:
        assert options.prompt is not None
        return [_text_line(options, options.prompt)]
    data, where = fs.read_bytes(options.prompts, MAX_FILE), str(options.prompts)
    try:
        rows = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as exc:
        raise InputError(where, f"is not UTF-8 at byte {exc.start}", "UTF-8 text") from exc
    numbered = [(number, row.removesuffix("\r")) for number, row in enumerate(rows, 1) if row.strip()]
    if not numbered:
        raise InputError(where, "holds no prompt", "a prompt per line")
    if options.prompts.suffix != ".jsonl":
        return [_text_line(options, row) for _, row in numbered]
    return [_json_line(options, row, f"{where}: line {number}") for number, row in numbered]


def _turns(options: GenerateOptions, text: str) -> list[dict[str, Any]]:
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": text}]


def _text_line(options: GenerateOptions, text: str) -> Line:
    return Line(_turns(options, text) if options.chat else text, options.chat, options.sampling, {"prompt": text})


def _json_line(options: GenerateOptions, row: str, where: str) -> Line:
    """A line of JSON: ``prompt`` (text or token ids) or ``messages``, perhaps ``id``, and sampling as the API names it."""
    try:
        fields = json.loads(row)
    except (ValueError, RecursionError) as exc:
        raise InputError(where, f"is not JSON ({exc!s:.100})", "an object with prompt or messages") from exc
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise InputError(where, "has not one of prompt and messages", "an object with one of them")
    given = {name: fields.pop(name) for name in ("id", "prompt", "messages") if name in fields}
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise InputError(where, f"{unknown[0]!r:.100} is unknown", f"id, prompt, messages, {', '.join(FIELDS)}")
    if isinstance(fields.get("logit_bias"), dict):
        fields["logit_bias"] = {int(key) if key.isdecimal() else key: amount for key, amount in fields["logit_bias"].items()}
    try:
        sampling = dataclasses.replace(options.sampling, **{FIELDS[name]: value for name, value in fields.items()})
    except InputError as exc:
        raise InputError(f"{where}: {NAMES.get(exc.where, exc.where)}", exc.what, exc.expected, exc.hint) from exc
    if "messages" in given:
        messages = given["messages"]
        if not isinstance(messages, list):
            raise InputError(f"{where}: messages", f"is {type(messages).__name__}", "a list of messages")
        return Line(messages, True, sampling, given)
    prompt = given["prompt"]
    if isinstance(prompt, str):
        return Line(_turns(options, prompt) if options.chat else prompt, options.chat, sampling, given)
    if options.chat or not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
        raise InputError(f"{where}: prompt", f"is {type(prompt).__name__}", "a text" if options.chat else "a text, or token ids")
    return Line(prompt, False, sampling, given)
