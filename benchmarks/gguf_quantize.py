"""Are ggml's blocks made as fast as by ggml, and are they the same bytes? Every type, plain and with importance, on weights of MODEL.

    python benchmarks/gguf_quantize.py MODEL --library path/to/libggml-base.so --out benchmarks/results

Both encode the same tensors in turns; the figures are medians in millions of weights per second of CPU time, and of wall time. The
importance is log-normal, drawn for each tensor. One JSON line per type goes to OUT/gguf_encode.jsonl, a table to the terminal. Neither is
charged for reading the weights; ours is charged for its checks and for the memory of its answer, ggml writes where it wrote before.

With ``--file q4_k_m`` the whole command is timed too: ``quantkit quantize MODEL --method gguf --type q4_k_m``, from start to file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from quantkit import __version__
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.formats.gguf import BLOCK_TYPES
from quantkit.ops.dtypes import as_tensor
from quantkit.ops.ggml.encode import BLOCKS, encode

TYPE_IDS = {block.name: number for number, block in BLOCK_TYPES.items()}
LEAST_SECONDS = 0.05
"""A measurement repeats its work until it takes about this long."""


@dataclass(frozen=True, slots=True)
class Sample:
    """``values`` float32 [rows, columns] of one tensor, and ``importance`` float32 [columns]."""

    values: np.ndarray[Any, Any]
    importance: np.ndarray[Any, Any]


class Library:
    """libggml-base, whose encoder takes one range of rows at a time."""

    def __init__(self, path: Path) -> None:
        self.chunk = ctypes.CDLL(str(path)).ggml_quantize_chunk
        self.chunk.restype = ctypes.c_size_t
        self.chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(self, sample: Sample, kind: str, weighed: bool, threads: int, out: np.ndarray[Any, Any]) -> None:
        """As ``quantkit``'s, into ``out`` uint8 [rows, bytes]."""
        rows, columns = sample.values.shape
        weights = sample.importance.ctypes.data if weighed else None

        def part(first: int, last: int) -> None:
            start = first * columns
            self.chunk(TYPE_IDS[kind], sample.values.ctypes.data, out.ctypes.data, start, last - first, columns, weights)

        edges = [rows * i // threads for i in range(threads + 1)]
        if threads == 1:
            part(0, rows)
            return
        with ThreadPoolExecutor(threads) as pool:
            for task in [pool.submit(part, *span) for span in pairwise(edges)]:
                task.result()


def samples(checkpoint: Checkpoint, elements: int, weights: int) -> Iterator[Sample]:
    """About ``weights`` weights (all: 0) of matrices whose rows are whole blocks: tensors spread over the model."""
    names = [name for name, ref in checkpoint.tensors.items() if len(ref.shape) > 1 and ref.shape[-1] % elements == 0]
    sizes = [math.prod(checkpoint.tensors[name].shape) for name in names]
    step = 1 if not weights else max(1, sum(sizes) // weights)
    left = weights or sum(sizes)
    for place in [i for first in range(step) for i in range(first, len(names), step)]:
        if left <= 0:
            return
        values = as_tensor(checkpoint.read(names[place]), checkpoint.dtype(names[place])).float().numpy()
        values = values.reshape(-1, values.shape[-1])
        rows = len(values) if not weights else max(1, min(len(values), max(weights // 4, 1) // values.shape[1], left // values.shape[1]))
        importance = np.exp(np.random.default_rng(place).normal(0, 2, values.shape[1])).astype(np.float32)
        yield Sample(np.ascontiguousarray(values[:rows]), importance)
        left -= rows * values.shape[1]


def seconds(work: Callable[[], None], times: int) -> tuple[float, float]:
    """CPU and wall seconds of one ``work``, done ``times`` times."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(times):
        work()
    return (time.process_time() - cpu) / times, (time.perf_counter() - wall) / times


def measure(found: list[Sample], kind: str, weighed: bool, library: Library | None, threads: int, repeats: int) -> dict[str, Any]:
    """One line of the results."""
    elements, size = BLOCKS[kind]
    outs = [np.zeros((len(s.values), s.values.shape[1] // elements * size), np.uint8) for s in found]

    def ours() -> None:
        for sample in found:
            encode(sample.values, kind, sample.importance if weighed else None, threads)

    def theirs() -> None:
        assert library is not None
        for sample, out in zip(found, outs, strict=True):
            library.encode(sample, kind, weighed, threads, out)

    works = [ours] if library is None else [ours, theirs]
    times = [max(1, round(LEAST_SECONDS / max(seconds(work, 1)[0], 1e-6))) for work in works for _ in range(2)][1::2]
    taken = [[seconds(work, n) for work, n in zip(works, times, strict=True)] for _ in range(repeats)]
    count = sum(sample.values.size for sample in found) / 1e6
    speeds = [[count / statistics.median(row[who][clock] for row in taken) for clock in (0, 1)] for who in range(len(works))]
    line: dict[str, Any] = {"type": kind, "importance": weighed, "weights": round(count * 1e6), "ours": speeds[0]}
    if library is not None:
        mine = (encode(sample.values, kind, sample.importance if weighed else None, threads) for sample in found)
        line |= {"identical": all(np.array_equal(one, out) for one, out in zip(mine, outs, strict=True))}
        line |= {"ggml": speeds[1], "ratio": statistics.median(row[1][0] / row[0][0] for row in taken)}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint directory, a .gguf file or pkg:NAME")
    parser.add_argument("--library", type=Path, help="libggml-base of an x86-64 build; without it only ours is measured")
    parser.add_argument("--types", nargs="*", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--weights", type=float, default=4, help="millions of weights to encode; 0: all of the model's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--file", action="append", default=[], help="a type of file to time the whole command with")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    library = None if options.library is None else Library(options.library)
    found = {n: list(samples(checkpoint, n, round(options.weights * 1e6))) for n in {BLOCKS[kind][0] for kind in options.types}}
    machine = {"quantkit": __version__, "cpu": processor(), "threads": options.threads, "repeats": options.repeats}
    print(f"{'type':8}{'':12}{'identical':>10}{'ours':>9}{'ggml':>9}{'ratio':>8}   M weights per CPU second")
    for kind in options.types:
        for weighed in (False, True):
            line = measure(found[BLOCKS[kind][0]], kind, weighed, library, options.threads, options.repeats)
            rounded = {key: [round(v, 2) for v in value] if isinstance(value, list) else value for key, value in line.items()}
            print(
                f"{kind:8}{'importance' if weighed else 'plain':12}{line.get('identical', ''):>10}{line['ours'][0]:9.1f}"
                f"{line.get('ggml', [math.nan])[0]:9.1f}{line.get('ratio', math.nan):8.2f}",
                flush=True,
            )
            write(options.out, {**machine, **rounded, "ratio": round(line.get("ratio", math.nan), 3)})
    for kind in options.file:
        line = whole_file(options.model, kind)
        speed = line["weights"] / 1e6 / line["cpu_seconds"]
        print(f"{kind} file: {line['wall_seconds']} s, {line['cpu_seconds']} CPU seconds, {speed:.1f} M weights per CPU second")
        write(options.out, {**machine, **line})


def write(out: Path | None, line: dict[str, Any]) -> None:
    """Append a line to the results, where there is a place for them."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "gguf_encode.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def whole_file(model: str, kind: str) -> dict[str, Any]:
    """What the command takes for a file of the type ``kind``."""
    checkpoint = open_checkpoint(model)
    count = sum(math.prod(ref.shape) for ref in checkpoint.tensors.values())
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "quantkit", "quantize", model, f"{scratch}/out.gguf", "--method", "gguf", "--type", kind]
        subprocess.run([*command, "--device", "cpu", "--quiet"], stdout=subprocess.DEVNULL, check=True)
        nbytes = Path(scratch, "out.gguf").stat().st_size
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"file": kind, "weights": count, "bytes": nbytes, "cpu_seconds": round(cpu, 2), "wall_seconds": round(wall, 2)}


def processor() -> str:
    """What /proc/cpuinfo calls the processor."""
    path = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
