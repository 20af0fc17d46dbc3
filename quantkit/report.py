"""What a command found, as data: facts, tables, warnings and what to type next; and its rendering as JSON and as Markdown.

Knows no model, no command and no terminal; commands build Reports, the command line renders them.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = str | int | float | None

_MARKDOWN = re.compile(r"[\\`*\[\]<>|~]|(?<![^\W_])_+|_+(?![^\W_])")
"""What Markdown takes for its own; an underscore inside a word is none of it, and names of tensors are full of them."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a report. Cells are shown as given: format numbers before they come here."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one command. ``data`` is what ``--json`` prints; the rest is what a person reads."""

    command: str
    data: Mapping[str, Any]
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    warnings: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = field(default=())
    failed: str | None = None
    """Why the command's check said no (exit 1), or None."""
    text: str | None = None
    """A file or a script that a person asked to see, printed as it is."""


def next_step(*words: str | Path) -> str:
    """``quantkit`` and ``words`` as a line that a shell takes as it stands, whatever characters the paths among them have."""
    return shlex.join(["quantkit", *map(str, words)])


def printable(text: str) -> str:
    """``text`` on one line, with everything that is no printable character escaped.

    Names come out of foreign files: an escape sequence among them must not reach a terminal or a log.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def shown(cell: Cell) -> str:
    """A cell as a person reads it."""
    return "-" if cell is None else printable(str(cell))


def _finite(value: Any) -> Any:
    """``value`` with every float that JSON cannot say (NaN, infinities) as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def to_json(report: Report) -> str:
    """The report's data as one JSON document; keys sorted, so that equal data are equal bytes."""
    return json.dumps(_finite(report.data), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _markdown(text: str) -> str:
    """``text`` with what Markdown and HTML would take for their own escaped."""
    escaped = _MARKDOWN.sub(lambda match: "".join(f"\\{c}" for c in match[0]), printable(text).replace("&", "&amp;"))
    # A renderer that allows HTML in Markdown may look at tags before it looks at backslashes.
    return escaped.replace("\\<", "&lt;").replace("\\>", "&gt;")


def _code(text: str) -> str:
    """A command as an inline code span, with a fence longer than any run of backticks in it."""
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{printable(text)}{pad}{fence}"


def _markdown_table(table: Table) -> str:
    numeric = [all(isinstance(row[i], int | float) for row in table.rows) and bool(table.rows) for i in range(len(table.columns))]
    lines = [
        "| " + " | ".join(_markdown(column) for column in table.columns) + " |",
        "| " + " | ".join("---:" if right else "---" for right in numeric) + " |",
        *("| " + " | ".join(_markdown(shown(cell)) for cell in row) + " |" for row in table.rows),
    ]
    title = f"## {_markdown(table.title)}\n\n" if table.title else ""
    return title + "\n".join(lines)


def to_markdown(report: Report) -> str:
    """The whole report as a Markdown document."""
    parts = [f"# quantkit {_markdown(report.command)}"]
    if report.failed is not None:
        parts.append(f"**Failed:** {_markdown(report.failed)}")
    if report.facts:
        parts.append("\n".join(f"- **{_markdown(name)}**: {_markdown(value)}" for name, value in report.facts))
    if report.text is not None:
        parts.append("\n".join(f"    {printable(line)}" for line in report.text.splitlines()))
    parts += [_markdown_table(table) for table in report.tables]
    if report.warnings:
        parts.append("## Warnings\n\n" + "\n".join(f"- {_markdown(warning)}" for warning in report.warnings))
    if report.next_steps:
        parts.append("## Next\n\n" + "\n".join(f"- {_code(step)}" for step in report.next_steps))
    return "\n\n".join(parts) + "\n"
