"""The command line under test: in this process (fast) or in one of its own, and the golden files.

``QUANTKIT_UPDATE_GOLDEN=1 python -m pytest tests/cli`` writes the golden files anew; read the difference before keeping it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantkit.cli import run

GOLDEN = Path(__file__).parent / "golden"
UPDATE = bool(os.environ.get("QUANTKIT_UPDATE_GOLDEN"))
MODELS = Path(__file__).parents[1] / "data" / "models"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def _plain_environment() -> dict[str, str]:
    noisy = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH", "COLUMNS", "QUANTKIT_API_KEY")
    return {name: value for name, value in os.environ.items() if name not in noisy} | {"NO_COLOR": "1"}


@pytest.fixture
def environment() -> dict[str, str]:
    """This environment without what makes programs colour or widen their output."""
    return _plain_environment()


@pytest.fixture
def command() -> list[str]:
    """How to start quantkit in a process of its own."""
    return [sys.executable, "-m", "quantkit"]


@pytest.fixture
def spawn(command: list[str], environment: dict[str, str]) -> Callable[..., Result]:
    """quantkit in a process of its own, with no terminal."""

    def call(*arguments: str, **more: str) -> Result:
        line = [*command, *(str(argument) for argument in arguments)]
        done = subprocess.run(
            line, check=False, capture_output=True, text=True, env=environment | more, timeout=120, stdin=subprocess.DEVNULL
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def models() -> Path:
    """The directory of the tiny trained models."""
    return MODELS


@pytest.fixture
def quantkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """quantkit in this process, 100 columns wide and without colour."""
    for name in set(os.environ) - set(_plain_environment()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


def _normal(text: str) -> str:
    """Help or error text without what another typer may draw otherwise: types beside arguments, braces, padding."""
    text = re.sub(r"\{(\w+)\}", r"\1", text)
    text = re.sub(r"^(  [A-Z]+) <\w+>", r"\1", text, flags=re.MULTILINE)
    lines = [re.sub(r"(?<=\S) {2,}", "  ", line.rstrip()) for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text, made normal, with a golden file; or write the file when goldens are being updated."""

    def check(name: str, text: str) -> None:
        path, text = GOLDEN / name, _normal(text)
        if UPDATE:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"no golden file {path.name}; see {Path(__file__).name} for how to write it"
        assert text == path.read_text(encoding="utf-8")

    return check
