"""Files of prompts, as ``generate`` and the benchmarks read them: JSONL (``.jsonl``), or a prompt per line. Knows no engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import fs
from quantkit.errors import InputError
from quantkit.runtime.params import SamplingParams

if TYPE_CHECKING:
    from quantkit.runtime.llm import LLM

MAX_FILE = 1 << 30
TOKEN_DIGITS = 10
"""Of the greatest token id that is taken."""
NAMES: Mapping[str, str] = {"stop_ids": "stop_token_ids"}
"""Fields of SamplingParams that go by another name in a file, which is the API's."""
FIELDS: Mapping[str, str] = {NAMES.get(field.name, field.name): field.name for field in dataclasses.fields(SamplingParams)}


@dataclass(frozen=True, slots=True)
class Line:
    """One prompt: a text, tokens, or (``chat``) the messages of a conversation; ``given``: what names it in the answer."""

    prompt: str | list[int] | list[dict[str, Any]]
    chat: bool
    sampling: SamplingParams
    given: Mapping[str, Any]

    def tokens(self, llm: LLM) -> list[int]:
        """The prompt as the model reads it. Raises InputError for a conversation without a chat template."""
        prompt: Any = self.prompt
        return llm.chat_tokens(prompt) if self.chat else llm.tokens(prompt)


def text_line(text: str, sampling: SamplingParams, *, chat: bool = False, system: str | None = None) -> Line:
    """``text`` as a prompt; with ``chat`` a user's message, behind ``system``."""
    return Line(_turns(text, system) if chat else text, chat, sampling, {"prompt": text})


def read_prompts(path: Path, sampling: SamplingParams, *, chat: bool = False, system: str | None = None) -> list[Line]:
    """The prompts of a file, one or more; ``sampling`` holds for what a line does not say itself. Raises InputError naming the line."""
    data, where = fs.read_bytes(path, MAX_FILE), str(path)
    try:
        rows = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as exc:
        raise InputError(where, f"is not UTF-8 at byte {exc.start}", "UTF-8 text") from exc
    numbered = [(number, row.removesuffix("\r")) for number, row in enumerate(rows, 1) if row.strip()]
    if not numbered:
        raise InputError(where, "holds no prompt", "a prompt per line")
    if path.suffix != ".jsonl":
        return [text_line(row, sampling, chat=chat, system=system) for _, row in numbered]
    return [_json_line(row, f"{where}: line {number}", sampling, chat, system) for number, row in numbered]


def _turns(text: str, system: str | None) -> list[dict[str, Any]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def _json_line(row: str, where: str, sampling: SamplingParams, chat: bool, system: str | None) -> Line:
    """A line of JSON: ``prompt`` (text or token ids) or ``messages``, perhaps ``id``, and sampling as the API names it."""
    try:
        fields = json.loads(row)
    except (ValueError, RecursionError) as exc:
        raise InputError(where, f"is not JSON ({exc!s:.100})", "an object with prompt or messages") from exc
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise InputError(where, f"has {exc.object[exc.start]!a}, half of a surrogate pair", "text that UTF-8 can hold") from exc
    except RecursionError as exc:
        raise InputError(where, "is nested too deeply", "an object with prompt or messages") from exc
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise InputError(where, "has not one of prompt and messages", "an object with one of them")
    given = {name: fields.pop(name) for name in ("id", "prompt", "messages") if name in fields}
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise InputError(where, f"{unknown[0]!r:.100} is unknown", f"id, prompt, messages, {', '.join(FIELDS)}")
    if isinstance(fields.get("logit_bias"), dict):
        bias = fields["logit_bias"].items()
        fields["logit_bias"] = {int(key) if key.isdecimal() and len(key) <= TOKEN_DIGITS else key: amount for key, amount in bias}
    try:
        own = dataclasses.replace(sampling, **{FIELDS[name]: value for name, value in fields.items()})
    except InputError as exc:
        raise InputError(f"{where}: {NAMES.get(exc.where, exc.where)}", exc.what, exc.expected, exc.hint) from exc
    if "messages" in given:
        messages = given["messages"]
        if not isinstance(messages, list):
            raise InputError(f"{where}: messages", f"is {type(messages).__name__}", "a list of messages")
        return Line(messages, True, own, given)
    prompt = given["prompt"]
    if isinstance(prompt, str):
        return Line(_turns(prompt, system) if chat else prompt, chat, own, given)
    if chat or not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
        raise InputError(f"{where}: prompt", f"is {type(prompt).__name__}", "a text" if chat else "a text, or token ids")
    return Line(prompt, False, own, given)


def api_fields(line: Line) -> dict[str, Any]:
    """``line`` as the body of a request to ``completions``, or with ``chat`` to ``chat/completions``: what is not the default is said."""
    sampling, plain = line.sampling, SamplingParams()
    said = {name: getattr(sampling, field) for name, field in FIELDS.items() if getattr(sampling, field) != getattr(plain, field)}
    if "logit_bias" in said:
        said["logit_bias"] = {str(token): amount for token, amount in sampling.logit_bias}
    if line.chat and sampling.logprobs is not None:
        said |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return {"messages" if line.chat else "prompt": line.prompt, "max_tokens": sampling.max_tokens, **said}
