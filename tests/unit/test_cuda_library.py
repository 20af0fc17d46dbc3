"""The library of the CUDA kernels: where it is looked for, what names it, and every way in which building or loading it goes wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quantkit.errors import InputError, MachineError
from quantkit.ops import cuda_library
from quantkit.ops.cuda_library import build_library, cache_folder, find_compiler, find_library, library_name, load_library

COMPILES = 'while [ "$1" != -o ]; do shift; done; echo "a library" > "$2"'


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the sources, a cache and a home of this test alone, and no CUDA."""
    folder = tmp_path / "kernels"
    shutil.copytree(cuda_library.source_folder() / "ggml", folder / "ggml")
    monkeypatch.setattr(cuda_library, "source_folder", lambda: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(cuda_library.VARIABLE, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return folder


def nvcc(tmp_path: Path, script: str) -> Path:
    """A compiler in ``CUDA_HOME`` that does what ``script`` says."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_sources_are_found_here() -> None:
    folder = cuda_library.source_folder()
    assert sorted(path.name for path in (folder / "ggml").glob("*.cu*")) == ["arithmetic.cuh", "blocks.cuh", "encode.cu", "searches.cuh"]


def test_missing_sources_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "SOURCE", "ggml/none.cu")
    with pytest.raises(MachineError, match=r"^kernels: ggml/none.cu is missing, expected the CUDA sources in ") as caught:
        cuda_library.source_folder()
    assert caught.value.hint == "install quantkit again"


def test_the_name_is_of_the_sources_and_options(monkeypatch: pytest.MonkeyPatch, sources: Path) -> None:
    name = library_name()
    assert name.startswith("libquantkit-")
    assert name.endswith("-sm80-sm90.so")
    (sources / "ggml" / "host.cpp").write_text("// no part of the library\n")
    assert library_name() == name
    header = sources / "ggml" / "searches.cuh"
    header.write_text(header.read_text() + "\n")
    changed = library_name()
    monkeypatch.setattr(cuda_library, "FLAGS", ("-O1",))
    assert len({name, changed, library_name()}) == 3


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
    nvcc(tmp_path, f'echo "$@" > {tmp_path}/said; {COMPILES}')
    built = build_library(cache_folder())
    assert built == cache_folder() / library_name() == find_library()
    assert built.read_text() == "a library\n"
    assert [path.name for path in built.parent.iterdir()] == [built.name]
    said = (tmp_path / "said").read_text()
    assert said.endswith(f"{sources}/ggml/encode.cu\n")
    for words in ("-fmad=false", "arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"):
        assert words in said.split()
    assert "fast" not in said


def test_nvcc_missing(sources: Path) -> None:
    with pytest.raises(MachineError, match=r"^nvcc: is not installed, expected a CUDA toolkit, 12 or later$") as caught:
        build_library(cache_folder())
    assert caught.value.hint == "put nvcc on the PATH, or set CUDA_HOME"
    assert not cache_folder().exists()


FAILURES = {
    "first error": (
        "echo 'x.cu(1): warning: odd' >&2; echo ' x.cu(3): error: bad' >&2; echo 'y: error: worse' >&2; exit 2",
        "x.cu(3): error: bad",
    ),
    "fatal": ("echo 'nvcc fatal   : Unsupported gpu architecture' >&2; exit 1", "nvcc fatal   : Unsupported gpu architecture"),
    "on stdout": ("echo 'x.cu(3): error: bad'; exit 1", "x.cu(3): error: bad"),
    "other words": ("echo 'Killed' >&2; exit 137", "Killed"),
    "silent": ("exit 3", "exit 3"),
    "no file": ("echo fine", "fine"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_nvcc_failing(case: str, sources: Path, tmp_path: Path) -> None:
    script, said = FAILURES[case]
    nvcc(tmp_path, script)
    with pytest.raises(MachineError) as caught:
        build_library(cache_folder())
    assert caught.value.line == f"nvcc: cannot build the kernels: {said}, expected a CUDA toolkit, 12 or later, and its C++ compiler"
    assert list(cache_folder().iterdir()) == []


def test_nvcc_that_does_not_run(sources: Path, tmp_path: Path) -> None:
    nvcc(tmp_path, "").write_bytes(b"\x7fELF no program")
    with pytest.raises(MachineError, match=r"^nvcc: cannot be started"):
        build_library(cache_folder())


def test_a_cache_that_cannot_be_made_is_an_error_before_nvcc_runs(monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path) -> None:
    nvcc(tmp_path, f"echo > {tmp_path}/ran; {COMPILES}")
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.raises(InputError, match=r"cache/quantkit: cannot make the directory|cache: is not a directory"):
        build_library(cache_folder())
    assert not (tmp_path / "ran").exists()


def test_a_cache_that_cannot_be_written_is_an_error_before_nvcc_runs(
    monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path
) -> None:
    nvcc(tmp_path, f"echo > {tmp_path}/ran; {COMPILES}")

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
