"""``quantkit doctor``: what it reports with and without a GPU, nvcc and the kernels, and when it builds."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantkit.commands import doctor
from quantkit.commands.doctor import DoctorOptions
from quantkit.errors import MachineError
from quantkit.ops.cuda_library import VARIABLE, library_name
from quantkit.progress import Progress


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache of a machine with nothing: no GPU, no nvcc, no kernels."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("quantkit.ops.cuda_library.library_name", lambda: "libquantkit-test.so")
    monkeypatch.setattr(doctor, "library_name", lambda: "libquantkit-test.so")
    monkeypatch.setattr(doctor, "find_compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "quantkit"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU with nvcc."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=f"GPU number {i}", major=9, minor=0, total_memory=80 << 30)
    )
    monkeypatch.setattr(doctor, "find_compiler", lambda: "/opt/cuda/bin/nvcc")


def test_a_machine_with_nothing(cache: Path) -> None:
    report = doctor.run(DoctorOptions())
    assert report.data == {
        "processors": os.cpu_count(),
        "torch": torch.__version__,
        "devices": [],
        "nvcc": None,
        "kernels": {"name": "libquantkit-test.so", "path": None},
    }
    assert dict(report.facts)["CUDA kernels"] == "not built"
    assert (report.tables, report.next_steps) == ((), ())


def test_a_gpu_without_kernels_is_told_how_to_get_them(cache: Path, gpu: None) -> None:
    report = doctor.run(DoctorOptions())
    assert report.data["devices"] == [{"name": "GPU number 0", "capability": "9.0", "bytes": 80 << 30}]
    assert report.tables[0].rows == ((0, "GPU number 0", "9.0", "80.0 GiB"),)
    assert report.next_steps == ("quantkit doctor --build-kernels",)


def test_kernels_are_built_once(cache: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    built, seen = [], []

    def build(folder: Path, progress: Progress) -> Path:
        built.append(folder)
        progress("compile", 1, 1)
        folder.mkdir()
        path = folder / "libquantkit-test.so"
        path.touch()
        return path

    monkeypatch.setattr(doctor, "build_library", build)
    for _ in range(2):
        report = doctor.run(DoctorOptions(build_kernels=True), lambda *what: seen.append(what))
        assert report.data["kernels"]["path"] == dict(report.facts)["CUDA kernels"] == str(cache / "libquantkit-test.so")
        assert report.next_steps == ()
    assert built == [cache]
    assert seen == [("compile", 1, 1)]


def test_building_without_nvcc_is_one_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.ops.cuda_library.find_compiler", lambda: None)
    with pytest.raises(MachineError, match=r"^nvcc: is not installed"):
        doctor.run(DoctorOptions(build_kernels=True))


def test_the_name_is_that_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctor.run(DoctorOptions()).data["kernels"]["name"] == library_name()
