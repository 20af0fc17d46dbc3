"""``quantkit doctor``: what this machine has for quantkit, and the CUDA kernels, built on request."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from quantkit.ops.cuda_library import build_library, cache_folder, find_compiler, find_library, library_name
from quantkit.progress import Progress, silent
from quantkit.report import Report, Table, next_step


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """``build_kernels``: compile the CUDA kernels, unless a library of them is there."""

    build_kernels: bool = False


def run(options: DoctorOptions, progress: Progress = silent) -> Report:
    """Report processors, GPUs, nvcc and the library of CUDA kernels, which is built first where ``options`` ask for it.

    Raises MachineError when it cannot be built, or when ``QUANTKIT_KERNELS`` names no file; InputError for a cache folder that cannot be
    used.
    """
    library = find_library()
    if options.build_kernels and library is None:
        library = build_library(cache_folder(), progress)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(i) for i in range(count)]
    devices = [{"name": each.name, "capability": f"{each.major}.{each.minor}", "bytes": each.total_memory} for each in found]
    compiler = find_compiler()
    facts = (
        ("processors", str(os.cpu_count())),
        ("torch", torch.__version__),
        ("GPUs", str(count)),
        ("nvcc", compiler or "not installed"),
        ("CUDA kernels", str(library) if library else "not built"),
    )
    rows = tuple((i, each.name, f"{each.major}.{each.minor}", f"{each.total_memory / 2**30:.1f} GiB") for i, each in enumerate(found))
    return Report(
        command="doctor",
        data={
            "processors": os.cpu_count(),
            "torch": torch.__version__,
            "devices": devices,
            "nvcc": compiler,
            "kernels": {"name": library_name(), "path": str(library) if library else None},
        },
        facts=facts,
        tables=(Table("GPUs", ("GPU", "name", "compute capability", "memory"), rows),) if rows else (),
        next_steps=(next_step("doctor", "--build-kernels"),) if count and compiler and not library else (),
    )
