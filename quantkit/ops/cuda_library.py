"""The shared library of the CUDA sources in ``kernels/``: what it is called, where it is looked for, how it is built and loaded.

``kernels/CMakeLists.txt`` says what is compiled and with which options. This module knows file names, CMake, nvcc and ctypes; no torch,
and none of the functions in the library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

from quantkit import fs
from quantkit.errors import MachineError
from quantkit.progress import Progress, silent

VARIABLE = "QUANTKIT_KERNELS"
"""Environment variable that names a library to use, whatever it was built from."""
DESCRIPTION = "CMakeLists.txt"
SUFFIXES = (".cu", ".cuh", ".h", ".inc", ".txt")
"""Of the files that make the library; others in ``kernels/`` are no part of it."""
INTERFACE = 3
"""QK_INTERFACE of ``kernels/quantkit.h``: of what the functions take that this version calls."""
HINT = "quantkit doctor --build-kernels"
TOOLKIT = "a CUDA toolkit, 12 or later"
MAX_BYTES = 256 << 20
_STEP = re.compile(r"\[ *(\d+)(?:/(\d+)\]|%\])")
"""How far a build is, as ninja says it ([3/12]) and as make does ([ 25%])."""


def source_folder() -> Path:
    """``kernels/`` as it is installed, or beside the package in a checkout. Raises MachineError when it is in neither place."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / DESCRIPTION).is_file():
            return folder
    raise MachineError("kernels", f"{DESCRIPTION} is missing", f"the CUDA sources in {package / 'kernels'}", "install quantkit again")


def cache_folder() -> Path:
    """Where built libraries go: ``quantkit`` in the user's cache directory. Raises MachineError when the user has none."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "quantkit"
    except RuntimeError as error:
        raise MachineError("HOME", "is not set", "a home directory, for its cache", "set XDG_CACHE_HOME") from error


def source_files() -> tuple[str, ...]:
    """The files that the library is made of, as names below ``source_folder()``, sorted."""
    folder = source_folder()
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return tuple(sorted(name.as_posix() for name in found if name.parts[0] != "build"))


def library_name() -> str:
    """The file name of the library that the sources of now give: they, and the options in CMakeLists.txt, are hashed into it."""
    folder, names = source_folder(), source_files()
    found = (os.stat(folder / name) for name in names)
    return f"libquantkit-{_digest(folder, names, tuple((each.st_mtime_ns, each.st_size) for each in found))}.so"


@lru_cache(maxsize=4)
def _digest(folder: Path, names: tuple[str, ...], stamps: tuple[tuple[int, int], ...]) -> str:
    """Of names and bytes. ``stamps``, the files' times and sizes, say whether they must be read anew: each linear asks for the name."""
    digest = hashlib.sha256()
    for name in names:
        data = fs.read_bytes(folder / name, MAX_BYTES)
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def find_library() -> Path | None:
    """The library to load: ``QUANTKIT_KERNELS``, else one in ``build/`` of the sources or in the cache; None when it was not built.

    Raises MachineError when ``QUANTKIT_KERNELS`` names no file.
    """
    given = os.environ.get(VARIABLE)
    if given:
        if not Path(given).is_file():
            raise MachineError(VARIABLE, f"{given} is not a file", "a library of quantkit's kernels", f"unset it, or {HINT}")
        return Path(given)
    name = library_name()
    return next((path for folder in (source_folder() / "build", cache_folder()) if (path := folder / name).is_file()), None)


def find_compiler() -> str | None:
    """nvcc on the path, in ``CUDA_HOME`` or at CUDA's usual place."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def _tool(name: str) -> str | None:
    """A program on the path or beside this Python, where a wheel puts it whether or not its environment is activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def build_library(folder: Path, progress: Progress = silent) -> Path:
    """Compile the sources into ``folder`` on every core; returns the library, which no reader sees half written.

    Raises InputError when ``folder`` cannot be made or written; MachineError when a tool is missing, or with the line that says what went
    wrong.
    """
    target = folder / library_name()
    tools = _tools()
    fs.make_dir(folder)
    with _scratch(folder) as scratch:
        made, _ = _compile(Path(scratch), tools, (), progress)
        fs.write_bytes(target, fs.read_bytes(made, MAX_BYTES))
    return target


def compile_report(folder: Path, architecture: str) -> tuple[Path, str]:
    """Compile for one ``architecture``, such as "90a-real", into ``folder``; returns the library and all that the compiler said.

    ptxas says what each kernel takes. Raises as ``build_library`` does.
    """
    tools = _tools()
    fs.make_dir(folder)
    return _compile(folder, tools, ("-DQUANTKIT_REPORT=ON", f"-DQUANTKIT_ARCHITECTURES={architecture}"), silent)


def _tools() -> tuple[str, str, str | None]:
    """nvcc, cmake, and ninja unless make is to do its work. Raises MachineError for the first that is missing."""
    compiler, cmake, ninja = find_compiler(), _tool("cmake"), _tool("ninja")
    if compiler is None:
        raise MachineError("nvcc", "is not installed", TOOLKIT, "put nvcc on the PATH, or set CUDA_HOME")
    if cmake is None:
        raise MachineError("cmake", "is not installed", "CMake 3.22 or later", "pip install cmake")
    if ninja is None and shutil.which("make") is None:
        raise MachineError("ninja", "is not installed", "ninja or make", "pip install ninja")
    return compiler, cmake, ninja


def _compile(scratch: Path, tools: tuple[str, str, str | None], options: tuple[str, ...], progress: Progress) -> tuple[Path, str]:
    """Configure and build in ``scratch``; returns the library there and what the build said."""
    compiler, cmake, ninja = tools
    generator = ("-G", "Unix Makefiles") if ninja is None else ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
    build = scratch / "build"
    progress("configure", 0, 1)
    configure = (cmake, "-S", str(source_folder()), "-B", str(build), *generator, f"-DCMAKE_CUDA_COMPILER={compiler}", *options)
    _run(configure, "configure", silent)
    progress("configure", 1, 1)
    jobs = () if os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") else ("--parallel", str(len(os.sched_getaffinity(0))))
    said = _run((cmake, "--build", str(build), *jobs), "compile", progress)
    made = build / "libquantkit.so"
    if not made.is_file():
        raise _failure(said.splitlines(), 0)
    return made, said


def _run(command: tuple[str, ...], stage: str, progress: Progress) -> str:
    """Run one step of the build and return what it said; each line that counts steps moves the progress."""
    said: list[str] = []
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line.rstrip("\n"))
                if step := _STEP.match(line):
                    progress(stage, int(step[1]), int(step[2] or 100))
    except OSError as error:
        raise MachineError(Path(command[0]).name, f"cannot be started ({error.strerror or error})", "a program that runs") from error
    if process.returncode:
        raise _failure(said, process.returncode)
    return "\n".join(said)


def _failure(said: Iterable[str], code: int) -> MachineError:
    """The compiler's first line that says error, else what follows CMake's, else the first line."""
    lines = [line.strip() for line in said if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE) and not line.startswith("CMake Error")]
    after = [line for before, line in pairwise(lines) if before.startswith("CMake Error")]
    line = next(iter(errors or after or lines), f"exit {code}")
    return MachineError("nvcc", f"cannot build the kernels: {line:.300}", f"{TOOLKIT}, and its C++ compiler")


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """For the compiler, inside ``folder``: one that cannot be written is an error before the minutes, not after them."""
    try:
        return tempfile.TemporaryDirectory(prefix=".build-", dir=folder)
    except OSError as error:
        raise fs.refusal(error, folder, "write in it") from error


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise MachineError(str(path), f"cannot be loaded ({error})", "a library built on this machine", HINT) from error
    found = getattr(library, "quantkit_interface", None)
    if found is None or found() != INTERFACE:
        raise MachineError(str(path), "is of another version", "a library of this version of quantkit", HINT)
    return library


def load_library() -> ctypes.CDLL:
    """The library, loaded once. Raises MachineError when there is none, or when it cannot be loaded."""
    path = find_library()
    if path is None:
        raise MachineError("CUDA kernels", "are not built", f"{library_name()} in {cache_folder()}", HINT)
    return _load(path)
