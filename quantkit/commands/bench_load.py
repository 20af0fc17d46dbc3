"""``quantkit bench load``: how long a rank's weights take from their files to where they are used, beside a plain read of the files."""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit import fs
from quantkit.checkpoint.reader import Checkpoint, read_manifest, resolve_path
from quantkit.comm import thread_group
from quantkit.commands.bench_requests import check_out, write_figures
from quantkit.errors import InputError
from quantkit.model.load import load_decoder, rank_tensors
from quantkit.model.reading import CHUNK_BYTES, READERS, ReadAhead, Wanted
from quantkit.ops.dtypes import float_dtype
from quantkit.plan import ParallelPlan
from quantkit.progress import Progress, silent
from quantkit.report import Report, Table
from quantkit.runtime.devices import default_dtype, place_for
from quantkit.runtime.worker import rank_source
from quantkit.scheme import Assignment

PLAIN = "plain read"
COLD = 0.02
"""The share of a file's pages in memory up to which it counts as not cached."""
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class BenchLoadOptions:
    """``rank`` of ``tp`` alone is loaded, ``rounds`` times with the files in the page cache and as often without. ``out``: a JSON file."""

    path: str
    tp: int | None = None
    rank: int = 0
    device: str = "auto"
    dtype: str | None = None
    rounds: int = 3
    out: Path | None = None


@dataclass(frozen=True, slots=True)
class _Rank:
    """What one rank loads: ``tensors`` of ``checkpoint``, which lie in ``files``."""

    checkpoint: Checkpoint
    plan: ParallelPlan | None
    presliced: Assignment | None
    number: int

    @property
    def tp(self) -> int:
        return 1 if self.plan is None else self.plan.tp

    @property
    def tensors(self) -> tuple[Wanted, ...]:
        return rank_tensors(self.checkpoint, plan=self.plan, rank=self.number, presliced=self.presliced)

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(self.checkpoint.tensors[want.name].file for want in self.tensors))


def _rank(options: BenchLoadOptions) -> _Rank:
    root = resolve_path(options.path)
    manifest, tp = read_manifest(root), options.tp or 1
    sharded = manifest is not None and manifest.get("kind") == "shards"
    checkpoint, plan, presliced = rank_source(root, sharded, tp, options.rank)
    if sharded and plan is not None and options.tp not in (None, plan.tp):
        raise InputError(str(root), f"was cut for {plan.tp} ranks, --tp says {options.tp}", f"--tp {plan.tp}")
    if not sharded and not 0 <= options.rank < tp:
        raise InputError("--rank", f"is {options.rank}", f"0 to {tp - 1}")
    return _Rank(checkpoint, plan, presliced, options.rank)


def run(options: BenchLoadOptions, progress: Progress = silent) -> Report:
    """Measure, in turns what is compared. Raises InputError for what cannot be loaded, MachineError where there is no such device."""
    check_out(options.out)
    device = place_for(options.device)
    dtype = options.dtype or default_dtype(device, False)
    compute, rank = float_dtype(dtype), _rank(options)
    files, tensors, comm = rank.files, rank.tensors, thread_group(rank.tp)[rank.number]
    if device == "cuda":
        torch.zeros(1, device=device)  # the context is not part of it

    def read() -> int:
        return _read(files, keep=device == "cpu")

    def bring() -> int:
        with ReadAhead(rank.checkpoint, tensors, device) as reader:
            for want in tensors:
                reader.take(want)
        return own

    def load() -> int:
        decoder = load_decoder(
            rank.checkpoint,
            dtype=compute,
            device=device,
            plan=rank.plan,
            comm=comm,
            presliced=rank.presliced,
            merge=device == "cuda",
            progress=progress,
        )
        weights.append(decoder.nbytes)
        return own

    weights, own = list[int](), sum(want.nbytes(rank.checkpoint) for want in tensors)
    works = {PLAIN: read, "tensors": bring, "model": load}
    timed, still_cached, rise = _in_turns(works, files, options.rounds, device)
    sizes = {PLAIN: sum(map(fs.file_size, files)), "tensors": own, "model": own}
    rates = {key: statistics.median(found) for key, found in timed.items()}
    data = {
        "model": options.path,
        "rank": rank.number,
        "tp": rank.tp,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": dtype,
        "bytes": own,
        "files": len(files),
        "file_bytes": sizes[PLAIN],
        "readers": READERS,
        "chunk_bytes": CHUNK_BYTES,
        "staging_bytes": READERS * CHUNK_BYTES if device == "cuda" else 0,
        "weight_bytes": weights[-1],
        "host_bytes": rise,
        "still_cached": still_cached,
        "figures": [
            {"dropped": cold, "what": what, "gb_per_second": found, "median": rate, "share": rate / rates[cold, PLAIN]}
            | {"seconds": sizes[what] / rate / 1e9}
            for ((cold, what), found), rate in zip(timed.items(), rates.values(), strict=True)
        ],
    }
    write_figures(options.out, data)
    return Report("bench load", data, facts=_facts(data), tables=(_table(data),), warnings=_warnings(still_cached))


def _in_turns(
    works: Mapping[str, Callable[[], int]], files: Sequence[Path], rounds: int, device: str
) -> tuple[dict[tuple[bool, str], list[float]], float, int]:
    """GB/s of each of ``works``, which return bytes, without ``files`` in the page cache (True) and with; the most of the files that stayed
    there all the same; by how much memory rose at most in the last of ``works``."""
    timed: dict[tuple[bool, str], list[float]] = {}
    stayed, rise = 0.0, 0
    for cold in (True, False) * rounds:
        if not cold:
            _read(files, keep=False)
        for what, work in works.items():
            if cold:
                _drop(files)
                stayed = max(stayed, _cached(files))
            with _peak() as memory:
                began = time.perf_counter()
                nbytes = work()
                if device == "cuda":
                    torch.cuda.synchronize()
                timed.setdefault((cold, what), []).append(nbytes / (time.perf_counter() - began) / 1e9)
        rise = max(rise, memory[0])
    return timed, stayed, rise


def _facts(data: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    cpu = data["device"] == "cpu"
    where = "the memory where weights stay" if cpu else f"{data['staging_bytes'] >> 20} MiB of page-locked buffers"
    beside = max(0, data["host_bytes"] - (data["weight_bytes"] if cpu else 0))
    return (
        ("model", f"{data['model']}, rank {data['rank']} of {data['tp']}, {data['dtype']} on {data['device']}"),
        ("bytes", f"{data['bytes'] / 1e9:.3f} GB; its files: {data['files']}, {data['file_bytes'] / 1e9:.3f} GB"),
        ("reads", f"{data['readers']} of {data['chunk_bytes'] >> 20} MiB at once, into {where}"),
        ("memory", f"weights {data['weight_bytes'] / 1e9:.3f} GB, on the host at most {beside / 1e9:.3f} GB beside them"),
    )


def _table(data: dict[str, Any]) -> Table:
    rows = [
        ("dropped" if one["dropped"] else "kept", one["what"], round(one["seconds"], 3), round(one["median"], 2), f"{one['share']:.0%}")
        for one in data["figures"]
    ]
    return Table("Loading", ("page cache", "what", "seconds", "GB/s", "of a plain read"), tuple(rows))


def _warnings(still_cached: float) -> tuple[str, ...]:
    if still_cached <= COLD:
        return ()
    return (f"{still_cached:.0%} of the files stayed in the page cache when it was dropped: those rows are not of a cold start",)


def _read(files: Sequence[Path], *, keep: bool) -> int:
    """Read ``files`` from end to end as loading does, several pieces at once; the bytes. ``keep``: each into memory of its own, as weights
    on a CPU are, that of one file at a time; else into buffers that are used again and again. What raises leaves no piece in the queue."""
    own = threading.local()

    def fill(path: Path, begin: int, out: NDArray[np.uint8] | None, nbytes: int) -> None:
        if out is None:
            if not hasattr(own, "buffer"):
                own.buffer = np.empty(CHUNK_BYTES, np.uint8)
            out = own.buffer[:nbytes]
        fs.read_rows(path, begin, nbytes, out.reshape(1, -1))

    with ThreadPoolExecutor(READERS) as pool:
        reads, total = list[Future[None]](), 0
        try:
            for path in files:
                size = fs.file_size(path)
                whole = np.empty(size, np.uint8) if keep else None
                for begin in range(0, size, CHUNK_BYTES):
                    end = min(begin + CHUNK_BYTES, size)
                    reads.append(pool.submit(fill, path, begin, None if whole is None else whole[begin:end], end - begin))
                total += size
                if keep:
                    _finish(reads)
            _finish(reads)
        finally:
            pool.shutdown(cancel_futures=True)
    return total


def _finish(reads: list[Future[None]]) -> None:
    """Wait for ``reads``, and forget them. Raises what one of them raises."""
    for each in reads:
        each.result()
    reads.clear()


def _drop(files: Sequence[Path]) -> None:
    """Ask the kernel to forget ``files``."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _cached(files: Sequence[Path]) -> float:
    """The share of the pages of ``files`` that the page cache holds, as mincore(2) says; 1 where it does not say."""
    held = pages = 0
    for path in files:
        found = np.ones(-(-fs.file_size(path) // mmap.PAGESIZE), np.uint8)
        # A file that cannot be mapped, as of some network file systems, counts as held.
        with suppress(OSError), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            start = ctypes.c_char.from_buffer(mapped)  # never read: only asked about
            address, answer = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_void_p(found.ctypes.data)
            ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapped)), answer)
            del start
        held, pages = held + int((found & 1).sum()), pages + len(found)
    return held / pages


@contextmanager
def _peak() -> Iterator[list[int]]:
    """By how many bytes this process's memory rises within, at its height: the one item of the list, afterwards."""
    statm, rise, done = Path("/proc/self/statm"), [0], threading.Event()

    def resident() -> int:
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            rise[0] = max(rise[0], resident() - before)

    before = resident()
    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield rise
    finally:
        done.set()
        thread.join()
