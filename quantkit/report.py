"""What a command found, as data: facts, tables, warnings and what to type next; rendered to rich, JSON or Markdown.

Knows no model and no command; commands build Reports, the command line renders them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | None


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
