"""Thread counts and how threads wait: from made-up machines, and as OpenMP itself reports them once the server has loaded torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.runtime import threads
from quantkit.runtime.threads import cores, thread_variables


def machine(root: Path, siblings: dict[int, str], group: dict[str, str]) -> tuple[Path, Path]:
    """Directories that look like the kernel's: which hardware threads share a core, and the files of a control group."""
    for cpu, listed in siblings.items():
        (root / "cpu" / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (root / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{listed}\n")
    for name, text in group.items():
        (root / "group" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "group" / name).write_text(f"{text}\n")
    return root / "cpu", root / "group"


@pytest.mark.parametrize(
    ("siblings", "group", "expected"),
    [
        ({}, {}, 4),
        ({cpu: str(cpu) for cpu in range(4)}, {"cpu.max": "max 100000"}, 4),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, {}, 2),
        ({}, {"cpu.max": "350000 100000"}, 3),
        ({}, {"cpu.max": "50000 100000"}, 1),
        ({}, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({}, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_cores_are_those_that_are_really_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siblings: dict[int, str], group: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert cores(*machine(tmp_path, siblings, group)) == expected


def test_ranks_share_the_cores_and_the_user_may_ask_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 8)
    assert thread_variables(1, {}) == {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "1000"}
    assert [thread_variables(ranks, {})["OMP_NUM_THREADS"] for ranks in (2, 3, 16)] == ["4", "2", "1"]
    for asked, counts in {"1": "1", "3,1": "3", "5": "4", "64": "4", "0": "4", "many": "4"}.items():
        assert thread_variables(2, {"OMP_NUM_THREADS": asked})["OMP_NUM_THREADS"] == counts
    for own in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}):
        assert thread_variables(2, own) == {"OMP_NUM_THREADS": "4"}


COMMAND = """
import sys
from quantkit.cli import run
assert "torch" not in sys.modules
assert run(sys.argv[1:]) == 2
assert "torch" in sys.modules
"""


def test_the_command_line_decides_before_torch_is_loaded(tmp_path: Path) -> None:
    """OpenMP tells what it goes by."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_"))}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "serve", str(tmp_path / "absent"), "--port", "0"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    told = dict(re.findall(r"(G?OMP_\w+) = '(\w+)'", done.stderr))
    assert told["GOMP_SPINCOUNT"] == "1000" and told["OMP_NUM_THREADS"] == str(cores())
