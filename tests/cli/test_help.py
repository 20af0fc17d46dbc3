"""Every help text, word for word, that its examples are valid, and that help costs nothing.

The texts are in ``golden/``; ``conftest.py`` says how to write them anew.
"""

from __future__ import annotations

import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer

from quantkit.cli.app import app

Run = Callable[..., Any]

COMMANDS = (
    *("inspect", "plan", "convert", "quantize", "imatrix", "pad", "shard", "unshard", "verify", "serve", "report", "doctor", "version"),
    *("generate", "chat"),
)
GROUPS = {"recipe": ("show", "validate", "init"), "bench": ("kernels", "load", "throughput", "latency", "serve", "study")}
PAGES = ("", *COMMANDS, *GROUPS, *(f"{group} {name}" for group, names in GROUPS.items() for name in names))
HEAVY = ("torch", "transformers", "numpy", "pydantic", "rich", "yaml")
HELP_SECONDS = 0.35


@pytest.mark.parametrize("page", PAGES)
def test_help_text(page: str, quantkit: Run, golden: Callable[[str, str], None]) -> None:
    result = quantkit(*page.split(), "--help")
    assert (result.code, result.err) == (0, "")
    golden(f"help/{page.replace(' ', '-') or 'quantkit'}.txt", result.out)


def test_every_command_has_a_golden_page() -> None:
    group = typer.main.get_command(app)
    assert set(group.commands) == {*COMMANDS, *GROUPS}  # type: ignore[attr-defined]
    for name, names in GROUPS.items():
        assert set(group.commands[name].commands) == set(names)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES)
def test_short_and_long_help_are_one(page: str, quantkit: Run) -> None:
    assert quantkit(*page.split(), "-h") == quantkit(*page.split(), "--help")


@pytest.mark.parametrize("page", [page for page in PAGES if page and page not in GROUPS])
def test_every_command_has_a_paragraph_examples_and_the_three_output_options(page: str, quantkit: Run) -> None:
    text = quantkit(*page.split(), "--help").out
    paragraph = text.split("\n\n")[1]
    assert len(paragraph.split()) > 8
    assert all(option in text for option in ("--json", "--quiet", "--verbose"))
    assert _examples(text)


@pytest.mark.parametrize("page", PAGES)
def test_examples_parse(page: str, quantkit: Run) -> None:
    group = typer.main.get_command(app)
    for example in _examples(quantkit(*page.split(), "--help").out):
        words = shlex.split(example.partition(" > ")[0])
        assert words[0] == "quantkit"
        found, rest = group.commands[words[1]], words[2:]  # type: ignore[attr-defined]
        if hasattr(found, "commands"):
            found, rest = found.commands[rest[0]], rest[1:]
        context = found.make_context("quantkit", list(rest))
        assert not context.args


def _examples(text: str) -> list[str]:
    return re.findall(r"^    (quantkit .+)$", text, flags=re.MULTILINE)


def test_bare_quantkit_is_help(quantkit: Run) -> None:
    assert quantkit() == quantkit("--help")
    for group in GROUPS:
        assert quantkit(group) == quantkit(group, "--help")


def test_help_imports_nothing_heavy(environment: dict[str, str]) -> None:
    script = f"""
import sys
from quantkit.cli import run
for page in {PAGES!r}:
    assert run([*page.split(), "--help"]) == 0
print("imported:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.endswith("imported: []\n"), done.stdout[-500:] + done.stderr


def test_help_is_fast(spawn: Run) -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert spawn("quantize", "--help").code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time, and the best of a few: the clock on the wall also counts what else the machine does.
    assert min(seconds() for _ in range(3)) < HELP_SECONDS


def test_completion(spawn: Run) -> None:
    def complete(*words: str) -> Any:
        line = {"COMP_WORDS": " ".join(("quantkit", *words)), "COMP_CWORD": str(len(words))}
        return spawn(_QUANTKIT_COMPLETE="complete_bash", **line).out.split()

    assert complete("pl") == ["plan"]
    assert complete("recipe", "v") == ["validate"]
    assert complete("quantize", "--recipe", "ci") == ["ci-tiny"]
    assert complete("serve", "--device", "c") == ["cpu", "cuda"]
    assert "--max-shard-size" in complete("quantize", "--max")


def test_show_completion_in_a_shell(command: list[str], environment: dict[str, str]) -> None:
    line = shlex.join([*command, "--show-completion"])
    done = subprocess.run(["bash", "-c", f"{line}; exit $?"], check=False, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0
    assert "_QUANTKIT_COMPLETE=complete_bash" in done.stdout
