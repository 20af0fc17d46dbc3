"""``quantkit bench study``: tensor-parallel ranks against data-parallel replicas on word problems: time, rate and accuracy of each mode."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import fs
from quantkit.commands.bench_requests import TOKENS, figures, whole
from quantkit.commands.bench_throughput import timed
from quantkit.commands.generate import ENGINE, EngineOptions
from quantkit.commands.prompt_file import Line
from quantkit.errors import InputError, MachineError
from quantkit.evaluate.word_problems import BUILTIN, STOPS, WORKED, Problem, answered, interval, prompt_of, read_problems, turns_of
from quantkit.progress import Progress, silent
from quantkit.report import Report, Table, to_markdown
from quantkit.runtime.params import SamplingParams

if TYPE_CHECKING:
    from quantkit.runtime.engine import Delta
    from quantkit.runtime.llm import LLM

MAX_MODES = 16
CPU_RANKS = 2
"""Ranks and replicas of the modes that are compared on a CPU where none are named."""
WARMUP_TOKENS = 16
"""Tokens of the answers that are made before the clock starts."""


@dataclass(frozen=True, slots=True)
class BenchStudyOptions:
    """``modes`` such as "tp2", "dp2" and "tp2dp2"; none means those that use this machine's GPUs. ``data`` and ``examples``: GSM8K's files.

    ``limit``: how many of the questions. ``shots`` worked examples stand before each. ``chat``: as a conversation. ``out``: a directory
    for the report and every answer. ``same``: the check fails when modes answer differently. ``engine`` without ``tp`` and ``dp``.
    """

    path: str
    modes: tuple[str, ...] = ()
    data: Path | None = None
    examples: Path | None = None
    shots: int = WORKED
    limit: int | None = None
    chat: bool = False
    max_tokens: int = 256
    out: Path | None = None
    same: bool = False
    engine: EngineOptions = ENGINE


@dataclass(frozen=True, slots=True)
class Mode:
    """``dp`` replicas of ``tp`` ranks each."""

    tp: int
    dp: int

    @property
    def name(self) -> str:
        return f"tp{self.tp}" if self.dp == 1 else f"dp{self.dp}" if self.tp == 1 else f"tp{self.tp}dp{self.dp}"


@dataclass(slots=True)
class _Said:
    """What came of one question in one mode."""

    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one mode made of all questions, and its figures."""

    mode: Mode
    said: list[_Said]
    right: list[bool]
    data: dict[str, Any]


def run(options: BenchStudyOptions, progress: Progress = silent) -> Report:
    """Ask every question in every mode. Raises InputError for a mode that cannot be, MachineError, RuntimeDied.

    Each mode loads the model anew, so none finds what another computed.
    """
    examples, problems = _problems(options)
    modes = _modes(options)
    if options.out is not None:
        fs.make_dir(options.out)
    lines = [_line(options, problem, examples) for problem in problems]
    outcomes = [_run_mode(options, mode, lines, problems, progress) for mode in modes]
    for outcome in outcomes:
        outcome.data.update(_beside(outcome, outcomes[0]))
    return _report(options, problems, examples, outcomes)


def _run_mode(options: BenchStudyOptions, mode: Mode, lines: Sequence[Line], problems: Sequence[Problem], progress: Progress) -> _Outcome:
    start = time.perf_counter()
    with replace(options.engine, tp=mode.tp, dp=mode.dp).start(options.path, progress) as llm:
        loading = time.perf_counter() - start
        _check_room(llm, lines)
        timed(llm, _warm_up(llm, lines, mode), silent)
        said = [_Said() for _ in lines]

        def keep(number: int, delta: Delta) -> None:
            said[number].tokens += delta.tokens
            said[number].texts.append(delta.text)

        answers, seconds = timed(llm, lines, progress, keep)
        dtype, seats = llm.engine.dtype, llm.engine.max_num_seqs
    found = [answered(each.text) for each in said]
    right = [value == problem.value for (value, _), problem in zip(found, problems, strict=True)]
    low, high = interval(sum(right), len(right))
    data = {"mode": mode.name, "tp": mode.tp, "dp": mode.dp, "dtype": dtype, "max_num_seqs": seats}
    data |= {"load_seconds": loading, **figures(answers, seconds)}
    data |= {"right": sum(right), "accuracy": sum(right) / len(right), "accuracy_low": low, "accuracy_high": high}
    data["marked"] = sum(marked for _, marked in found)
    return _Outcome(mode, said, right, data)


def _warm_up(llm: LLM, lines: Sequence[Line], mode: Mode) -> list[Line]:
    """As many requests as run at once, as long as ``lines`` and alike as far, but of other tokens: what is built, tuned or captured on
    first use is not timed, and what is timed is not found computed."""
    draw, most = random.Random(0), min(WARMUP_TOKENS, lines[0].sampling.max_tokens)
    prompts = [line.tokens(llm) for line in lines[: llm.engine.max_num_seqs * mode.dp]]
    alike = draw.choices(TOKENS, k=next((n for n, each in enumerate(zip(*prompts, strict=False)) if len(set(each)) > 1), 0))
    return [whole(alike + draw.choices(TOKENS, k=max(1, len(prompt) - len(alike))), most) for prompt in prompts]


def _check_room(llm: LLM, lines: Sequence[Line]) -> None:
    for line in lines:
        length, most = len(line.tokens(llm)) + line.sampling.max_tokens, llm.engine.max_model_len
        if length > most:
            what = f"a question with its examples and answer has {length} tokens"
            raise InputError("bench study", what, f"at most {most}", "fewer --shots or --max-tokens")


def _beside(outcome: _Outcome, first: _Outcome) -> dict[str, Any]:
    """How a mode compares with the first: its speed, and how many answers have other tokens, and of these another verdict."""
    other = [a.tokens != b.tokens for a, b in zip(outcome.said, first.said, strict=True)]
    verdicts = [a != b for a, b in zip(outcome.right, first.right, strict=True)]
    speed = first.data["seconds"] / outcome.data["seconds"]
    return {"speed_up": speed, "different_answers": sum(other), "different_verdicts": sum(verdicts)}


# what is asked


def _problems(options: BenchStudyOptions) -> tuple[list[Problem], list[Problem]]:
    """Worked examples and questions."""
    own = read_problems(BUILTIN)
    worked = own[:WORKED] if options.examples is None else read_problems(options.examples)
    if not 0 <= options.shots <= len(worked):
        where = "quantkit brings" if options.examples is None else f"{options.examples} has"
        raise InputError("--shots", f"is {options.shots}", f"0 to {len(worked)}, which {where}")
    if options.limit is not None and options.limit < 1:
        raise InputError("--limit", f"is {options.limit}", "at least 1")
    asked = own[WORKED:] if options.data is None else read_problems(options.data)
    return worked[: options.shots], asked[: options.limit]


def _line(options: BenchStudyOptions, problem: Problem, examples: Sequence[Problem]) -> Line:
    sampling = SamplingParams(options.max_tokens, temperature=0.0, stop=STOPS)
    prompt: Any = turns_of(problem, examples) if options.chat else prompt_of(problem, examples)
    return Line(prompt, options.chat, sampling, {})


# in which modes


def _modes(options: BenchStudyOptions) -> list[Mode]:
    """The modes, once it is known that the model can be cut so and that the devices are there."""
    from quantkit.runtime.devices import place_for

    local = options.engine.executor == "local"
    if not local and not options.modes:
        raise InputError("--modes", f"is not given with --executor {options.engine.executor}", "modes that its GPUs have room for")
    gpus = _gpus() if local and place_for(options.engine.device) == "cuda" else None
    cut = _cut_for(options.path)
    given = [_mode(text) for text in options.modes]
    modes = given or _all_of(CPU_RANKS if gpus is None else gpus, cut)
    if len(set(modes)) != len(modes) or len(modes) > MAX_MODES:
        raise InputError("--modes", f"are {', '.join(mode.name for mode in modes)}", f"each once, at most {MAX_MODES}")
    for mode in modes:
        if gpus is not None and mode.tp * mode.dp > gpus:
            raise MachineError("--modes", f"{mode.name} needs {mode.tp * mode.dp} GPUs, {gpus} are here", "a GPU for each rank")
        if cut is not None and mode.tp != cut:
            raise InputError("--modes", f"{mode.name} on a model that was cut for {cut} ranks", f"tp{cut}, or the model before it was cut")
    if cut is None:
        refused = _refused_cuts(options.path, sorted({mode.tp for mode in modes}))
        left = [mode for mode in modes if mode.tp not in refused]
        if refused and (given or not left):
            raise next(iter(refused.values()))
        modes = left
    if options.same and len(modes) == 1:
        raise InputError("--same", f"is given with one mode, {modes[0].name}", "two or more --modes")
    return modes


def _mode(text: str) -> Mode:
    match = re.fullmatch(r"(?:tp(\d{1,4}))?(?:dp(\d{1,4}))?", text.strip())
    tp, dp = (int(part or 1) for part in match.groups()) if match is not None and text.strip() else (0, 0)
    if not tp or not dp:
        raise InputError("--modes", f"{text!r:.100} is no mode", "tpN, dpN or tpNdpM, with commas between them")
    return Mode(tp, dp)


def _all_of(devices: int, cut: int | None) -> list[Mode]:
    """One rank, and the ways to use so many devices; of a model that was cut, as many replicas as there is room for."""
    if cut is not None:
        return [Mode(cut, 1), *([Mode(cut, devices // cut)] if devices >= 2 * cut else [])]
    most = 1 << (devices.bit_length() - 1)
    ways = [(1, 1), (most, 1), (1, most), *([(most // 2, 2)] if most >= 4 else [])]
    return [Mode(tp, dp) for tp, dp in dict.fromkeys(ways)]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _cut_for(path: str) -> int | None:
    """The ranks of a shard directory; None for any other model."""
    from quantkit.checkpoint.reader import read_manifest, resolve_path
    from quantkit.shard import open_rank

    root = resolve_path(path)
    manifest = read_manifest(root)
    return open_rank(root, 0)[1].tp if manifest is not None and manifest.get("kind") == "shards" else None


def _refused_cuts(path: str, degrees: Sequence[int]) -> dict[int, InputError]:
    """Of ``degrees`` those that the model cannot be cut for, with what names the layer and the numbers."""
    from quantkit.arch.table import spec_for
    from quantkit.checkpoint.blocks import as_blocks
    from quantkit.checkpoint.reader import open_checkpoint
    from quantkit.plan import make_plan
    from quantkit.quant_config import stored_assignment

    checkpoint = as_blocks(open_checkpoint(path))
    spec = spec_for(checkpoint.config)
    assignment = stored_assignment(checkpoint.config, spec, checkpoint.tensors)
    refused = {}
    for tp in degrees:
        try:
            make_plan(spec, assignment, tp, dtype="BF16")
        except InputError as exc:
            refused[tp] = exc
    return refused


# what is told


def _report(options: BenchStudyOptions, problems: Sequence[Problem], examples: Sequence[Problem], outcomes: Sequence[_Outcome]) -> Report:
    rows = [outcome.data for outcome in outcomes]
    different = sum(len({tuple(outcome.said[n].tokens) for outcome in outcomes}) > 1 for n in range(len(problems)))
    source = "built-in problems" if options.data is None else str(options.data)
    data: dict[str, Any] = {
        "model": options.path,
        "data": source,
        "questions": len(problems),
        "shots": len(examples),
        "chat": options.chat,
        "max_tokens": options.max_tokens,
        "max_num_seqs": rows[0]["max_num_seqs"],
        "dtype": rows[0]["dtype"],
        "different_answers": different,
        "modes": rows,
    }
    alike = "all the same" if not different else f"{different} of {len(problems)} differ between modes"
    report = Report(
        "bench study",
        data,
        facts=(
            ("model", f"{options.path}, {data['dtype']}, {data['max_num_seqs']} at once on each replica"),
            ("questions", f"{len(problems)} of {source}, {len(examples)} worked examples, {'chat' if options.chat else 'text'}"),
            ("answers", alike),
        ),
        tables=(_table(rows),),
        warnings=_warnings(options, rows),
        failed=f"{different} of {len(problems)} answers differ between modes" if options.same and different else None,
    )
    if options.out is not None:
        fs.write_bytes(options.out / "study.json", (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())
        fs.write_bytes(options.out / "study.md", to_markdown(report).encode())
        fs.write_bytes(options.out / "answers.jsonl", _answers(problems, outcomes))
    return report


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("mode", "load s", "time s", "speed-up", "questions/s", "tokens/s", "accuracy", "95 % interval", "marked", "other answers")
    return Table(
        "Modes",
        columns,
        tuple(
            (
                row["mode"],
                f"{row['load_seconds']:.1f}",
                f"{row['seconds']:.2f}",
                f"{row['speed_up']:.2f}",
                f"{row['requests_per_second']:.2f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['accuracy']:.1%}",
                f"{row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}",
                row["marked"],
                row["different_answers"],
            )
            for row in rows
        ),
    )


def _warnings(options: BenchStudyOptions, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    found = []
    if options.data is None:
        found.append("the built-in problems are few and easy: --data FILE takes GSM8K's test.jsonl")
    if len(rows) == 1:
        found.append("there is one mode, and nothing to compare it with: --modes")
    if any(row["different_answers"] for row in rows) and rows[0]["dtype"] != "float32":
        found.append(f"batches and ranks of other sizes add in other orders, and {rows[0]['dtype']} shows it: --dtype float32 rounds less")
    return tuple(found)


def _answers(problems: Sequence[Problem], outcomes: Sequence[_Outcome]) -> bytes:
    """A line of JSON for each question, with what every mode said."""
    lines = []
    for number, problem in enumerate(problems):
        modes = {}
        for outcome in outcomes:
            said = outcome.said[number]
            value, marked = answered(said.text)
            modes[outcome.mode.name] = {"text": said.text, "value": _shown(value), "marked": marked, "right": outcome.right[number]}
        record = {"index": number, "question": problem.question, "answer": _shown(problem.value), "modes": modes}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _shown(value: Decimal | None) -> str | None:
    return None if value is None else f"{value:f}"
