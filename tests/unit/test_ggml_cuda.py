"""The CUDA encoders of ggml's blocks: what they are made of, built for the CPU, gives the bytes of `encode`; so do they on a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ggml_encode import GOLDEN, bell, digest, sequence

from quantkit.errors import InputError, MachineError
from quantkit.ops import cuda_library
from quantkit.ops.ggml.cuda import available, encode_cuda, encode_staged, launch
from quantkit.ops.ggml.encode import BLOCKS, encode

Encode = Callable[[np.ndarray, str, np.ndarray | None], np.ndarray]
COLUMNS = 512

with_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="encode() needs numba, which is not installed")


@pytest.fixture(scope="module")
def golden() -> tuple[np.ndarray, np.ndarray]:
    """The values and the importance whose bytes are hashed in GOLDEN."""
    values = (sequence(42, 4 * 64 * 512).reshape(-1, 4).sum(axis=1) - 2.0**25) * 2.0**-24 * 0.05
    values[::97] *= 20
    importance = sequence(7, 512) * 2.0**-24 + 2.0**-10
    return values.astype(np.float32).reshape(64, 512), importance.astype(np.float32)


@pytest.fixture(scope="module")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``host.cpp``: the functions that the kernels call, built for the CPU."""
    compiler = next((found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler: set CXX, or install g++ or clang++")
    library = tmp_path_factory.mktemp("host") / "host.so"
    source = cuda_library.source_folder() / "ggml" / "host.cpp"
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture(scope="module")
def host(host_library: Path) -> Encode:
    function = ctypes.CDLL(str(host_library)).quantkit_ggml_encode_host

    def run(values: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
        elements, size = BLOCKS[kind]
        rows, columns = values.shape
        out = np.zeros((rows, columns // elements * size), np.uint8)
        given, weights, found = (None if each is None else ctypes.c_void_p(each.ctypes.data) for each in (values, importance, out))
        assert function(kind.encode(), given, ctypes.c_int64(rows), ctypes.c_int64(columns), weights, found) == 0
        return out

    return run


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest) -> Encode:
    """``encode``, or where numba is missing the CPU build, which other machines compare with it."""
    if importlib.util.find_spec("numba") is not None:
        return encode
    return request.getfixturevalue("host")


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if not available():
        pytest.skip(f"the CUDA kernels are not built: {cuda_library.HINT}")
    return torch.device("cuda", 0)


def on(device: torch.device, array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array).to(device)


def edges() -> Iterator[tuple[str, np.ndarray]]:
    """Values [5, 512] on which an encoder may take another turn than its twin, by name."""
    rng, noise = np.random.default_rng(3), bell(5, COLUMNS, seed=3)
    parts = rng.integers(-100, 10, (5, COLUMNS // 16)).repeat(16, axis=1)
    yield "bell", noise
    yield "outliers", noise * np.where(rng.random(noise.shape) < 0.01, 50, 0.02).astype(np.float32)
    for value in (0.0, -0.0, 0.37, -0.37, 1e-15, 1e-30, 1e-44, 6e4):
        yield f"constant {value}", np.full((5, COLUMNS), value, np.float32)
    yield "positive", abs(noise)
    yield "negative", -abs(noise)
    for power in (-146, -133, -126, -52, -48, 12):
        yield f"bell 2^{power}", np.ldexp(noise, power).astype(np.float32)
    yield "ties", np.round(noise * 8) / np.float32(16)
    yield "ternary", np.sign(noise) * (abs(noise) > 0.5)
    yield "sparse", np.where(rng.random(noise.shape) < 0.03, noise, np.float32(0))
    yield "parts of many sizes", np.ldexp(noise, parts).astype(np.float32)
    yield "zero parts", np.where(parts % 2 == 0, noise, np.float32(0))
    yield "elements of many sizes", np.ldexp(noise, rng.integers(-120, 12, noise.shape)).astype(np.float32)
    yield "nearly constant", np.float32(-3) + noise * np.float32(2.0**-22)


def weights(columns: int) -> Iterator[tuple[str, np.ndarray | None]]:
    """Importance by name."""
    some = np.random.default_rng(4).random(columns, np.float32)
    holes = np.where(np.arange(columns) % 3 == 0, np.float32(0), some)
    holes[:256] = 0
    yield "plain", None
    yield "importance", some
    yield "holes", holes
    yield "many sizes", np.ldexp(some, np.random.default_rng(5).integers(-100, 30, columns)).astype(np.float32)


def broken(kind: str) -> Iterator[tuple[np.ndarray, np.ndarray | None, str]]:
    """Values, importance, and the line that refuses them."""
    not_finite, large, ones = bell(5, COLUMNS), bell(5, COLUMNS), np.ones(COLUMNS, np.float32)
    not_finite[2, 300] = not_finite[4, 1] = np.nan
    yield not_finite, None, f"{kind} values: row 2 is not finite, expected finite values"
    yield (
        np.where(np.isnan(not_finite), np.float32(-np.inf), not_finite),
        ones,
        f"{kind} values: row 2 is not finite, expected finite values",
    )
    large[1, 511] = large[3, 0] = 1e30
    tail = "of a block of row 1 does not fit in float16, expected smaller values or importance"
    yield large, None, f"{kind} values: the scale {tail}"
    yield large, ones, f"{kind} values: the scale {tail}"
    for bad in (-1, np.nan, np.inf):
        line = "importance: has a value that is negative or not finite, expected finite values, 0 or more"
        yield bell(2, COLUMNS), np.where(np.arange(COLUMNS) == 77, np.float32(bad), ones), line


# on any machine


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_kernels_functions_give_the_bytes_of_ggml(kind: str, host: Encode, golden: tuple[np.ndarray, np.ndarray]) -> None:
    values, importance = golden
    assert (digest(host(values, kind, None)), digest(host(values, kind, importance))) == GOLDEN[kind][::2]


@with_numba
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_kernels_functions_give_the_bytes_of_encode(kind: str, host: Encode) -> None:
    for name, values in edges():
        for which, importance in weights(COLUMNS):
            assert np.array_equal(host(values, kind, importance), encode(values, kind, importance)), (name, which)


@with_numba
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_lines_of_encode_are_those_that_the_gpu_must_give(kind: str) -> None:
    for values, importance, line in broken(kind):
        with pytest.raises(InputError) as caught:
            encode(values, kind, importance)
        assert caught.value.line == line


BAD = {
    "kind": (torch.zeros(1, 256), "Q9_K", "Q9_K: unknown block type, expected one of Q4_0"),
    "columns": (torch.zeros(1, 288, device="meta"), "Q4_K", "Q4_K values: on meta, expected values on a GPU"),
    "dims": (torch.zeros(256), "Q4_K", r"Q4_K values: float32 of shape \(256,\), expected a C-contiguous float32 matrix"),
    "dtype": (torch.zeros(1, 256, dtype=torch.bfloat16), "Q4_K", r"Q4_K values: bfloat16 of shape \(1, 256\), expected"),
    "order": (torch.zeros(256, 256).T, "Q4_K", "expected a C-contiguous"),
    "device": (torch.zeros(1, 256), "Q4_K", "Q4_K values: on cpu, expected values on a GPU"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_gpu_is_asked(case: str) -> None:
    values, kind, message = BAD[case]
    with pytest.raises(InputError, match=message):
        encode_cuda(values, kind)


def call_launch() -> None:
    launch(torch.zeros(1, 32), "Q8_0", None, None, torch.zeros(1, 34, dtype=torch.uint8), torch.ones(2, dtype=torch.int64))


def test_kernels_that_are_not_built_are_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cuda_library.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_library, "library_name", lambda: "libquantkit-none.so")
    assert not available()
    with pytest.raises(MachineError, match=r"^CUDA kernels: are not built, expected libquantkit-none.so in ") as caught:
        call_launch()
    assert caught.value.hint == "quantkit doctor --build-kernels"


def test_a_library_of_another_version_is_one_error(monkeypatch: pytest.MonkeyPatch, host_library: Path) -> None:
    monkeypatch.setenv(cuda_library.VARIABLE, str(host_library))
    with pytest.raises(MachineError, match=r"is of another version, expected a library of this version of quantkit$"):
        call_launch()


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BLOCKS)
def test_gpu_bytes_are_those_of_ggml(kind: str, gpu: torch.device, golden: tuple[np.ndarray, np.ndarray]) -> None:
    values, importance = (on(gpu, each) for each in golden)
    found = [digest(encode_cuda(values, kind, weigh).cpu().numpy()) for weigh in (None, importance)]
    assert tuple(found) == GOLDEN[kind][::2]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BLOCKS)
def test_gpu_bytes_are_those_of_the_cpu(kind: str, gpu: torch.device, reference: Encode) -> None:
    for name, values in edges():
        for which, importance in weights(COLUMNS):
            found = encode_cuda(on(gpu, values), kind, on(gpu, importance)).cpu().numpy()
            assert np.array_equal(found, reference(values, kind, importance)), (name, which)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("rows", "blocks"), [(0, 2), (1, 1), (1, 3), (2, 1), (31, 1), (33, 5), (129, 3), (257, 1)])
def test_any_number_of_rows_and_blocks(kind: str, rows: int, blocks: int, gpu: torch.device, reference: Encode) -> None:
    columns = blocks * BLOCKS[kind][0]
    values = bell(rows, columns, seed=rows)
    for _, importance in list(weights(columns))[:2]:
        expected = reference(values, kind, importance)
        assert np.array_equal(encode_cuda(on(gpu, values), kind, on(gpu, importance)).cpu().numpy(), expected)
        assert np.array_equal(encode_staged(values, kind, importance), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BLOCKS)
def test_gpu_refuses_what_encode_refuses(kind: str, gpu: torch.device) -> None:
    for values, importance, line in broken(kind):
        with pytest.raises(InputError) as caught:
            encode_cuda(on(gpu, values), kind, on(gpu, importance))
        assert caught.value.line == line
        with pytest.raises(InputError) as caught:
            encode_staged(values, kind, importance)
        assert caught.value.line == line


@pytest.mark.gpu
def test_gpu_refuses_a_part_of_a_block_and_importance_of_another_shape(gpu: torch.device) -> None:
    with pytest.raises(InputError, match="Q4_K values: 288 columns, expected a multiple of 256"):
        encode_cuda(torch.zeros(1, 288, device=gpu), "Q4_K")
    for importance in (torch.ones(128, device=gpu), torch.ones(256), torch.ones(256, device=gpu, dtype=torch.float64)):
        with pytest.raises(InputError, match=r"^importance: .* expected float32 of shape \(256,\) on cuda:0"):
            encode_cuda(torch.zeros(1, 256, device=gpu), "Q4_K", importance)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "weighed"), [("Q8_0", False), ("Q4_0", True), ("Q4_K", True)])
def test_more_than_2_31_values(kind: str, weighed: bool, gpu: torch.device) -> None:
    rows, columns = (1 << 19) + 3, 4096
    if torch.cuda.mem_get_info(gpu)[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    values = torch.zeros(rows, columns, device=gpu)
    values[-2:] = torch.from_numpy(bell(2, columns)).to(gpu)
    importance = torch.from_numpy(np.random.default_rng(6).random(columns, np.float32)).to(gpu) if weighed else None
    found = encode_cuda(values, kind, importance)
    assert torch.equal(found[-2:], encode_cuda(values[-2:].contiguous(), kind, importance))
    assert torch.equal(found[:-2].amax(dim=0), found[0])
    assert torch.equal(found[:-2].amin(dim=0), found[0])
    values[-1, -1] = float("nan")
    with pytest.raises(InputError, match=f"row {rows - 1} is not finite"):
        encode_cuda(values, kind, importance)


@pytest.mark.gpu
def test_threads_at_once_do_not_change_a_byte(gpu: torch.device) -> None:
    kinds = list(BLOCKS)
    jobs = []
    for i in range(96):  # of several sizes, so that memory of one call is given to another of another size
        values = bell(64 << (i % 4), 1024, seed=i)
        jobs.append((values, kinds[i % len(kinds)], None if i % 3 == 0 else np.random.default_rng(i).random(1024, np.float32)))
    expected = [encode_cuda(on(gpu, values), kind, on(gpu, importance)).cpu().numpy() for values, kind, importance in jobs]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda job: encode_staged(*job), jobs))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
