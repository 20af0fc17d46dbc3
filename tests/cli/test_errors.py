"""Every error is one line, an optional hint and the right exit code; the words are in ``golden/errors/``.

``conftest.py`` says how to write them anew.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.commands import version
from quantkit.errors import CheckFailed, InputError, MachineError, QuantkitError, RuntimeDied
from quantkit.report import Report

Run = Callable[..., Any]

USAGE = {
    "unknown command": ["quantise", "a", "b"],
    "unknown command of a group": ["recipe", "check", "a"],
    "unknown option": ["plan", "{model}", "--ranks", "2"],
    "option close to another": ["quantize", "{model}", "{out}", "--overwite"],
    "missing argument": ["quantize", "{model}"],
    "missing option": ["plan", "{model}"],
    "missing value": ["plan", "{model}", "--tp"],
    "argument too many": ["verify", "{model}", "{model}"],
    "no number": ["plan", "{model}", "--tp", "two"],
    "number too small": ["plan", "{model}", "--tp", "0"],
    "value for a flag": ["verify", "{model}", "--deep=1"],
    "quiet and verbose": ["version", "--quiet", "--verbose"],
    "no command": ["--json"],
    "list-methods with a command": ["--list-methods", "version"],
    "divergence below zero": ["report", "{model}", "{model}", "--max-kld", "-1"],
}
INPUT = {
    "missing path": ["plan", "{tmp}/nowhere", "--tp", "2"],
    "no checkpoint": ["plan", "{tmp}/empty", "--tp", "2"],
    "pickled checkpoint": ["plan", "{tmp}/pickled", "--tp", "2"],
    "truncated shard": ["plan", "{tmp}/truncated", "--tp", "2"],
    "path in an index": ["plan", "{tmp}/escaping", "--tp", "2"],
    "tp too large": ["shard", "{model}", "{out}", "--tp", "100000"],
    "output exists": ["shard", "{model}", "{tmp}/empty", "--tp", "2"],
    "unknown method": ["quantize", "{model}", "{out}", "--method", "magic"],
    "no method": ["quantize", "{model}", "{out}"],
    "too many bits": ["quantize", "{model}", "{out}", "--method", "rtn", "--bits", "5"],
    "group of zero": ["quantize", "{model}", "{out}", "--method", "rtn", "--group-size", "0"],
    "group that does not divide": ["quantize", "{model}", "{out}", "--method", "rtn", "--group-size", "96"],
    "bad override": ["quantize", "{model}", "{out}", "--method", "rtn", "--override", "down_proj"],
    "devices of a CPU": ["quantize", "{model}", "{out}", "--method", "rtn", "--device", "cpu", "--devices", "2"],
    "no size": ["quantize", "{model}", "{out}", "--method", "rtn", "--max-shard-size", "5 apples"],
    "bits without a method": ["plan", "{model}", "--tp", "2", "--bits", "4"],
    "unknown format of a product": ["bench", "kernels", "--format", "q9"],
    "unknown shape of a product": ["bench", "kernels", "--shape", "12x0"],
    "table without tuning": ["bench", "kernels", "--table", "t.json"],
    "no recipe": ["quantize", "{model}", "{out}", "--recipe", "nothing"],
    "unknown field of a recipe": ["recipe", "validate", "{tmp}/field.yaml"],
    "unknown option of a method": ["recipe", "validate", "{tmp}/option.yaml"],
    "unknown method of a recipe": ["recipe", "validate", "{tmp}/method.yaml"],
    "impossible bits of a recipe": ["recipe", "validate", "{tmp}/bits.yaml"],
    "recipe that is no YAML": ["recipe", "validate", "{tmp}/broken.yaml"],
    "recipe that exists": ["recipe", "init", "{tmp}/field.yaml"],
    "percentage or factor": ["report", "{model}", "{model}", "--max-ppl-increase", "5"],
    "no percentage": ["report", "{model}", "{model}", "--max-ppl-increase", "much"],
    "plan for groups of zero": ["plan", "{model}", "--tp", "2", "--method", "awq", "--group-size", "0"],
    "gguf by another name": ["quantize", "{model}", "{out}", "--method", "gguf"],
    "gguf beside a method": ["quantize", "{model}", "{out}.gguf", "--method", "gguf,awq"],
    "gguf of bits": ["quantize", "{model}", "{out}.gguf", "--method", "gguf", "--bits", "4"],
    "gguf of an unknown type": ["quantize", "{model}", "{out}.gguf", "--method", "gguf", "--type", "q4"],
    "gguf without a matrix": ["quantize", "{model}", "{out}.gguf", "--method", "gguf", "--type", "q2_k_s"],
    "gguf with a matrix that is none": ["quantize", "{model}", "{out}.gguf", "--method", "gguf", "--imatrix", "{tmp}/empty/notes.txt"],
    "tensor type that is no pair": ["quantize", "{model}", "{out}.gguf", "--method", "gguf", "--tensor-type", "ffn_down"],
    "tensor type of no tensor": ["quantize", "{model}", "{out}.gguf", "--method", "gguf", "--tensor-type", "ffn_dwon=q6_k"],
    "type without gguf": ["quantize", "{model}", "{out}", "--method", "awq", "--type", "q4_k_m"],
    "blocks of bits": ["quantize", "{model}", "{out}.gguf", "--method", "awq", "--format", "q4_k_m", "--bits", "4"],
    "blocks of a method that makes none": ["quantize", "{model}", "{out}.gguf", "--method", "rtn", "--format", "q4_k_m"],
    "blocks of floats": ["quantize", "{model}", "{out}.gguf", "--method", "awq", "--format", "f16"],
    "blocks with a matrix": ["quantize", "{model}", "{out}.gguf", "--method", "gptq", "--format", "q4_k_m", "--imatrix", "i.gguf"],
    "convert to the unknown": ["convert", "{model}", "{out}", "--to", "onnx"],
    "convert blocks to a dtype": ["convert", "{model}", "{out}", "--to", "blocks", "--dtype", "float16"],
    "convert to blocks of nothing": ["convert", "{model}", "{out}", "--to", "blocks"],
    "convert with a pre-tokenizer": ["convert", "{model}", "{out}", "--pre-tokenizer", "gpt-2"],
    "no gpu memory": ["plan", "{model}", "--tp", "2", "--gpu-memory", "lots"],
}


@pytest.fixture
def places(tmp_path: Path, models: Path) -> dict[str, str]:
    """A good model and what is wrong beside it."""
    model = models / "llama"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing here")
    for name in ("pickled", "truncated", "escaping"):
        (tmp_path / name).mkdir()
        shutil.copy(model / "config.json", tmp_path / name)
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    weights = (model / "model.safetensors").read_bytes()
    (tmp_path / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "stray.safetensors").write_bytes(weights)
    (tmp_path / "escaping" / "model-00001-of-00002.safetensors").write_bytes(weights)
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "../stray.safetensors"}}
    (tmp_path / "escaping" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "field.yaml").write_text("method: awq\ngroupsize: 64\n")
    (tmp_path / "option.yaml").write_text("method: awq\noptions:\n  scale_pionts: 5\n")
    (tmp_path / "method.yaml").write_text("method: magic\n")
    (tmp_path / "bits.yaml").write_text("method: rtn\nbits: 5\n")
    (tmp_path / "broken.yaml").write_text("method: [awq\n")
    return {"model": str(model), "tmp": str(tmp_path), "out": str(tmp_path / "out")}


@pytest.mark.parametrize("case", [*USAGE, *INPUT])
def test_error_text(case: str, places: dict[str, str], quantkit: Run, golden: Callable[[str, str], None]) -> None:
    line = (USAGE | INPUT)[case]
    before = sorted(Path(places["tmp"]).rglob("*"))
    result = quantkit(*(word.format(**places) for word in line))
    error, *hint = result.err.splitlines()
    assert result.code == 2
    assert result.out == ""
    assert error.startswith("error: ")
    assert len(hint) <= 1
    assert all(text.startswith("hint: ") for text in hint)
    assert sorted(Path(places["tmp"]).rglob("*")) == before, "something was left"
    typed = " ".join(word.format(tmp="TMP", model="MODEL", out="OUT") for word in line)
    shown = result.err.replace(places["tmp"], "TMP").replace(places["model"], "MODEL")
    golden(f"errors/{case.replace(' ', '-')}.txt", f"$ quantkit {typed}\n{shown}")


@pytest.mark.parametrize(
    "error,code",
    [
        (CheckFailed("x", "is wrong"), 1),
        (InputError("x", "is wrong"), 2),
        (MachineError("x", "is full"), 3),
        (RuntimeDied("x", "died"), 4),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 3),
        (OSError(errno.EMFILE, "Too many open files"), 3),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2),
        (OSError(errno.EACCES, "Permission denied", b"/x"), 2),
        (MemoryError(), 3),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 3),
        (ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn.config"), 3),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_exit_codes(error: BaseException, code: int, quantkit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Report:
        raise error

    monkeypatch.setattr(version, "run", fail)
    result = quantkit("version")
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("interrupted" if code == 130 else "error: ")
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) <= 2


def test_a_gpu_without_memory_is_the_machine(quantkit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail() -> Report:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB.")

    monkeypatch.setattr(version, "run", fail)
    result = quantkit("version")
    assert result.code == 3
    assert result.err.startswith("error: device memory: CUDA out of memory")


def test_missing_extra_names_the_remedy(quantkit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Report:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    monkeypatch.setattr(version, "run", fail)
    assert quantkit("version").err.splitlines()[1] == "hint: pip install 'quantkit[serve]'"


def test_a_bug_leaves_its_traceback_in_a_file(quantkit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> Report:
        raise KeyError("layer\n\x1b[31m9")

    monkeypatch.setattr(version, "run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = quantkit("version", "--json")
    error, hint = result.err.splitlines()
    assert (result.code, result.out) == (70, "")
    assert error.startswith("error: quantkit: a bug in quantkit (KeyError: ")
    assert "\x1b" not in result.err
    written = Path(hint.removeprefix("hint: please report it with "))
    assert written.is_relative_to(tmp_path)
    assert 'raise KeyError("layer' in written.read_text()


def test_a_bug_with_no_place_for_a_file_shows_its_traceback(quantkit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> Report:
        raise KeyError("layer")

    monkeypatch.setattr(version, "run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    result = quantkit("version")
    assert result.code == 70
    assert "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1] == "hint: please report it with the traceback above"


def test_an_error_is_one_line_whatever_the_file_says(quantkit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Report:
        raise InputError("ten\nsor\x1b[2J", "is [bold]odd[/bold]\r", "a\u202ename")

    monkeypatch.setattr(version, "run", fail)
    assert quantkit("version").err == "error: ten sor\\x1b[2J: is [bold]odd[/bold]\\r, expected a\\u202ename\n"


def test_every_branch_of_the_exception_tree_has_its_own_code() -> None:
    branches = QuantkitError.__subclasses__()
    codes = [branch.exit_code for branch in branches if branch.__module__ == QuantkitError.__module__]
    assert sorted(codes) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "command", ["inspect", "plan --tp 2", "verify", "convert OUT", "shard OUT --tp 2", "unshard OUT", "recipe validate"]
)
def test_a_name_that_no_file_can_have_is_the_users(command: str, quantkit: Run, tmp_path: Path) -> None:
    verbs = command.split()
    at = 2 if verbs[0] == "recipe" else 1
    line = [*verbs[:at], "n" * 300, *(str(tmp_path / "out") if word == "OUT" else word for word in verbs[at:])]
    result = quantkit(*line)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: nnn")
    assert ", expected " in result.err.splitlines()[0]


def test_a_directory_that_may_not_be_searched(quantkit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    result = quantkit("inspect", tmp_path / "model")
    assert result.code == 2
    assert result.err == f"error: {tmp_path}/model: cannot look at it (Permission denied), expected a path that can be used\n"
