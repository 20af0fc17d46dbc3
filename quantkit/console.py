"""The terminal: a Report, an error or a progress as text for a person, or as JSON for a program.

Results go to stdout; progress, warnings, what to type next and errors go to stderr. Text that comes from a file is never
read as markup, and its control characters are shown, not sent. Knows no command. rich is imported by what draws.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from quantkit.errors import QuantkitError
from quantkit.progress import BYTES, Progress, silent
from quantkit.report import Report, Table, printable, shown, to_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table as RichTable

UNBROKEN = 1_000_000
"""Width where no one looks at a screen: a line that goes to a file or a pipe is never wrapped."""
LINE_SECONDS = 1.0
"""The least time between two progress lines of one stage where bars cannot be drawn."""


@dataclass(frozen=True, slots=True)
class Output:
    """How the result is shown. ``json``: as data alone. ``quiet``: result and errors only. ``verbose``: progress lines, logs, times."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() or os.environ.get("COLUMNS") else UNBROKEN
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def _table(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    headed = any(table.columns)
    drawn = RichTable(box=box.SIMPLE_HEAD if headed else None, show_header=headed, pad_edge=False, header_style="bold", show_edge=False)
    for i, column in enumerate(table.columns):
        numeric = bool(table.rows) and all(isinstance(row[i], int | float) for row in table.rows)
        drawn.add_column(Text(printable(column)), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(shown(cell)) for cell in row))
    return drawn


def _facts(report: Report) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in report.facts:
        grid.add_row(Text(printable(name)), Text(printable(value)))
    return grid


def _draw(report: Report, console: Console) -> None:
    from rich.text import Text

    apart = report.text is not None
    if report.facts:
        if apart:
            console.print()
        console.print(_facts(report))
        apart = True
    for table in report.tables:
        if apart:
            console.print()
        if table.title:
            console.print(Text(printable(table.title), "bold"))
        console.print(_table(table))
        apart = True


def render(report: Report, output: Output) -> None:
    """Print a report: its result on stdout, warnings, why it failed and what to type next on stderr."""
    if output.json:
        sys.stdout.write(to_json(report))
    else:
        for line in (report.text or "").splitlines():
            sys.stdout.write("\t".join(printable(part) for part in line.split("\t")) + "\n")
        console = _console(sys.stdout)
        if sys.stdout.isatty():
            _draw(report, console)
        else:  # without the spaces that fill a table's last column
            with console.capture() as drawn:
                _draw(report, console)
            sys.stdout.write(re.sub(r" +$", "", drawn.get(), flags=re.MULTILINE))
    sys.stdout.flush()
    if not output.quiet:
        for warning in report.warnings:
            _line("warning", warning, "yellow")
        if report.next_steps and not output.json and report.failed is None:
            _line("next", report.next_steps[0], "green")
            for step in report.next_steps[1:]:
                _line("    ", step, "green")
    if report.failed is not None:
        _line("failed", report.failed, "bold red")


def show_error(error: QuantkitError) -> None:
    """Print an error as one line and, where it has one, its hint as another."""
    _line("error", error.line, "bold red")
    if error.hint:
        _line("hint", error.hint, "cyan")


def note(text: str) -> None:
    """Print one line for the person at the terminal, on stderr."""
    _line("", text, "dim")


def _line(label: str, text: str, style: str) -> None:
    """``label: text`` on stderr; one line however long, for a person may copy it and a program may read it."""
    text = printable(text)
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    mark = f"{label}{':' if label.strip() else ' '} " if label else ""
    if colour:
        from rich.text import Text

        with suppress(OSError):
            _console(sys.stderr).print(Text.assemble((mark, style), text if label else (text, style)), soft_wrap=True)
    else:
        _tell(f"{mark}{text}\n")


def _tell(text: str) -> None:
    """Write to stderr. Where it takes nothing (a full disk, a pipe that no one reads) the exit code still says what happened."""
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


class Conversation:
    """A conversation at the terminal: what is typed comes from stdin, answers go to stdout as they come, all else to stderr.

    What a model says is shown, never obeyed: control characters other than line breaks and tabs are escaped.
    """

    def ask(self) -> str | None:
        """A line; None at the end of the input, and for Ctrl-C."""
        if not sys.stdin.isatty():
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        with suppress(ImportError):
            import readline  # noqa: F401  its import gives input() editing and history
        from rich.text import Text

        try:
            return _console(sys.stdout).input(Text("> ", "bold cyan"))
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return None

    def say(self, text: str) -> None:
        sys.stdout.write("".join(c if c in "\n\t" else printable(c) for c in text))
        sys.stdout.flush()

    def note(self, text: str) -> None:
        note(text)


@contextmanager
def progress(output: Output) -> Iterator[Progress]:
    """A Progress for the length of a command: bars on a terminal, terse lines with ``--verbose`` elsewhere, else nothing."""
    if output.quiet:
        yield silent
    elif sys.stderr.isatty():
        bars = _StageBars()
        try:
            yield bars
        finally:
            bars.stop()
    elif output.verbose:
        yield _StageLines()
    else:
        yield silent


class _StageBars:
    """One bar at a time. The bar of a finished stage is left standing and nothing is live, so that a server may log below it."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._bars: Bars | None = None
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.stop()
        if self._bars is None:
            if done >= total:  # nothing to wait for, or told again that it is over
                return
            self._bars, self._task = self._start(printable(stage), total, stage in BYTES)
            self._stage = stage
        assert self._task is not None
        self._bars.update(self._task, completed=done, total=total)
        if done >= total:
            self.stop()

    @staticmethod
    def _start(stage: str, total: int, of_bytes: bool) -> tuple[Bars, TaskID]:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *((DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        bars = Bars(*columns, console=_console(sys.stderr), redirect_stdout=False, redirect_stderr=False)
        task = bars.add_task(stage, total=total)
        bars.start()
        return bars, task

    def stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = self._stage = None


class _StageLines:
    """A line when a stage begins, when it ends, and at most every ``LINE_SECONDS`` between."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._began = self._last = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._began = now
        if stage != self._stage or done >= total or now - self._last >= LINE_SECONDS:
            amount = f"{done}/{total}" if stage not in BYTES else f"{done / 1e9:.2f}/{total / 1e9:.2f} GB{self._rate(done, now)}"
            _tell(f"{printable(stage)} {amount}\n")
            self._stage, self._last = stage, now

    def _rate(self, done: int, now: float) -> str:
        return f", {done / 1e9 / (now - self._began):.2f} GB/s" if now > self._began else ""
