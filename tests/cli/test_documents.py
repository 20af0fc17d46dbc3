"""Every command line that the documents and the help show is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from quantkit.cli.app import app

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^(?:\$ )?quantkit +([a-z].*)$", re.MULTILINE)


def shown() -> list[tuple[str, str]]:
    """(document, command line without ``quantkit`` and comment) of every line that a reader could copy."""
    found = [(name, line) for name in DOCUMENTS for block in FENCED.findall((ROOT / name).read_text()) for line in LINE.findall(block)]
    group = typer.main.get_command(app)
    for command in group.commands.values():  # type: ignore[attr-defined]
        found += [("help", line) for line in LINE.findall(re.sub(r"^\s+", "", command.epilog or "", flags=re.MULTILINE))]
    return [(name, line.partition(" # ")[0].partition("  #")[0].strip()) for name, line in found]


def test_the_documents_show_commands() -> None:
    shown_by = {name for name, _ in shown()}
    assert {"README.md", "help"} <= shown_by
    assert len(shown()) > 12


@pytest.mark.parametrize(("document", "line"), shown())
def test_a_command_that_is_shown_is_taken(document: str, line: str) -> None:
    words = shlex.split(line.partition(">")[0])
    group = typer.main.get_command(app)
    context = group.make_context("quantkit", list(words), resilient_parsing=True)
    command, rest = group, words
    while hasattr(command, "get_command"):
        command = command.get_command(context, rest[0])
        assert command is not None, f"{document}: {rest[0]}"
        rest = rest[1:]
    command.make_context(command.name, list(rest), parent=context)
