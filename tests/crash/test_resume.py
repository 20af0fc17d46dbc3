"""quantize is killed with SIGKILL, or the disk fills up: nothing is lost, and the artifact comes out the same."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.journal import read_journal
from quantkit.commands.quantize import run
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.errors import InputError, MachineError

MODEL = Path(__file__).parent.parent / "data" / "models" / "llama"
UNITS = 5
"""Four blocks and what is outside them."""
PATIENCE = 120.0
QUICK = "method: awq\ngroup_size: 64\ncalibration: {samples: 4, seq_len: 64}\noptions: {scale_points: 3}\n"
SCRIPT = """
import sys
from pathlib import Path
from quantkit.commands.quantize import run
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.errors import QuantkitError
path, out, recipe, resume = sys.argv[1:]
try:
    run(QuantizeOptions(path, Path(out), recipe=Path(recipe), device="cpu", resume=resume == "resume"))
except QuantkitError as exc:
    print("error:", exc.line, file=sys.stderr)
    sys.exit(exc.exit_code)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
"""One thread: the thread count is part of what a resumed run compares, and the processes here are many."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(QUICK)
    return path


def start(out: Path, recipe: Path, *, resume: bool = False, path: Path = MODEL) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(path), str(out), str(recipe), "resume" if resume else ""]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert finish(start(out, recipe)) == (0, "")
    return out


def committed(out: Path) -> int:
    """How many units the journal holds now; -1 before there is one."""
    found = read_journal(out.with_name(f"{out.name}.partial") / "journal")
    return -1 if found is None else len(found.units)


def kill_after(out: Path, recipe: Path, units: int) -> int:
    """Start a run, kill it as soon as ``units`` units are committed; how many were when it was dead."""
    process = start(out, recipe)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and committed(out) < units:
        assert time.monotonic() < deadline, "the run does not move"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return committed(out)


@pytest.mark.parametrize("units", [0, 2])
def test_killed_and_resumed_it_is_the_artifact_of_an_undisturbed_run(tmp_path: Path, recipe: Path, undisturbed: Path, units: int) -> None:
    out = tmp_path / "out"
    done = kill_after(out, recipe, units)
    assert units <= done < UNITS and not out.exists()
    assert finish(start(out, recipe, resume=True)) == (0, "")
    assert (out / "SHA256SUMS").read_bytes() == (undisturbed / "SHA256SUMS").read_bytes()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    assert os.listdir(tmp_path) == ["out"], "nothing is left beside it"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The path of a run that was killed after its first block; every test below leaves it as it is."""
    out = tmp_path_factory.mktemp("killed") / "out"
    assert 1 <= kill_after(out, recipe, 1) < UNITS
    return out


def left_by(out: Path) -> list[str]:
    """The names of what a run left, but for the lock: a dead process left that too, and the next one takes it away."""
    return sorted(path.name for path in out.parent.rglob("*") if path.suffix != ".lock")


pytestmark = pytest.mark.usefixtures("one_thread")


def options(out: Path, recipe: Path, **changes: Any) -> QuantizeOptions:
    return QuantizeOptions(**{"path": str(MODEL), "out": out, "recipe": recipe, "device": "cpu", "resume": True, **changes})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"group_size": 128}, r"recipe\.group_size: was 64 when the work began and is 128 now"),
        ({"sym": True}, r"recipe\.sym: was None when the work began and is True now"),
        ({"override": ("v_proj:keep",)}, r"recipe\.overrides: was \[\] when"),
        ({"method": "rtn"}, r"unknown option 'scale_points'"),
        ({"samples": 5}, r"calibration\.shape: was \[4, 64\] when the work began and is \[5, 64\] now"),
        ({"calib": str(MODEL / "tokenizer.json")}, r"calibration\.source: was 'builtin' when the work began and is 'text sha256:"),
    ],
)
def test_another_recipe_or_calibration_is_refused_by_its_field(killed: Path, recipe: Path, changes: dict[str, Any], field: str) -> None:
    before = left_by(killed)
    with pytest.raises(InputError, match=field):
        run(options(killed, recipe, **changes))
    assert left_by(killed) == before


def test_another_source_is_refused_by_its_field(tmp_path: Path, killed: Path, recipe: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in MODEL.iterdir():
        data = bytearray(file.read_bytes())
        if file.name == "model.safetensors":
            data[-2] ^= 1
        (source / file.name).write_bytes(data)
    with pytest.raises(InputError, match=r"source\.fingerprint: was '[0-9a-f]{64}' when the work began"):
        run(options(killed, recipe, path=str(source)))


def test_another_thread_count_is_refused_by_its_field(killed: Path, recipe: Path) -> None:
    import torch

    torch.set_num_threads(2)
    try:
        with pytest.raises(InputError, match=r"threads: was 1 when the work began and is 2 now"):
            run(options(killed, recipe))
    finally:
        torch.set_num_threads(1)


def test_what_was_left_is_neither_lost_nor_continued_unasked(killed: Path, recipe: Path) -> None:
    with pytest.raises(InputError, match="an unfinished run left it") as caught:
        run(options(killed, recipe, resume=False))
    assert caught.value.hint == "--resume continues it, --overwrite starts over"
    assert committed(killed) >= 1


def test_an_output_that_exists_is_not_touched(undisturbed: Path, recipe: Path) -> None:
    before = (undisturbed / "SHA256SUMS").stat().st_mtime_ns
    for resume in (False, True):
        with pytest.raises(InputError, match="exists, expected a path that does not exist"):
            run(options(undisturbed, recipe, resume=resume))
    assert (undisturbed / "SHA256SUMS").stat().st_mtime_ns == before
    assert os.listdir(undisturbed.parent) == ["out"]


def test_a_second_writer_is_locked_out(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "out"
    process = start(out, recipe)
    try:
        deadline = time.monotonic() + PATIENCE
        while committed(out) < 0:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        code, errors = finish(start(out, recipe, resume=True))
        assert code == 3
        assert errors.startswith("error: ") and "out.lock: is locked: another process is writing this output" in errors
        assert errors.count("\n") == 1
    finally:
        process.send_signal(signal.SIGCONT)
        assert finish(process) == (0, "")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("after", [3, 40])
def test_a_disk_that_fills_up_ends_in_exit_3_and_is_resumable(
    tmp_path: Path, recipe: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out, real, writes = tmp_path / "out", os.write, [0]

    def filling(fd: int, data: Any) -> int:
        writes[0] += 1
        if writes[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    with monkeypatch.context() as patch, pytest.raises(MachineError, match="the disk is full") as caught:
        patch.setattr(os, "write", filling)
        run(options(out, recipe, resume=False))
    assert caught.value.exit_code == 3 and "--resume" in (caught.value.hint or "")
    assert not out.exists() and committed(out) == {3: 0, 40: 1}[after]
    run(options(out, recipe))
    assert (out / "SHA256SUMS").read_bytes() == (undisturbed / "SHA256SUMS").read_bytes()


def test_the_journal_says_what_made_the_bytes(killed: Path) -> None:
    found = read_journal(killed.with_name("out.partial") / "journal")
    assert found is not None
    assert set(found.identity) == {
        "source",
        "recipe",
        "calibration",
        "quantkit",
        "torch",
        "device",
        "devices",
        "compute_dtype",
        "instruction_set",
        "threads",
    }
    assert str(killed) not in json.dumps(dict(found.identity))
