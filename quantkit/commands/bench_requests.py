"""What the benchmarks of a whole model ask for, and how their times are told. Knows no engine and no server."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import fs
from quantkit.commands.prompt_file import Line, read_prompts
from quantkit.errors import InputError
from quantkit.runtime.params import SamplingParams

TOKENS = range(100, 1000)
"""Of which random prompts are made: ordinary ones in every vocabulary of a useful size."""
RANDOM_PROMPTS = 128
"""How many are asked where no number is given."""


@dataclass(frozen=True, slots=True)
class Load:
    """``num_prompts`` prompts of ``input_len`` random tokens, answered by ``output_len`` tokens; both uniform within ``spread`` of that.

    With ``prompts`` those of a file instead, the first ``num_prompts`` or all, as ``prompt_file`` reads it, of at most ``output_len``
    greedy tokens where it says no other.
    """

    num_prompts: int | None = None
    input_len: int = 512
    output_len: int = 128
    spread: float = 0.0
    seed: int = 0
    prompts: Path | None = None

    @property
    def count(self) -> int:
        """How many random prompts."""
        return RANDOM_PROMPTS if self.num_prompts is None else self.num_prompts


def whole(tokens: list[int], output: int) -> Line:
    """A prompt of ``tokens``, answered by ``output`` tokens exactly, whatever the model says."""
    return Line(tokens, False, SamplingParams(output, temperature=0.0, ignore_eos=True), {})


def asks(load: Load) -> list[Line]:
    """The requests, the same for the same seed. Raises InputError for a bad option or file."""
    if not 0 <= load.spread < 1:
        raise InputError("--spread", f"is {load.spread:g}", "0 to below 1")
    if load.prompts is not None:
        return read_prompts(load.prompts, SamplingParams(load.output_len, temperature=0.0))[: load.num_prompts]
    draw = random.Random(load.seed)

    def length(mean: int) -> int:
        return max(1, draw.randint(round(mean * (1 - load.spread)), round(mean * (1 + load.spread))))

    sizes = [(length(load.input_len), length(load.output_len)) for _ in range(load.count)]
    return [whole(draw.choices(TOKENS, k=size), output) for size, output in sizes]


@dataclass(frozen=True, slots=True)
class Timed:
    """One answered request, in seconds since the run began: when it was sent and when each piece came; and its tokens."""

    sent: float
    came: tuple[float, ...]
    prompt_tokens: int
    tokens: int

    @property
    def first(self) -> float:
        """Seconds to the first piece."""
        return self.came[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in zip(self.came, self.came[1:], strict=False)]


def figures(answers: Sequence[Timed], seconds: float) -> dict[str, Any]:
    """Rates over ``seconds``, and the spread of times in milliseconds: to the first token, between tokens, of whole requests."""
    tokens, prompt = sum(one.tokens for one in answers), sum(one.prompt_tokens for one in answers)
    return {
        "requests": len(answers),
        "seconds": seconds,
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "requests_per_second": len(answers) / seconds,
        "tokens_per_second": tokens / seconds,
        "total_tokens_per_second": (tokens + prompt) / seconds,
        "ttft_ms": _spread([one.first for one in answers]),
        "itl_ms": _spread([gap for one in answers for gap in one.gaps]),
        "e2e_ms": _spread([one.came[-1] - one.sent for one in answers]),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, median and the 90th and 99th percentile, in milliseconds; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"mean": 1000 * statistics.fmean(ordered), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99)}


def facts_of(data: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """``figures`` for a person."""
    shown = [
        ("requests", f"{data['requests']} in {data['seconds']:.2f} s, {data['requests_per_second']:.2f} per second"),
        ("generated", f"{data['completion_tokens']} tokens, {data['tokens_per_second']:.1f} per second"),
        ("with prompts", f"{data['completion_tokens'] + data['prompt_tokens']} tokens, {data['total_tokens_per_second']:.1f} per second"),
    ]
    for name, label in (("ttft_ms", "first token"), ("itl_ms", "between tokens"), ("e2e_ms", "whole request")):
        if (times := data[name]) is not None:
            shown.append((label, ", ".join(f"{key} {value:.1f}" for key, value in times.items()) + " ms"))
    return tuple(shown)


def check_out(out: Path | None) -> None:
    """Whether ``write_figures`` can write ``out``, asked before anything is measured. Raises InputError."""
    if out is None:
        return
    if out.is_dir():
        raise InputError("--out", f"{out} is a directory", "a file to write")
    if not out.parent.is_dir():
        raise InputError("--out", f"{out.parent} is no directory", "a file in a directory that exists")


def write_figures(out: Path | None, data: Mapping[str, Any]) -> None:
    """``data`` as a JSON file, where one is asked for."""
    if out is not None:
        fs.write_bytes(out, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())
