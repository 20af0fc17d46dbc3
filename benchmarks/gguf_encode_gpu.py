"""Do the CUDA encoders of ggml's blocks give the CPU's bytes, and how fast are they?

On a machine with numba, write the hashes of the CPU's bytes for every kind and case, and the speed of one core:

    python benchmarks/gguf_encode_gpu.py expect --file build/ggml/expected.json

On a machine with a GPU (numba is not needed), compare, time, and write OUT/gguf_encode_gpu.jsonl, one line per kind with and without
importance. The library is the one that quantkit finds; QUANTKIT_KERNELS names another. ``--reference`` is kernels/ggml/host.cpp built as a
shared library: with it a difference is shown block by block.

    python benchmarks/gguf_encode_gpu.py compare --file build/ggml/expected.json --out results
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quantkit.ops.ggml.encode import BLOCKS, encode

COLUMNS = 1536
REFERENCE = {
    "Q8_0": (219, None), "Q4_0": (424, 27), "Q4_1": (547, 5.8), "Q5_0": (301, 28), "Q2_K": (12.0, 5.3), "Q3_K": (64, 20),
    "Q4_K": (10.7, 6.0), "Q5_K": (12.7, 5.6), "Q6_K": (24.8, 24.3), "IQ4_NL": (3.0, 3.0), "IQ4_XS": (3.2, 2.9),
}  # fmt: skip
"""Million weights per second of ggml on one core, plain and with importance (gguf.md 10)."""


def bell(rng: np.random.Generator, rows: int, columns: int = COLUMNS) -> np.ndarray:
    """A bell of deviation 1.2, of integers alone, so that every machine makes the same."""
    return (rng.integers(-(1 << 20), 1 << 20, (4, rows, columns)).sum(axis=0) * 2.0**-20).astype(np.float32)


def lcg(seed: int, count: int) -> np.ndarray:
    numbers = np.empty(count, np.int64)
    for i in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        numbers[i] = seed >> 8
    return numbers


def golden() -> tuple[np.ndarray, np.ndarray]:
    values = (lcg(42, 4 * 64 * 512).reshape(-1, 4).sum(axis=1) - 2.0**25) * 2.0**-24 * 0.05
    values[::97] *= 20
    return values.astype(np.float32).reshape(64, 512), (lcg(7, 512) * 2.0**-24 + 2.0**-10).astype(np.float32)


def powers(rng: np.random.Generator, low: int, high: int, shape: tuple[int, int]) -> np.ndarray:
    return np.ldexp(1.0, rng.integers(low, high, shape))


def cases() -> Iterator[tuple[str, np.ndarray]]:
    """Values by name, all with COLUMNS columns but the last."""
    rng, rows = np.random.Generator(np.random.PCG64(1)), 33
    parts = COLUMNS // 16
    yield "bell", bell(rng, rows)
    yield "outliers", bell(rng, rows) * np.where(rng.integers(0, 100, (rows, COLUMNS)) == 0, 50, 0.02).astype(np.float32)
    yield "cubes", bell(rng, rows) ** 3
    yield "zero", np.zeros((3, COLUMNS), np.float32)
    for value in (-0.0, -0.37, 0.37, 1e-30, -1e-30, 1e-40, -1e-44, 1e-15, 6e4):
        yield f"constant {value}", np.full((2, COLUMNS), value, np.float32)
    yield "positive", abs(bell(rng, rows))
    yield "negative", -abs(bell(rng, rows))
    for power in (-146, -140, -133, -127, -126, -120, -100, -66, -52, -50, -48, -33, -20, 13):
        yield f"bell 2^{power}", np.ldexp(bell(rng, rows).astype(np.float64), power).astype(np.float32)
    yield "ternary", rng.integers(-1, 2, (rows, COLUMNS)).astype(np.float32)
    yield "ternary small", rng.integers(-1, 2, (rows, COLUMNS)).astype(np.float32) * np.float32(0.0123)
    yield "integers", rng.integers(-300, 300, (rows, COLUMNS)).astype(np.float32) * np.float32(1 / 64)
    yield "sparse", np.where(rng.integers(0, 30, (rows, COLUMNS)) == 0, bell(rng, rows), np.float32(0))
    yield "one in 32", np.where(np.arange(COLUMNS) % 32 == rng.integers(0, 32, (rows, 1)), bell(rng, rows), np.float32(0))
    yield "parts of many sizes", (bell(rng, rows) * powers(rng, -110, 12, (rows, parts)).repeat(16, axis=1)).astype(np.float32)
    yield "parts of some sizes", (bell(rng, rows) * powers(rng, -10, 3, (rows, parts)).repeat(16, axis=1)).astype(np.float32)
    yield "zero parts", (bell(rng, rows) * rng.integers(0, 2, (rows, parts)).repeat(16, axis=1)).astype(np.float32)
    yield "elements of many sizes", (bell(rng, rows) * powers(rng, -120, 12, (rows, COLUMNS))).astype(np.float32)
    yield "nearly constant", np.float32(-3) + bell(rng, rows) * np.float32(2.0**-22)
    yield "bfloat16", (bell(rng, rows).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    yield "ramp", np.tile(np.arange(COLUMNS, dtype=np.float32), (2, 1))
    yield "many", bell(rng, 257, 14336) * np.float32(0.02)


def weights(columns: int) -> Iterator[tuple[str, np.ndarray | None]]:
    """Importance by name."""
    rng = np.random.Generator(np.random.PCG64(2))
    yield "plain", None
    some = (rng.integers(1, 1 << 20, columns) * 2.0**-20).astype(np.float32)
    yield "importance", some
    holes = some.copy()
    holes[::3] = 0
    holes[:256] = 0
    yield "holes", holes
    yield "zeros", np.zeros(columns, np.float32)
    yield "many sizes", (some * np.ldexp(1.0, rng.integers(-100, 30, columns))).astype(np.float32)


def inputs() -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    values, importance = golden()
    yield "golden, plain", values, None
    yield "golden, importance", values, importance
    for name, each in cases():
        for weigh, importance_ in weights(each.shape[1]):
            if name != "many" or weigh in ("plain", "importance"):
                yield f"{name}, {weigh}", each, importance_


def digest(*arrays: np.ndarray | None) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def answer(call: object) -> str:
    """The hash of what a call returns, or its error."""
    from quantkit.errors import InputError

    try:
        return digest(call())  # type: ignore[operator]
    except InputError as error:
        return error.line


def expect(file: Path) -> None:
    """Write hashes and the speed of one core of this machine (processor time: other work does not count)."""
    hashes: dict[str, dict[str, str]] = {}
    for name, values, importance in inputs():
        hashes[name] = {"input": digest(values, importance)}
        hashes[name] |= {kind: answer(lambda v=values, k=kind, i=importance: encode(v, k, i)) for kind in BLOCKS}
    speeds = {}
    sample = bell(np.random.Generator(np.random.PCG64(3)), 256, 4096) * np.float32(0.02)
    for kind in BLOCKS:
        for name, importance in (("plain", None), ("importance", np.linspace(0.1, 2, 4096, dtype=np.float32))):
            took = []
            for _ in range(5):
                before = time.process_time()
                encode(sample, kind, importance)
                took.append(time.process_time() - before)
            speeds[f"{kind} {name}"] = sample.size / min(took) / 1e6
            print(f"{kind:7} {name:10} {speeds[f'{kind} {name}']:8.1f} M weights/s", flush=True)
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"processor": model, "speeds": speeds, "hashes": hashes}, indent=1))
    print(f"{len(hashes)} inputs, {len(hashes) * len(BLOCKS)} hashes in {file}")


class Reference:
    """The CPU build of the kernels' functions."""

    def __init__(self, path: Path) -> None:
        self._encode = ctypes.CDLL(str(path.resolve())).quantkit_ggml_encode_host

    def __call__(self, values: np.ndarray, kind: str, importance: np.ndarray | None) -> np.ndarray:
        elements, size = BLOCKS[kind]
        out = np.zeros((values.shape[0], values.shape[1] // elements * size), np.uint8)
        pointers = [None if a is None else ctypes.c_void_p(a.ctypes.data) for a in (values, importance, out)]
        self._encode(kind.encode(), pointers[0], ctypes.c_int64(values.shape[0]), ctypes.c_int64(values.shape[1]), pointers[1], pointers[2])
        return out


def differences(found: np.ndarray, true: np.ndarray, kind: str) -> str:
    size = BLOCKS[kind][1]
    found, true = found.reshape(-1, size), true.reshape(-1, size)
    wrong = np.flatnonzero((found != true).any(axis=1))
    if not wrong.size:
        return "equal to the reference"
    first = int(wrong[0])
    at = np.flatnonzero(found[first] != true[first])[:8]
    bytes_ = f"{found[first][at].tolist()} for {true[first][at].tolist()}"
    return f"{wrong.size} of {len(true)} blocks, first {first} at bytes {at.tolist()}: {bytes_}"


def compare(file: Path, out: Path, reference: Reference | None, megaweights: int) -> int:
    """Compare with the hashes, then time; the number of differing answers."""
    import torch

    from quantkit.ops.ggml.cuda import encode_cuda, launch

    known = json.loads(file.read_text())
    device = torch.device("cuda")
    wrong = dict.fromkeys(BLOCKS, 0)
    checked = dict.fromkeys(BLOCKS, 0)
    for name, values, importance in inputs():
        expected = known["hashes"][name]
        same_input = expected["input"] == digest(values, importance)
        on_gpu = torch.from_numpy(np.ascontiguousarray(values)).to(device)
        weigh = None if importance is None else torch.from_numpy(importance).to(device)
        for kind in BLOCKS:
            found = answer(lambda v=on_gpu, k=kind, i=weigh: encode_cuda(v, k, i).cpu().numpy())
            checked[kind] += 1
            if same_input:
                good = found == expected[kind]
            else:
                good = reference is not None and found == digest(reference(values, kind, importance))
            if not good:
                wrong[kind] += 1
                detail = ""
                if reference is not None and "float16" not in found:
                    bytes_ = encode_cuda(on_gpu, kind, weigh).cpu().numpy()
                    detail = differences(bytes_, reference(np.ascontiguousarray(values), kind, importance), kind)
                print(
                    f"DIFFERENT {kind} {name}: {found} for {expected[kind]} (input {'same' if same_input else 'differs'}) {detail}",
                    flush=True,
                )
    print(f"bytes: {sum(checked.values())} answers compared, {sum(wrong.values())} differ")

    name = torch.cuda.get_device_name()
    rows, columns = (megaweights << 20) // 8192, 8192
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(rows, columns, generator=generator, device=device) * 0.02
    importance = torch.rand(columns, generator=generator, device=device) + 0.1
    spreads, flags = torch.empty(rows, device=device), torch.full((2,), rows, dtype=torch.int64, device=device)
    print(f"{name}; one core: {known['processor']}; {rows} x {columns} weights")
    print(f"{'kind':8}{'':11}{'G weights/s':>12}{'GB/s':>8}{'one core, M/s':>15}{'times':>8}{'ggml, M/s':>11}{'times':>8}  bytes")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "gguf_encode_gpu.jsonl").open("w") as lines:
        for kind, (elements, size) in BLOCKS.items():
            result = torch.empty((rows, columns // elements * size), dtype=torch.uint8, device=device)
            for which, weigh in (("plain", None), ("importance", importance)):
                took = []
                for i in range(12):
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    launch(values, kind, weigh, spreads, result, flags)
                    end.record()
                    end.synchronize()
                    if i >= 3:
                        took.append(start.elapsed_time(end) * 1e-3)
                seconds = statistics.median(took)
                speed, core = values.numel() / seconds / 1e6, known["speeds"][f"{kind} {which}"]
                ggml = REFERENCE.get(kind, (None, None))[which != "plain"]
                line = {
                    "kind": kind,
                    "importance": which != "plain",
                    "device": name,
                    "rows": rows,
                    "columns": columns,
                    "seconds": seconds,
                    "fastest": min(took),
                    "slowest": max(took),
                    "mweights_per_s": speed,
                    "gb_per_s": speed * (4 + size / elements) / 1e3,
                    "core_mweights_per_s": core,
                    "processor": known["processor"],
                    "times_one_core": speed / core,
                    "ggml_mweights_per_s": ggml,
                    "answers_compared": checked[kind],
                    "answers_wrong": wrong[kind],
                }
                lines.write(json.dumps(line) + "\n")
                tail = f"{ggml or '-':>11}{f'{speed / ggml:.0f}' if ggml else '-':>8}  {'equal' if not wrong[kind] else 'DIFFERENT'}"
                print(f"{kind:8}{which:11}{speed / 1e3:12.2f}{line['gb_per_s']:8.0f}{core:15.1f}{speed / core:8.0f}{tail}", flush=True)
    return sum(wrong.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("expect", "compare"))
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--megaweights", type=int, default=128)
    given = parser.parse_args()
    if given.what == "expect":
        expect(given.file)
        return 0
    return 1 if compare(given.file, given.out, Reference(given.reference) if given.reference else None, given.megaweights) else 0


if __name__ == "__main__":
    sys.exit(main())
