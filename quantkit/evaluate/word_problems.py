"""Word problems whose answer is a number, as GSM8K publishes them: read, asked behind worked examples, and judged.

Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems". Knows text alone. The problems that quantkit brings are its
own, in the same format: enough to run and to compare, too few and too easy to say how good a model is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from quantkit import fs
from quantkit.errors import InputError

BUILTIN = Path(__file__).with_name("word_problems.jsonl")
WORKED = 8
"""The first problems of BUILTIN are worked examples, the others are asked."""
MARK = "####"
"""Stands before the answer in the last line of a solution."""
STOPS = ("Question:",)
"""Where the next problem would begin."""
INSTRUCTION = f'Solve it step by step. End with a line of "{MARK}" and the answer, a number alone.'
MAX_FILE = 256 << 20
MAX_DIGITS = 40
_NUMBER = re.compile(r"(?P<sign>(?<![\w).])-)?\$?(?P<digits>\d[\d,]*(?:\.\d+)?)")
_Z = 1.959964
"""95 % of a normal distribution lie within so many deviations."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its solution, and the number that this ends in."""

    question: str
    answer: str
    value: Decimal


def read_problems(path: Path) -> list[Problem]:
    """The problems of a JSONL file with ``question`` and ``answer``, one or more. Raises InputError naming the line."""
    try:
        rows = fs.read_bytes(path, MAX_FILE).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as exc:
        raise InputError(str(path), f"is not UTF-8 at byte {exc.start}", "UTF-8 text") from exc
    found = [_problem(row, f"{path}: line {number}") for number, row in enumerate(rows, 1) if row.strip()]
    if not found:
        raise InputError(str(path), "holds no problem", "a JSON object with question and answer per line")
    return found


def _problem(row: str, where: str) -> Problem:
    try:
        fields = json.loads(row)
    except (ValueError, RecursionError) as exc:
        raise InputError(where, f"is not JSON ({exc!s:.100})", "an object with question and answer") from exc
    question, answer = (fields.get("question"), fields.get("answer")) if isinstance(fields, dict) else (None, None)
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip() or not answer.strip():
        raise InputError(where, "has no question or no answer", "an object with both as texts")
    value, marked = answered(answer)
    if value is None or not marked:
        raise InputError(where, f"has an answer without {MARK} and a number", f"a solution that ends in {MARK} 42")
    return Problem(question.strip(), answer.strip(), value)


def answered(text: str) -> tuple[Decimal | None, bool]:
    """The number that ``text`` gives as its answer, and whether MARK stands before it; without one it is the last number of all."""
    _, mark, tail = text.partition(MARK)
    marked = _NUMBER.match(tail.lstrip()) if mark else None
    if marked is not None:
        return _value(marked), True
    numbers = list(_NUMBER.finditer(text))
    return (_value(numbers[-1]) if numbers else None), False


def _value(match: re.Match[str]) -> Decimal | None:
    digits = match["digits"].replace(",", "")
    return None if len(digits) > MAX_DIGITS else Decimal(("-" if match["sign"] else "") + digits)


def prompt_of(problem: Problem, examples: Sequence[Problem]) -> str:
    """What a model is to continue: ``examples`` with their solutions, and the question."""
    shots = "".join(f"Question: {each.question}\nAnswer: {each.answer}\n\n" for each in examples)
    return f"{shots}Question: {problem.question}\nAnswer:"


def turns_of(problem: Problem, examples: Sequence[Problem]) -> list[dict[str, Any]]:
    """The same as a conversation, in which the examples were answered before."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": f"{each.question}\n{INSTRUCTION}"} for each in (*examples, problem)]
    for number, each in enumerate(examples):
        turns.insert(2 * number + 1, {"role": "assistant", "content": each.answer})
    return turns


def interval(right: int, count: int) -> tuple[float, float]:
    """Between what shares ``right`` of ``count`` lies with 95 % confidence. Source: Wilson 1927."""
    share, spread = right / count, _Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
