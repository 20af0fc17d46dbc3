"""``quantkit bench kernels``: products on packed weights, each beside cuBLAS, a read of its bytes, and the best of other kernels."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import fs
from quantkit.commands.bench_requests import check_out
from quantkit.errors import InputError
from quantkit.ops.kernel_bench import FORMATS, Bench, Weights, columns_of
from quantkit.ops.kernel_select import Config, family, merged, read_tables, user_table, write_tables
from quantkit.progress import Progress, silent
from quantkit.report import Report, Table, next_step

SHAPES: Mapping[str, tuple[int, int]] = {
    "l3_gateup": (28672, 4096), "l3_qkv": (6144, 4096), "l3_o": (4096, 4096), "l3_down": (4096, 14336),
    "q72_gateup": (7424, 8192), "q72_qkv": (1280, 8192), "q72_o": (8192, 1024), "q72_down": (8192, 3712),
}  # fmt: skip
"""N and K of Llama-3-8B's linears, and of Qwen2-72B's on one of 8 ranks."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
DEFAULT_FORMATS = ("int4", "nf4", "q4_k", "q6_k", "q8_0")
PEERS = {"int4": "int4_g128_best_us", "nf4": "nf4_best_us", "q4_k": "gguf_Q4_K_us", "q6_k": "gguf_Q6_K_us", "q8_0": "gguf_Q8_0_us"}
"""Format -> the column of a file of peers."""
BARS = {"nf4": 1.4, "q4_k": 1.3, "q6_k": 1.3, "q8_0": 1.1}
"""Format -> how long one token may take, over a read of the weight at READ_RATE, in bytes a second, the fastest on an H100."""
READ_RATE = 3063e9
PEAK_FLOPS = 760e12
"""16-bit floating-point operations a second of a large product on an H100: the other floor beside the read."""
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class BenchKernelsOptions:
    """``formats``, ``shapes`` and ``tokens``: what to measure; none means all of this module's. ``dtype``: of the activations.

    ``tune``: measure every configuration and write the best to ``table`` (none: the user's own). ``peers``: a file of other kernels'
    figures. ``out``: a file for all figures.
    """

    formats: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    dtype: str = "float16"
    peers: Path | None = None
    out: Path | None = None
    tune: bool = False
    table: Path | None = None


def run(options: BenchKernelsOptions, progress: Progress = silent) -> Report:
    """Measure every cell. Raises InputError for an option that means nothing; MachineError without a GPU or without kernels."""
    check_out(options.out)
    formats = options.formats or DEFAULT_FORMATS
    if unknown := [each for each in formats if each not in FORMATS]:
        raise InputError("--format", f"{unknown[0]!r} is unknown", f"one of {', '.join(FORMATS)}")
    if options.dtype not in ("float16", "bfloat16"):
        raise InputError("--dtype", f"{options.dtype!r} is unknown", "float16 or bfloat16")
    if options.table is not None and not options.tune:
        raise InputError("--table", "is given without --tune", "both, to measure and write a table")
    shapes = dict(_shape(each) for each in options.shapes) or dict(SHAPES)
    tokens = options.tokens or TOKENS
    peers = {} if options.peers is None else _read_peers(options.peers)
    bench = Bench(getattr(torch, options.dtype))
    table = (options.table or user_table()) if options.tune else None
    known = {} if table is None else read_tables(table)
    cells: list[dict[str, Any]] = []
    found: dict[tuple[str, int, int], tuple[tuple[int, Config], ...]] = {}
    cublas: dict[tuple[int, int, int], float] = {}
    progress("measure", 0, len(formats) * len(shapes))
    for name, (n, given) in shapes.items():
        for form in formats:
            weight = bench.weights(form, n, columns_of(form, given))
            k, best = weight.first.k, []
            shared = {
                "format": form,
                "shape": name,
                "N": n,
                "K": k,
                "bytes": weight.first.data.nbytes,
                "read_pass_us": bench.read_us(weight),
            }
            cells.append(shared | _dequantized(bench, weight))
            for m in tokens:
                if (n, k, m) not in cublas:
                    cublas[n, k, m] = bench.cublas_us(n, k, m)
                measured = bench.product(weight, bench.inputs(m, k), options.tune)
                us, config, error = (None, None, None) if measured is None else (measured.us, measured.config, measured.error)
                cell = {"M": m, "us": us, "cublas_us": cublas[n, k, m], "peer_us": peers.get((name, form, m)), "error": error}
                cells.append(shared | cell | {"config": None if config is None else str(config)})
                if config is not None:
                    best.append((m, config))
            found[family(weight.first.format), n, k] = tuple(best)
            progress("measure", len(found), len(formats) * len(shapes))
    if table is not None:
        write_tables(table, merged(known, bench.gpu, found))
    return _report(options, bench, cells, table)


def _dequantized(bench: Bench, weight: Weights) -> dict[str, Any]:
    us, exact = bench.dequantize_us(weight)
    return {"M": None, "us": us, "exact": exact, "written_TBs": weight.shape[0] * weight.shape[1] * bench.dtype.itemsize / us / 1e6}


def _shape(text: str) -> tuple[str, tuple[int, int]]:
    if text in SHAPES:
        return text, SHAPES[text]
    match = re.fullmatch(r"(\d{1,7})x(\d{1,7})", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise InputError("--shape", f"{text!r} is unknown", f"NxK, or one of {', '.join(SHAPES)}")
    return text, (int(match[1]), int(match[2]))


def _read_peers(path: Path) -> dict[tuple[str, str, int], float]:
    """``(shape, format, M)`` -> microseconds of the best other kernel."""
    try:
        cells = json.loads(fs.read_bytes(path, _MAX_BYTES))["cells"]
        found: dict[tuple[str, str, int], float] = {}
        for cell in cells:
            at = str(cell["shape"]), int(cell["M"])
            found |= {(at[0], form, at[1]): float(cell[key]) for form, key in PEERS.items() if key in cell}
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"is not a file of peers ({error})", "one like benchmarks/peers/kernel_peers_h100.json") from error


def goal_us(cell: Mapping[str, Any]) -> float | None:
    """The bar of a cell, in microseconds: int4 has one in every cell, the others for one token and a large weight; None for the rest."""
    if cell["format"] != "int4":
        factor = BARS.get(cell["format"])
        return None if factor is None or cell["M"] != 1 or cell["bytes"] < 25e6 else factor * cell["bytes"] / READ_RATE * 1e6
    m, large, read, cublas = cell["M"], cell["bytes"] >= 25e6, cell["read_pass_us"], cell["cublas_us"]
    for most, factors in ((1, (1.18, 1.35)), (16, (1.25, 1.60)), (64, (1.40, 2.0))):
        if m <= most:
            return float(read * factors[0 if large else 1])
    if m <= 128:
        return float(min(cublas, 1.5 * floor_us(cell)) if large else cublas)
    return float(cublas / ((1.2 if large else 1.0) if m <= 256 else 0.97))


def floor_us(cell: Mapping[str, Any]) -> float:
    """What no kernel can beat: reading the packed weight, or the arithmetic."""
    return float(max(cell["read_pass_us"], 2 * cell["N"] * cell["K"] * cell["M"] / PEAK_FLOPS * 1e6))


def _short(value: Any) -> Any:
    """A figure as a file keeps it: four digits say more than a run repeats."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _ratio(over: float | None, under: float | None) -> str | None:
    return None if over is None or under is None else f"{over / under:.2f}"


def _figure(us: float | None) -> str | None:
    return None if us is None else f"{us:.2f}"


def _report(options: BenchKernelsOptions, bench: Bench, cells: Sequence[dict[str, Any]], table: Path | None) -> Report:
    data: dict[str, Any] = {
        "gpu": bench.gpu.name,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "commit": _said("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "kernels": bench.kernels.name,
        "kernels_sha256": fs.sha256_file(bench.kernels),
        "dtype": options.dtype,
        "empty_us": bench.empty_us(),
        "cells": list(cells),
    }
    if options.out is not None:
        lines = ",\n".join(f"  {json.dumps({key: _short(value) for key, value in cell.items()})}" for cell in cells)
        head = json.dumps({key: value for key, value in data.items() if key != "cells"}, indent=1)[:-2]
        fs.write_bytes(options.out, f'{head},\n "cells": [\n{lines}\n ]\n}}\n'.encode())
    products = [cell for cell in cells if cell["M"] is not None]
    wrong = [cell for cell in products if cell["us"] is None] + [cell for cell in cells if cell["M"] is None and not cell["exact"]]
    where = [(each["format"], each["shape"], "dequantized" if each["M"] is None else f"M={each['M']}") for each in wrong]
    return Report(
        command="bench kernels",
        data=data,
        facts=(
            ("GPU", f"{bench.gpu.name}, driver {data['driver']}"),
            ("empty kernel", f"{data['empty_us']:.2f} us, in every figure"),
            *_summary(products),
            *((("table", str(table)),) if table else ()),
        ),
        tables=(_products(products), _dense([cell for cell in cells if cell["M"] is None])),
        failed=f"a result was wrong: {len(wrong)} of {len(cells)} cells, the first {' '.join(where[0])}" if wrong else None,
        next_steps=() if options.tune else (next_step("bench", "kernels", "--tune"),),
    )


def _summary(products: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How many cells of each format are no slower than the best peer and within the bar; how far they are over the floor."""
    facts = []
    for form in dict.fromkeys(cell["format"] for cell in products):
        cells = [cell for cell in products if cell["format"] == form and cell["us"] is not None]
        with_peer = [cell for cell in cells if cell["peer_us"] is not None]
        if with_peer:
            at = sum(cell["us"] <= cell["peer_us"] for cell in with_peer)
            facts.append((f"{form}: at or under the best peer", f"{at} of {len(with_peer)} cells"))
        goals = [(cell, goal) for cell in cells if (goal := goal_us(cell)) is not None]
        if goals:
            facts.append((f"{form}: within the bar", f"{sum(cell['us'] <= goal for cell, goal in goals)} of {len(goals)} cells"))
        over: dict[int, list[float]] = {}
        for cell in cells:
            over.setdefault(cell["M"], []).append(math.log(cell["us"] / floor_us(cell)))
        means = (f"M={m} {math.exp(sum(logs) / len(logs)):.2f}" for m, logs in over.items())
        facts.append((f"{form}: times the floor, geometric mean", ", ".join(means)))
    return facts


def _products(products: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("format", "shape", "M", "us", "cuBLAS us", "over cuBLAS", "read us", "over read", "peer us", "over peer", "error", "kernel")
    rows = []
    for cell in products:
        us, error = cell["us"], cell["error"]
        row = [cell["format"], cell["shape"], cell["M"], _figure(us)]
        for key in ("cublas_us", "read_pass_us", "peer_us"):
            row += [_figure(cell[key]), _ratio(us, cell[key])]
        rows.append((*row, None if error is None else f"{error:.1e}", cell["config"]))
    return Table("Products", columns, tuple(rows))


def _dense(cells: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple((c["format"], c["shape"], _figure(c["us"]), f"{c['written_TBs']:.2f}", "yes" if c["exact"] else "no") for c in cells)
    return Table("Dequantize", ("format", "shape", "us", "TB/s written", "exact"), rows)


def _said(*command: str) -> str | None:
    """The first line that a program says; None when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None
