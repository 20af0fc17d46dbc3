"""The library of the CUDA kernels: where it is looked for, what names it, and every way in which building or loading it goes wrong."""

from __future__ import annotations

import _ctypes
import os
import shutil
from pathlib import Path

import pytest

from quantkit.errors import InputError, MachineError
from quantkit.ops import cuda_library
from quantkit.ops.cuda_library import build_library, cache_folder, find_compiler, find_library, library_name, load_library

COMPILES = """
[ "$1" = --build ] || exit 0
echo "[1/2] Building x"
echo "[2/2] Linking"
/bin/mkdir -p "$2"
echo "a library" > "$2/libquantkit.so"
"""
"""What a cmake does that finds nothing wrong."""


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the sources, a cache and a home of this test alone, and no CUDA."""
    folder = tmp_path / "kernels"
    for name in cuda_library.source_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(cuda_library.source_folder() / name, folder / name)
    monkeypatch.setattr(cuda_library, "source_folder", lambda: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(cuda_library.VARIABLE, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python" / "python"))
    monkeypatch.delenv("CMAKE_BUILD_PARALLEL_LEVEL", raising=False)
    return folder


def program(path: Path, script: str) -> Path:
    """A program that does what ``script`` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def nvcc(tmp_path: Path, script: str = "exit 0") -> Path:
    """A compiler in ``CUDA_HOME``."""
    return program(tmp_path / "cuda" / "bin" / "nvcc", script)


def tools(tmp_path: Path, script: str) -> None:
    """nvcc, ninja, and a cmake that does what ``script`` says."""
    nvcc(tmp_path)
    program(tmp_path / "bin" / "ninja", "exit 0")
    program(tmp_path / "bin" / "cmake", script)


def test_the_sources_are_found_here() -> None:
    names = cuda_library.source_files()
    assert {"CMakeLists.txt", "ggml/encode.cu", "ggml/searches.cuh"} <= set(names)
    assert not {"README.md", "ggml/host.cpp"} & set(names)
    assert not [name for name in names if name.startswith("build/")]


def test_missing_sources_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "DESCRIPTION", "none.txt")
    with pytest.raises(MachineError, match=r"^kernels: none.txt is missing, expected the CUDA sources in ") as caught:
        cuda_library.source_folder()
    assert caught.value.hint == "install quantkit again"


def test_the_name_is_of_the_sources_and_options(sources: Path) -> None:
    name = library_name()
    assert name.startswith("libquantkit-")
    (sources / "ggml" / "host.cpp").write_text("// no part of the library\n")
    (sources / "build").mkdir()
    (sources / "build" / "x.cu").write_text("// nor what was built\n")
    assert library_name() == name
    names = {name}
    for file in ("ggml/searches.cuh", "CMakeLists.txt"):
        (sources / file).write_text((sources / file).read_text() + "\n")
        names.add(library_name())
    (sources / "new").mkdir()
    (sources / "new" / "new.cu").write_text("// another\n")
    assert len({*names, library_name()}) == 4


def test_search_order(monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path) -> None:
    assert find_library() is None
    places = (cache_folder() / library_name(), sources / "build" / library_name(), tmp_path / "given.so")
    assert places[0].parent == tmp_path / "cache" / "quantkit"
    for place in places[:2]:
        place.parent.mkdir(parents=True)
        place.touch()
        assert find_library() == place
    places[2].touch()
    monkeypatch.setenv(cuda_library.VARIABLE, str(places[2]))
    assert find_library() == places[2]


def test_a_library_of_other_sources_is_not_taken(sources: Path) -> None:
    built = cache_folder() / library_name()
    built.parent.mkdir(parents=True)
    built.touch()
    (sources / "ggml" / "encode.cu").write_text("// another\n")
    assert find_library() is None


def test_a_name_of_no_file_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cuda_library.VARIABLE, str(tmp_path))
    with pytest.raises(MachineError, match=r"^QUANTKIT_KERNELS: .* is not a file, expected a library of quantkit's kernels"):
        find_library()


def test_the_cache_is_in_the_home_without_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "quantkit"


def test_no_home_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(MachineError, match=r"^HOME: is not set"):
        cache_folder()


def test_nvcc_is_taken_from_the_path_first(monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path) -> None:
    assert find_compiler() is None
    in_cuda = nvcc(tmp_path, "exit 0")
    assert find_compiler() == str(in_cuda)
    on_path = tmp_path / "bin" / "nvcc"
    on_path.parent.mkdir()
    shutil.copy(in_cuda, on_path)
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_compiler() == str(on_path)


def test_build(sources: Path, tmp_path: Path) -> None:
    tools(tmp_path, f'echo "$@" >> {tmp_path}/said; {COMPILES}')
    seen: list[tuple[str, int, int]] = []
    built = build_library(cache_folder(), lambda *what: seen.append(what))
    assert built == cache_folder() / library_name() == find_library()
    assert built.read_text() == "a library\n"
    assert [path.name for path in built.parent.iterdir()] == [built.name]
    configure, build = (tmp_path / "said").read_text().splitlines()
    assert configure.startswith(f"-S {sources} -B {cache_folder()}/.build-")
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path}/cuda/bin/nvcc" in configure.split()
    assert "QUANTKIT" not in configure
    assert build.split()[0] == "--build"
    assert build.split()[-2:] == ["--parallel", str(len(os.sched_getaffinity(0)))]
    assert seen == [("configure", 0, 1), ("configure", 1, 1), ("compile", 1, 2), ("compile", 2, 2)]


def test_make_does_without_ninja(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "3")
    tools(tmp_path, f'echo "$@" >> {tmp_path}/said; {COMPILES.replace("[1/2]", "[ 50%]").replace("[2/2]", "[100%]")}')
    (tmp_path / "bin" / "ninja").rename(tmp_path / "bin" / "make")
    seen: list[tuple[str, int, int]] = []
    build_library(cache_folder(), lambda *what: seen.append(what))
    assert "-G Unix Makefiles" in (tmp_path / "said").read_text()
    assert "--parallel" not in (tmp_path / "said").read_text()
    assert seen[2:] == [("compile", 50, 100), ("compile", 100, 100)]


def test_a_wheel_of_cmake_is_found_beside_python(sources: Path, tmp_path: Path) -> None:
    tools(tmp_path, COMPILES)
    (tmp_path / "bin").rename(tmp_path / "python")
    assert build_library(cache_folder()).is_file()


def test_a_report_is_of_one_architecture(sources: Path, tmp_path: Path) -> None:
    tools(tmp_path, f'echo "$@" >> {tmp_path}/said; {COMPILES}')
    made, said = cuda_library.compile_report(tmp_path / "report", "90a-real")
    assert made.read_text() == "a library\n"
    assert said == "[1/2] Building x\n[2/2] Linking"
    assert "-DQUANTKIT_REPORT=ON -DQUANTKIT_ARCHITECTURES=90a-real" in (tmp_path / "said").read_text()


TOOLS = {
    "nvcc": ("nvcc: is not installed, expected a CUDA toolkit, 12 or later", "put nvcc on the PATH, or set CUDA_HOME"),
    "cmake": ("cmake: is not installed, expected CMake 3.22 or later", "pip install cmake"),
    "ninja": ("ninja: is not installed, expected ninja or make", "pip install ninja"),
}


@pytest.mark.parametrize("missing", TOOLS)
def test_a_missing_tool_is_one_error(missing: str, sources: Path, tmp_path: Path) -> None:
    tools(tmp_path, COMPILES)
    (tmp_path / ("cuda/bin" if missing == "nvcc" else "bin") / missing).unlink()
    with pytest.raises(MachineError) as caught:
        build_library(cache_folder())
    assert (caught.value.line, caught.value.hint) == TOOLS[missing]
    assert not cache_folder().exists()


FAILURES = {
    "first error": (
        "echo '[1/2] Building'; echo 'x.cu(1): warning: odd' >&2; echo ' x.cu(3): error: bad' >&2; echo 'y: error: worse' >&2; exit 2",
        "x.cu(3): error: bad",
    ),
    "fatal": ("echo 'nvcc fatal   : Unsupported gpu architecture' >&2; exit 1", "nvcc fatal   : Unsupported gpu architecture"),
    "cmake's own": (
        "echo 'CMake Error at CMakeLists.txt:7 (project):'; echo; echo '  No CUDA toolset found.'; exit 1",
        "No CUDA toolset found.",
    ),
    "other words": ("echo 'Killed' >&2; exit 137", "Killed"),
    "silent": ("exit 3", "exit 3"),
    "no file": ("echo fine", "fine"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_build_that_fails(case: str, sources: Path, tmp_path: Path) -> None:
    script, said = FAILURES[case]
    tools(tmp_path, script)
    with pytest.raises(MachineError) as caught:
        build_library(cache_folder())
    assert caught.value.line == f"nvcc: cannot build the kernels: {said}, expected a CUDA toolkit, 12 or later, and its C++ compiler"
    assert list(cache_folder().iterdir()) == []


def test_cmake_that_does_not_run(sources: Path, tmp_path: Path) -> None:
    tools(tmp_path, COMPILES)
    (tmp_path / "bin" / "cmake").write_bytes(b"\x7fELF no program")
    with pytest.raises(MachineError, match=r"^cmake: cannot be started"):
        build_library(cache_folder())


def test_a_cache_that_cannot_be_made_is_an_error_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path
) -> None:
    tools(tmp_path, f"echo > {tmp_path}/ran; {COMPILES}")
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.raises(InputError, match=r"cache/quantkit: cannot make the directory|cache: is not a directory"):
        build_library(cache_folder())
    assert not (tmp_path / "ran").exists()


def test_a_cache_that_cannot_be_written_is_an_error_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path
) -> None:
    tools(tmp_path, f"echo > {tmp_path}/ran; {COMPILES}")

    def refuse(prefix: str, dir: Path) -> None:  # noqa: A002  tempfile's own word; a mode would not stop root
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(InputError) as caught:
        build_library(cache_folder())
    assert caught.value.line == f"{cache_folder()}: cannot write in it (Permission denied), expected a path that can be used"
    assert not (tmp_path / "ran").exists()


def test_load_says_why_not(monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=f"^CUDA kernels: are not built, expected {library_name()} in {cache_folder()}$"):
        load_library()
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    monkeypatch.setenv(cuda_library.VARIABLE, str(broken))
    with pytest.raises(MachineError, match=r"broken.so: cannot be loaded \(.*\), expected a library built on this machine") as caught:
        load_library()
    assert caught.value.hint == "quantkit doctor --build-kernels"


def test_the_interface_is_the_header_s() -> None:
    assert f"#define QK_INTERFACE {cuda_library.INTERFACE} " in (cuda_library.source_folder() / "quantkit.h").read_text()


def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_library.VARIABLE, _ctypes.__file__)  # a library, but none of ours
    with pytest.raises(MachineError, match="is of another version, expected a library of this version of quantkit"):
        load_library()


def test_every_file_that_a_source_includes_names_the_library() -> None:
    """Else a library of older sources would be taken for one of these."""
    folder, files = cuda_library.source_folder(), set(cuda_library.source_files())
    for name in sorted(files):
        for line in (folder / name).read_text().splitlines():
            if line.startswith('#include "'):
                included = line.split('"')[1]
                assert {included, os.path.normpath(Path(name).parent / included)} & files, f"{name} includes {included}"
