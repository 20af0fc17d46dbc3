"""Every CUDA source compiles for Hopper, no kernel spills more than it may, no wgmma is serialized, and every function that a header
declares is there.

Needs nvcc and no GPU: about eight minutes of one core.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from quantkit.ops.cuda_library import compile_report, find_compiler, source_files, source_folder

PROPERTIES = re.compile(
    r"Function properties for (\w+)\s*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", re.MULTILINE
)
SERIALIZED = re.compile(r"^.*wgmma.*serialized.*$", re.MULTILINE)
DECLARED = re.compile(r"^(?:int|const char\*) (quantkit_\w+)\(", re.MULTILINE)
SPILLS = {"WithLowsILi2E": 32, "decode8multiply": 160, "prefill_kernel": 160}
"""Part of a kernel's name, and the most bytes that it may spill: what these hold is bounded by registers, and measured as it is."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    if find_compiler() is None:
        pytest.skip("no nvcc: a CUDA toolkit is not installed")
    return compile_report(tmp_path_factory.mktemp("compiled"), "90a-real")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_kernel_spills_more_than_it_may(report: tuple[Path, str]) -> None:
    found = PROPERTIES.findall(report[1])
    assert len(found) > 300
    allowed = [max((most for part, most in SPILLS.items() if part in each[0]), default=0) for each in found]
    assert [each for each, most in zip(found, allowed, strict=True) if int(each[2]) > most] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_wgmma_is_serialized(report: tuple[Path, str]) -> None:
    assert SERIALIZED.findall(report[1]) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_library_has_every_function_of_its_headers(report: tuple[Path, str]) -> None:
    library = ctypes.CDLL(str(report[0]))
    folder = source_folder()
    names = [name for path in source_files() if path.endswith(".h") for name in DECLARED.findall((folder / path).read_text())]
    assert {"quantkit_matmul", "quantkit_silu_mul", "quantkit_bench_read"} <= set(names)
    assert [name for name in names if not hasattr(library, name)] == []
