"""Every CUDA source compiles for Hopper, no kernel spills registers, no wgmma is serialized, and all that quantkit.h declares is there.

Needs nvcc and no GPU.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from quantkit.ops.cuda_library import compile_report, find_compiler, source_folder

PROPERTIES = re.compile(
    r"Function properties for (\w+)\s*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", re.MULTILINE
)
SERIALIZED = re.compile(r"^.*wgmma.*serialized.*$", re.MULTILINE)
DECLARED = re.compile(r"^(?:int|const char\*) (quantkit_\w+)\(", re.MULTILINE)
SPILLS: dict[str, str] = {}
"""Part of a kernel's name and why it may spill."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    if find_compiler() is None:
        pytest.skip("no nvcc: a CUDA toolkit is not installed")
    return compile_report(tmp_path_factory.mktemp("compiled"), "90a-real")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_kernel_spills(report: tuple[Path, str]) -> None:
    found = PROPERTIES.findall(report[1])
    assert len(found) > 40
    assert [each for each in found if int(each[2]) + int(each[3]) and not any(name in each[0] for name in SPILLS)] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_wgmma_is_serialized(report: tuple[Path, str]) -> None:
    assert SERIALIZED.findall(report[1]) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_library_has_every_function_of_its_header(report: tuple[Path, str]) -> None:
    library = ctypes.CDLL(str(report[0]))
    names = DECLARED.findall((source_folder() / "quantkit.h").read_text())
    assert "quantkit_matmul" in names
    assert [name for name in names if not hasattr(library, name)] == []
