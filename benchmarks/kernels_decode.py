"""The decode kernels (kernels/decode): are they right, how fast are they, and which configuration is best where?

On a machine with a GPU, with the library that QUANTKIT_KERNELS names:

    python benchmarks/kernels_decode.py check [--formats int4 nf4 ...]
    python benchmarks/kernels_decode.py sweep --m 1 8 16 --out results [--formats int4] [--shapes l3_o] [--full]
    python benchmarks/kernels_decode.py table --out results [--peers benchmarks/peers/h100.json]

Method: weights rotate over copies that pass 160 MB, so L2 is cold; a CUDA graph of up to 64 launches, median of the replays; every
configuration is compared with float32 on the dequantized weights before it is timed, its output poisoned with NaN.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.ops import tiles as T

SHAPES = {
    "l3_gateup": (28672, 4096), "l3_qkv": (6144, 4096), "l3_o": (4096, 4096), "l3_down": (4096, 14336),
    "q72_gateup": (7424, 8192), "q72_qkv": (1280, 8192), "q72_o": (8192, 1024), "q72_down": (8192, 3712),
}  # fmt: skip
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
COLD = 160e6
WORKSPACE = 64 << 20


class Weight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tiles", "table", "code", "absmax2", "offsets")),
        ("format", ctypes.c_int32), ("scale_type", ctypes.c_int32), ("group", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("n", "k", "block0", "block_row_stride")),
    ]  # fmt: skip


class Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("kernel", "a", "b", "c", "d")]


def config(
    columns: int = 0, splits: int = 0, blocks: int = 0, rb: int = 0, wk: int = 0, teams: int = 0, per_sm: int = 0, stages: int = 0,
    workspace: bool = False, dependent: bool = False,
) -> Config:  # fmt: skip
    c = rb | wk << 4 | teams << 12 | per_sm << 20
    return Config(1, columns, splits | blocks << 8, c, stages | int(workspace) << 8 | int(dependent) << 9)


class Library:
    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")

    def __call__(self, packed: T.Tiles, data: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, how: Config | None) -> int:
        def at(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        weight = Weight(
            data.data_ptr(), at(packed.table), at(packed.code), at(packed.absmax2), at(packed.offsets), int(packed.format),
            int(packed.scale_dtype == torch.bfloat16), min(packed.group, 128), packed.n, packed.k, packed.block0, packed.block_stride,
        )  # fmt: skip
        i64, pointer = ctypes.c_int64, ctypes.c_void_p
        result: int = self.library.quantkit_matmul_mma(
            ctypes.byref(weight), pointer(x.data_ptr()), i64(x.shape[0]), i64(x.stride(0)), int(x.dtype == torch.bfloat16),
            pointer(at(bias)), pointer(y.data_ptr()), pointer(self.workspace.data_ptr()), i64(WORKSPACE),
            ctypes.byref(how) if how else None, pointer(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        return result

    def read(self, data: Tensor) -> None:
        self.library.quantkit_bench_read(
            ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.nbytes), ctypes.c_void_p(self.workspace.data_ptr() + (32 << 20)),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip


def bell(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def weights(form: str, n: int, k: int, group: int = 128, scale_dtype: torch.dtype = torch.float16) -> T.Tiles:
    """Random tiles, with groups of equal codes, zero scales and some large ones among them."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    if form in ("int4", "int4z"):
        groups = k // group if group <= k else 1
        scales = (torch.rand(n, groups, device="cuda") * 0.02 + 0.001).to(scale_dtype)
        scales[:, ::7] *= 4
        scales[::5, groups // 2] = 0
        codes[1::9, : min(group, k)] = 15
        zeros = torch.full((n, groups), 8, dtype=torch.uint8, device="cuda")
        if form == "int4z":
            zeros = torch.randint(0, 17, (n, groups), dtype=torch.uint8, device="cuda")
        return T.pack_int4(codes, scales, zeros)
    table = torch.tensor(NF4_TABLE, device="cuda")
    if form == "nf4":
        absmax = torch.rand(n * k // group, device="cuda") * 0.1 + 0.01
        absmax[::11] = 0
        return T.pack_codebook(codes, absmax, table, group)
    if form == "nf4n":
        blocks = n * k // 64
        absmax8 = torch.randint(0, 256, (n, k // 64), dtype=torch.uint8, device="cuda")
        code = torch.linspace(-1, 1, 256, device="cuda")
        absmax2 = torch.rand((blocks + 3) // 256 + 2, device="cuda") * 0.05
        return T.pack_nested(codes, absmax8, table, code, absmax2, 0.06, 3, k // 64)
    kind = form.upper()
    size, per = {"Q4_K": (144, 256), "Q5_K": (176, 256), "Q6_K": (210, 256), "Q8_0": (34, 32)}[kind]
    blocks = torch.randint(0, 256, (n * k // per, size), dtype=torch.uint8, device="cuda")

    def put(at: int, count: int, scale: float) -> None:
        blocks[:, at : at + 2 * count] = (torch.rand(blocks.shape[0], count, device="cuda") * scale).half().view(torch.uint8)

    if kind in ("Q4_K", "Q5_K"):
        put(0, 2, 0.001)
    elif kind == "Q6_K":
        put(208, 1, 0.0003)
    else:
        put(0, 1, 0.001)
    return T.pack_ggml(blocks.view(n, -1), kind)


def inputs(m: int, k: int, dtype: torch.dtype) -> Tensor:
    x = bell(m, k)
    x[:, :: max(k // 7, 1)] *= 30
    return x.to(dtype)


def error(out: Tensor, ref: Tensor) -> float:
    value = float((out.float() - ref).norm() / ref.norm())
    return value if value == value else float("inf")


def check(run: Library, forms: list[str], ampere: bool) -> int:
    """Edges of every kind; returns how many failed."""
    bad = tried = 0
    worst: dict[str, float] = {}
    for form in forms:
        grouped = form in ("int4", "int4z", "nf4")
        unit = {"q8_0": 32, "q4_k": 256, "q5_k": 256, "q6_k": 256, "nf4": 64, "nf4n": 64}.get(form, 8)
        for (n, k), group, dtype in itertools.product(
            [(72, 136), (200, 384), (1000, 1920)], (32, 64, 128, 0) if grouped else (0,), (torch.float16, torch.bfloat16)
        ):
            k = -(-k // unit) * unit
            if form == "nf4" and (group == 0 or k % group):
                continue
            size = group or k
            if size != k and k % size:
                k = -(-k // size) * size
            if form in ("int4", "int4z") and not T.group_supported(k, size):
                continue
            try:
                packed = weights(form, n, k, size, dtype if n == 200 else torch.float16)
            except AssertionError:
                continue
            full = T.dequantize(packed)
            for m, (splits, workspace), columns, ragged in itertools.product(
                (1, 2, 3, 5, 8, 13, 16, 21, 32, 47, 64), ((0, False), (1, False), (2, False), (4, True), (8, False), (3, True)),
                (0, 8, 32), (False, True)
            ):  # fmt: skip
                if ampere and splits > 1 and not workspace:  # code of compute capability 8.0 has no clusters
                    continue
                if (columns and m not in (3, 21)) or (ragged and m not in (5, 16)):
                    continue
                store = inputs(m, k + 3, dtype)
                x = store[:, 1 : k + 1] if ragged else store[:, :k].contiguous()
                if ragged:
                    store[:, k + 1 :] = float("nan")  # beyond K: never to be read as a number
                bias = bell(n, dtype=dtype) if m % 2 else None
                y = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
                code = run(packed, packed.data, x, y, bias, config(columns=columns, splits=splits, workspace=workspace))
                if code and splits == 1 and m > 16:  # x does not fit
                    continue
                tried += 1
                ref = x.float() @ full.T
                if bias is not None:
                    ref += bias.float()
                torch.cuda.synchronize()
                e = error(y, ref) if code == 0 else float("inf")
                limit = 3e-3 if dtype == torch.bfloat16 else 1e-3
                name = f"{form}/{str(dtype)[6:]}"
                if code == 0:
                    worst[name] = max(worst.get(name, 0), e)
                if not e < limit:
                    bad += 1
                    if bad < 12:
                        case = f"{n}x{k} g={size} {dtype} m={m} splits={splits} workspace={workspace} columns={columns}"
                        print(f"BAD {form} {case} rc={code} {e:.2e}")
    print(f"checked {tried}, bad {bad}; largest error", {k: f"{v:.1e}" for k, v in worst.items()})
    if int(run.workspace[:65536].count_nonzero()):
        print("BAD counters left")
        bad += 1
    return bad


def timed(launch: Callable[[int], Any], copies: int, launches: int, replays: int) -> float:
    """Microseconds of one launch: median over the replays of a graph."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        launch(0)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                launch(i % copies)
        graph.replay()
        times = []
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def candidates(m: int, full: bool) -> Iterator[dict[str, Any]]:
    """Configurations worth a try for ``m`` rows."""
    yield {}  # the rule of the library
    for columns in (8, 16, 32):
        if (columns < m <= 64 and columns * 2 < m) or (columns >= 2 * m and columns > 8):
            continue
        yield from shapes_of(columns, full)


def shapes_of(columns: int, full: bool) -> Iterator[dict[str, Any]]:
    """(16-row blocks of a warp, warps of a team, teams, blocks of a multiprocessor), and splits of K."""
    shapes = {
        8: [(2, 8, 1, 1), (2, 8, 1, 2), (2, 8, 2, 1), (2, 4, 2, 2), (2, 4, 4, 1), (4, 8, 1, 1), (4, 8, 1, 2)],
        16: [(2, 8, 1, 1), (2, 8, 1, 2), (2, 8, 2, 1), (2, 4, 2, 2), (2, 4, 4, 1)],
        32: [(2, 8, 1, 1), (2, 8, 1, 2)],
    }[columns]
    if full:  # compiled with QK_DECODE_ALL
        shapes += {
            8: [(4, 4, 2, 1), (2, 16, 1, 1), (1, 8, 1, 1), (1, 8, 1, 2), (1, 8, 2, 1)],
            16: [(4, 8, 1, 1), (4, 8, 1, 2), (4, 4, 2, 1), (4, 4, 2, 2)],
            32: [(4, 8, 1, 1), (4, 4, 2, 1), (4, 4, 1, 2)],
        }[columns]
    for (rb, wk, teams, per_sm), splits in itertools.product(shapes, (1, 2, 4, 8)):
        yield {"columns": columns, "splits": splits, "rb": rb, "wk": wk, "teams": teams, "per_sm": per_sm}


class Problem:
    """A weight in one format, its copies that pass the L2 cache, and what a read of it takes."""

    def __init__(self, run: Library, form: str, shape: str, group: int) -> None:
        self.run, self.form, self.shape = run, form, shape
        n, k = SHAPES[shape]
        if form in ("q4_k", "q5_k", "q6_k"):
            k = -(-k // 256) * 256
        self.packed = weights(form, n, k, 64 if form.startswith("nf4") else group)
        self.weight = T.dequantize(self.packed)
        self.copies = int(COLD // self.packed.data.nbytes) + 1
        self.data = [self.packed.data] + [self.packed.data.clone() for _ in range(self.copies - 1)]
        self.launches = self.copies * max(1, 64 // self.copies) if self.copies <= 64 else 64
        self.read = timed(lambda i: run.read(self.data[i]), self.copies, self.launches, 9)

    def best(self, m: int, dtype: torch.dtype, how: list[dict[str, Any]], replays: int) -> list[dict[str, Any]]:
        """Every configuration that runs, the fastest first."""
        x = inputs(m, self.packed.k, dtype)
        ref = x.float() @ self.weight.T
        y = torch.empty(m, self.packed.n, dtype=dtype, device="cuda")
        rows = []
        for tried in how:
            given = config(**tried)
            errors = []
            for copy in (self.data[0], self.data[-1]):
                y.fill_(float("nan"))
                if self.run(self.packed, copy, x, y, None, given) == 0:
                    errors.append(error(y, ref))
            if not errors:
                continue
            if not max(errors) < 3e-3:
                print(f"WRONG {self.form} {self.shape} m={m} {tried} {errors}")
                continue
            us = timed(
                lambda i, given=given: self.run(self.packed, self.data[i], x, y, None, given),
                self.copies, min(self.launches, max(self.copies, 24)), replays,
            )  # fmt: skip
            rows.append(
                {"format": self.form, "shape": self.shape, "n": self.packed.n, "k": self.packed.k, "m": m, "dtype": str(dtype)[6:],
                 "us": us, "read": self.read, "error": max(errors), "config": tried}
            )  # fmt: skip
        return sorted(rows, key=lambda row: row["us"])


def short(tried: dict[str, Any]) -> str:
    return ",".join(f"{name[:2]}{int(value)}" for name, value in tried.items()) or "rule"


def sweep(run: Library, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    for form, shape in itertools.product(args.formats, args.shapes or SHAPES):
        problem = Problem(run, form, shape, args.group)
        for m in args.m:
            tries = list(candidates(m, args.full)) if not args.rule else [{}]
            found = problem.best(m, dtype, [{**how, **extra} for how in tries for extra in args.extra], args.replays)
            shown = found[: args.show] + [row for row in found[args.show :] if "columns" not in row["config"]]
            text = "  ".join(f"{row['us']:.2f}({row['us'] / row['read']:.2f}) {short(row['config'])}" for row in shown)
            print(f"{form} {shape:11} m={m:3} read {problem.read:6.2f} {text}", flush=True)
            rows += found[: args.keep]
            with (args.out / f"decode_{os.getpid()}.jsonl").open("a") as f:
                f.writelines(json.dumps(row) + "\n" for row in found[: args.keep])
    return rows


PEERS = {"int4": "int4_g128_best_us", "nf4": "nf4_best_us", "nf4n": "nf4_best_us", "q4_k": "gguf_Q4_K_us", "q6_k": "gguf_Q6_K_us",
         "q8_0": "gguf_Q8_0_us"}  # fmt: skip


def table(rows: list[dict[str, Any]], peers: Path | None) -> None:
    """The best of each cell, with dependent launch and without, beside the read pass and the best peer."""
    known = {(c["shape"], c["M"]): c for c in json.loads(peers.read_text())["cells"]} if peers else {}
    best: dict[tuple[str, str, int, bool], dict[str, Any]] = {}
    for row in rows:
        key = (row["format"], row["shape"], row["m"], bool(row["config"].get("dependent")))
        if key not in best or row["us"] < best[key]["us"]:
            best[key] = row
    print("format shape m: us (dependent launch: *), over the read pass, best peer, peer / ours, configuration")
    for (form, shape, m, dependent), row in best.items():
        peer = known.get((shape, m), {}).get(PEERS.get(form, ""), float("nan"))
        us, over, mark = row["us"], row["us"] / row["read"], "*" if dependent else " "
        print(f"{form:5} {shape:10} {m:3} {us:7.2f}{mark} {over:5.2f} {peer:7.2f} {peer / us:5.2f} {short(row['config'])}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "sweep", "table"])
    parser.add_argument("--formats", nargs="+", default=["int4"])
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--m", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--dtype", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--keep", type=int, default=3)
    parser.add_argument("--show", type=int, default=4)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--rule", action="store_true")
    parser.add_argument("--extra", type=json.loads, nargs="+", default=[{}])
    parser.add_argument("--ampere", action="store_true")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    if args.what == "table":
        table([json.loads(line) for f in sorted(args.out.glob("decode*.jsonl")) for line in f.read_text().splitlines()], args.peers)
        return 0
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    run = Library(os.environ["QUANTKIT_KERNELS"])
    start = time.time()
    if args.what == "check":
        bad = check(run, args.formats, args.ampere)
        print(f"{time.time() - start:.0f} s")
        return int(bad > 0)
    rows = sweep(run, args)
    table(rows, args.peers)
    print(f"{time.time() - start:.0f} s on {torch.cuda.get_device_name()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
