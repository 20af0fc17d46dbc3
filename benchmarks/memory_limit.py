"""Does a checkpoint larger than the memory given work, and how much of it does a run really take?

Writes a random checkpoint of LAYERS layers of a shape's widths, file by file, and runs ``quantkit quantize`` on it as a process whose
memory is limited to LIMIT GiB by RLIMIT_DATA: an allocation beyond it fails. Files are read, never mapped, so all that the process
holds is counted, but for the activations that ``--offload`` maps from a file. With ``--blocks`` the run is ended (resumably) once so
many blocks are committed; otherwise it is run to its end and ``quantkit verify`` must pass. One JSON line per method goes to
OUT/memory_limit.jsonl: the limit, the sizes, the peak of resident memory (VmHWM, of which RssAnon), and the seconds of each block.

    python benchmarks/memory_limit.py --shape llama-1.1b --limit 1.5 --methods gptq,nf4 --tokenizer tests/data/models/llama --out results
    python benchmarks/memory_limit.py --shape qwen2-72b --layers 9 --blocks 1 --limit 14 --tokenizer tests/data/models/llama --out results
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_quantize import CALIBRATED, SHAPES, method_options, write_model, write_text

SHAPES["llama-1.1b"] = (2048, 5632, 32, 4, 22)
POLL_SECONDS = 0.1
ENDED = 128 + signal.SIGTERM
LIMITED = (
    "import os, resource, sys; n = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_DATA, (n, n)); os.execv(sys.argv[2], sys.argv[2:])"
)
"""Limits itself, then becomes the command: its peak is then its own, whatever started it."""


@dataclass
class Ran:
    """How a limited process went: ``peak`` in bytes; of each commit, after how many seconds it came and the most anonymous memory
    that was resident since the one before (at the end, since the last)."""

    code: int
    seconds: float
    peak: int
    blocks: list[float]
    anonymous: list[int]
    output: str
    errors: str


def _status(pid: int) -> dict[str, int]:
    """The memory lines of a process's status in bytes; empty when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _committed(out: Path) -> int:
    """The units that a run has committed so far: the lines of its journal after the first."""
    journal = out.with_name(f"{out.name}.partial") / "journal"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def run_limited(command: list[str], out: Path, limit: int, stop_after: int | None, scratch: Path) -> Ran:
    """Run ``command``, which writes ``out``, within ``limit`` bytes; end it once ``stop_after`` blocks are committed."""
    begin, peak, anonymous, blocks, ending = time.monotonic(), 0, [0], list[float](), False
    with (scratch / "stdout").open("w+") as stdout, (scratch / "stderr").open("w+") as stderr:
        child = subprocess.Popen([sys.executable, "-c", LIMITED, str(limit), *command], stdout=stdout, stderr=stderr)
        while child.poll() is None:
            state = _status(child.pid)
            peak, anonymous[-1] = max(peak, state.get("VmHWM", 0)), max(anonymous[-1], state.get("RssAnon", 0))
            new = max(0, _committed(out) - len(blocks))
            blocks += [time.monotonic() - begin] * new
            anonymous += [0] * new
            if stop_after is not None and len(blocks) >= stop_after and not ending:
                ending = True
                child.send_signal(signal.SIGTERM)
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - begin
        stdout.seek(0)
        stderr.seek(0)
        return Ran(child.returncode, seconds, peak, blocks, anonymous, stdout.read(), stderr.read())


def _gib(size: float) -> float:
    return round(size / 2**30, 2)


def _measure(options: argparse.Namespace, model: Path, text: Path, method: str, scratch: Path) -> dict[str, Any]:
    """One method under the limit. Ends the program with what it said when it failed, and with its defects when verify does."""
    out, limit = scratch / method, int(options.limit * 2**30)
    command = [sys.executable, "-m", "quantkit", "quantize", str(model), str(out), "--method", method, "--device", "cpu", "--json", "-q"]
    calibrated = method in CALIBRATED
    if calibrated:
        command += ["--calib", str(text), "--samples", str(options.samples), "--seq-len", str(options.seq_len)]
        command += ["--compute-dtype", options.compute_dtype, *(["--offload"] if options.offload else [])]
    extra = method_options(method, options.option)
    extra += [item for rule in options.override for item in ("--override", rule)]
    ran = run_limited([*command, *extra], out, limit, options.blocks, scratch)
    if ran.code != (0 if options.blocks is None else ENDED):
        sys.exit(f"{method} under {options.limit} GiB failed with {ran.code} after {len(ran.blocks)} blocks:\n{ran.errors[-3000:]}")
    if options.blocks is None:
        check = [sys.executable, "-m", "quantkit", "verify", str(out), *(["--deep"] if options.deep else []), "--json", "-q"]
        verified = run_limited(check, out, limit, None, scratch)
        if verified.code:
            sys.exit(f"verify of {method} failed with {verified.code}:\n{verified.output[-3000:]}{verified.errors[-3000:]}")
    hidden, *_, whole = SHAPES[options.shape]
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    block = (model / f"model-00001-of-{options.layers + 1:05d}.safetensors").stat().st_size
    tokens = options.samples * options.seq_len if calibrated else 0
    per_block = [after - before for before, after in zip(ran.blocks, ran.blocks[1 : options.layers], strict=False)]
    return {
        "method": method,
        "shape": options.shape,
        "layers": options.layers,
        "blocks_run": options.blocks or options.layers,
        "enforced": "RLIMIT_DATA",
        "limit_gib": options.limit,
        "checkpoint_gib": _gib(size),
        "whole_checkpoint_gib": _gib(size + block * (whole - options.layers)),
        "block_bf16_gib": _gib(block),
        "peak_rss_gib": _gib(ran.peak),
        "anonymous_gib_by_block": [_gib(size) for size in ran.anonymous[: options.blocks or options.layers]],
        "seconds": round(ran.seconds, 1),
        "first_block_after_seconds": round(ran.blocks[0], 1),
        "seconds_per_block": round(sum(per_block) / len(per_block), 1) if per_block else None,
        "verified": None if options.blocks is not None else "deep" if options.deep else "shallow",
        "verify_peak_rss_gib": None if options.blocks is not None else _gib(verified.peak),
        "tokens": tokens,
        "activations_gib": _gib(tokens * hidden * (2 if options.compute_dtype == "bfloat16" else 4)),
        "extra": [*extra, *(["--offload"] if options.offload and calibrated else [])],
        "compute_dtype": options.compute_dtype if calibrated else None,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.1b")
    parser.add_argument("--layers", type=int, help="default: all of the shape's")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--methods", default="gptq,nf4")
    parser.add_argument("--limit", type=float, required=True, help="GiB")
    parser.add_argument("--blocks", type=int, help="end the run once so many blocks are committed")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--compute-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--deep", action="store_true", help="verify --deep")
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--override", action="append", default=[])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--model", type=Path, help="keep the checkpoint here, and use the one that is there")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.layers = options.layers or SHAPES[options.shape][-1]
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        model, text = options.model or scratch / "model", scratch / "text.txt"
        if not model.exists():
            write_model(model, options.shape, options.layers, options.vocab, options.tokenizer, "cpu")
        write_text(text, options.tokenizer)
        for method in options.methods.split(","):
            line = _measure(options, model, text, method, scratch)
            print(json.dumps(line), flush=True)
            with (options.out / "memory_limit.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            for left in (scratch / method, scratch / f"{method}.partial"):
                shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    main()
