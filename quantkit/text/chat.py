"""Chat messages to the prompt that a model was trained on: its own template, rendered in the sandbox.

Knows messages and templates; knows no server and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import InputError
from quantkit.text.sandbox import render
from quantkit.text.tokenizer import Tokenizer

MAX_DEPTH = 32
PART_SEPARATOR = "\n"
"""Between the text parts of one message: most templates take a message's content as one string."""


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """The prompt for ``messages`` (``role``, ``content`` and whatever else the template reads); encode it without special tokens added.

    ``content`` is a string, or a list of ``{"type": "text", "text": ...}`` parts, which are joined by line breaks.
    Raises InputError when there is no template, a message is malformed, or the template refuses it or goes over its limits.
    """
    if tokenizer.chat_template is None:
        hint = "give the prompt as text (completions), or add a chat_template.jinja to the directory"
        raise InputError("chat template", "the model has none", "a model with a chat template", hint)
    if not messages:
        raise InputError("messages", "is empty", "at least one message")
    values = {
        **tokenizer.special_tokens,
        "messages": [_message(message, f"messages[{index}]") for index, message in enumerate(messages)],
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    return render(tokenizer.chat_template, values, "chat template")


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(where, "has no role", "an object with a role and content")
    plain = {str(key): _plain(value, f"{where}.{key}", MAX_DEPTH) for key, value in message.items() if key != "content"}
    return plain if "content" not in message else {**plain, "content": _content(message["content"], f"{where}.content")}


def _content(content: object, where: str) -> str | None:
    """The text of a message. Raises InputError for a part that is no text: the runtime has no other input."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(where, f"is {type(content).__name__}", "a string, or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"{where}[{index}]", f"is a part of type {kind!r:.100}", '{"type": "text", "text": "..."}')
        texts.append(text)
    return PART_SEPARATOR.join(texts)


def _plain(value: object, where: str, depth: int) -> Any:
    """``value`` rebuilt from plain types, so that a template meets nothing with methods of its own."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth and isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, (list, tuple)):
        return [_plain(item, where, depth - 1) for item in value]
    raise InputError(where, f"holds {type(value).__name__}" if depth else f"is nested more than {MAX_DEPTH} deep", "JSON data")
