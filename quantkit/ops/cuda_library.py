"""The shared library of the CUDA sources in ``kernels/``: what it is called, where it is looked for, how it is built and loaded.

Knows file names, nvcc and ctypes; no torch, and none of the functions in the library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from quantkit import fs
from quantkit.errors import MachineError

VARIABLE = "QUANTKIT_KERNELS"
"""Environment variable that names a library to use, whatever it was built from."""
SOURCE = "ggml/encode.cu"
CAPABILITIES = (80, 90)
"""Compute capabilities that a library has code for; any later GPU compiles the last one's anew when the library is loaded."""
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-shared", "-Xcompiler", "-fPIC")
"""-fmad=false: a fused multiply-add rounds once where ggml rounds twice."""
HINT = "quantkit doctor --build-kernels"
MAX_BYTES = 256 << 20


def source_folder() -> Path:
    """``kernels/`` as it is installed, or beside the package in a checkout. Raises MachineError when it is in neither place."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / SOURCE).is_file():
            return folder
    raise MachineError("kernels", f"{SOURCE} is missing", f"the CUDA sources in {package / 'kernels'}", "install quantkit again")


def cache_folder() -> Path:
    """Where built libraries go: ``quantkit`` in the user's cache directory. Raises MachineError when the user has none."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "quantkit"
    except RuntimeError as error:
        raise MachineError("HOME", "is not set", "a home directory, for its cache", "set XDG_CACHE_HOME") from error


def _targets() -> tuple[str, ...]:
    last = CAPABILITIES[-1]
    machine = [f"arch=compute_{each},code=sm_{each}" for each in CAPABILITIES]
    return tuple(word for target in (*machine, f"arch=compute_{last},code=compute_{last}") for word in ("-gencode", target))


def library_name() -> str:
    """The file name of the library that the sources and options of now give: both are hashed into it."""
    folder = (source_folder() / SOURCE).parent
    digest = hashlib.sha256("\0".join((*FLAGS, *_targets())).encode())
    for path in sorted(each for each in folder.iterdir() if each.suffix in (".cu", ".cuh")):
        data = fs.read_bytes(path, MAX_BYTES)
        digest.update(f"\0{path.name}\0{len(data)}\0".encode() + data)
    return f"libquantkit-{digest.hexdigest()[:16]}-{'-'.join(f'sm{each}' for each in CAPABILITIES)}.so"


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


def build_library(folder: Path) -> Path:
    """Compile the sources into ``folder``, about a minute; returns the library, which no reader sees half written.

    Raises InputError when ``folder`` cannot be made or written; MachineError when nvcc is missing, or with its first line that says error.
    """
    compiler = find_compiler()
    if compiler is None:
        raise MachineError("nvcc", "is not installed", "a CUDA toolkit, 12 or later", "put nvcc on the PATH, or set CUDA_HOME")
    target = folder / library_name()
    fs.make_dir(folder)
    with _scratch(folder) as scratch:
        made = Path(scratch) / "library.so"
        command = [compiler, *FLAGS, *_targets(), "-o", str(made), str(source_folder() / SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise MachineError("nvcc", f"cannot be started ({error.strerror or error})", "a compiler that runs") from error
        if done.returncode or not made.is_file():
            lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            said = next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[0] if lines else f"exit {done.returncode}")
            raise MachineError("nvcc", f"cannot build the kernels: {said:.300}", "a CUDA toolkit, 12 or later, and its C++ compiler")
        fs.write_bytes(target, fs.read_bytes(made, MAX_BYTES))
    return target


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """For the compiler, inside ``folder``: one that cannot be written is an error before the minute, not after it."""
    try:
        return tempfile.TemporaryDirectory(prefix=".build-", dir=folder)
    except OSError as error:
        raise fs.refusal(error, folder, "write in it") from error


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MachineError(str(path), f"cannot be loaded ({error})", "a library built on this machine", HINT) from error


def load_library() -> ctypes.CDLL:
    """The library, loaded once. Raises MachineError when there is none, or when it cannot be loaded."""
    path = find_library()
    if path is None:
        raise MachineError("CUDA kernels", "are not built", f"{library_name()} in {cache_folder()}", HINT)
    return _load(path)
