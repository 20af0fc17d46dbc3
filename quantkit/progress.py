"""How long work reports that it moves: one callable, so that nothing below the command line draws anything."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: the stage's name and how many of its units are done."""
BYTES = frozenset({"weights"})
"""The stages whose units are bytes: what is shown of them is an amount and a rate."""


def silent(stage: str, done: int, total: int) -> None:
    """A Progress that says nothing."""
