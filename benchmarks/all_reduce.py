"""How long does a sum over the GPUs of one host take, by size: through symmetric memory in each of its ways, and by NCCL?

    python benchmarks/all_reduce.py [--ranks 2] [--json OUT.jsonl]

Each rank is a process. Times are microseconds a call: "graph" is a CUDA graph of many calls, "eager" one call after another from Python.
"nccl" is NCCL's own all-reduce in place, which promises no order of the sum; "fallback" is what quantkit does without symmetric memory.
"rule" is which way quantkit takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from quantkit.comm import ProcessComm
from quantkit.ops.symmetric import FLAGGED, ONE_SHOT, TWO_SHOT, open_sums

SIZES = [2 << 10, *(1 << power for power in range(13, 23))]
CALLS, ROUNDS = 100, 5
WAYS = {"flagged": FLAGGED, "one_shot": ONE_SHOT, "two_shot": TWO_SHOT}


def in_graph(call: Callable[[], object], comm: ProcessComm) -> float:
    """Microseconds of a call among CALLS in a graph: the median of ROUNDS replays, on the slowest rank."""
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        comm.barrier()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(stop) / CALLS)
    return slowest(statistics.median(times), comm)


def eager(call: Callable[[], object], comm: ProcessComm) -> float:
    """Microseconds of a call among CALLS from Python, on the slowest rank."""
    times = []
    for _ in range(ROUNDS):
        comm.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start) / CALLS)
    return slowest(statistics.median(times), comm)


def slowest(value: float, comm: ProcessComm) -> float:
    return float(comm.all_gather(torch.tensor([value], device="cuda"), [1] * comm.size).max())


def measure(rank: int, ranks: int, store: Path, out: Path | None) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    comm = ProcessComm(rank, ranks, store, backend="nccl", timeout=60.0)
    comm.barrier()
    start = time.perf_counter()
    sums = open_sums(comm, device, 60.0)
    opened = time.perf_counter() - start
    rows = []
    for nbytes in SIZES:
        x: Tensor = torch.randn(nbytes // 2, device=device).bfloat16()
        calls: dict[str, Callable[[], object]] = {
            "nccl": lambda x=x: torch.distributed.all_reduce(x),
            "fallback": lambda x=x: comm.all_reduce(x),
        }
        if sums is not None:
            for name, mode in WAYS.items():
                if nbytes <= sums.mode_limit(mode):
                    calls[name] = lambda x=x, mode=mode: sums.sum(x, mode)
        row: dict[str, object] = {"bytes": nbytes, "ranks": ranks}
        if sums is not None:
            row["rule"] = next(name for name, mode in WAYS.items() if mode == sums.mode(nbytes)) if sums.takes(x) else "fallback"
        for name, call in calls.items():
            row[f"{name} graph us"], row[f"{name} eager us"] = round(in_graph(call, comm), 2), round(eager(call, comm), 2)
        rows.append(row)
    if rank == 0:
        names = ["nccl", "fallback", *WAYS]
        print(f"{torch.cuda.get_device_name()} x {ranks}, bf16, us a call, graph / eager; ready in {opened:.2f} s")
        print("    bytes  " + "".join(f"{name:>17}" for name in names) + "  rule")
        for row in rows:
            cells = (f"{row.get(f'{name} graph us', '-'):>8} /{row.get(f'{name} eager us', '-'):>7}" for name in names)
            print(f"{row['bytes']:>9}  " + "".join(cells) + f"  {row.get('rule', '-')}")
        if out is not None:
            facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
            out.write_text("".join(json.dumps({**row, **facts}) + "\n" for row in rows))
    comm.barrier()
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        measure(options.rank, options.ranks, options.store, options.json)
        return
    with tempfile.TemporaryDirectory() as folder:
        more = ["--ranks", str(options.ranks), "--store", f"{folder}/store", *(["--json", str(options.json)] if options.json else [])]
        command = [sys.executable, os.path.abspath(__file__), *more]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(options.ranks)]
        sys.exit(max(abs(each.wait()) for each in ranks))


if __name__ == "__main__":
    main()
