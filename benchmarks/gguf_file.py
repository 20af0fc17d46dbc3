"""How long does a whole GGUF file take on this machine, and how much of that is reading and writing?

Writes a random checkpoint of LAYERS layers of Llama-3-8B's shapes (bfloat16), makes every TYPE of it on every DEVICE, and times beside it
what no program can do without: reading the checkpoint once, and writing and syncing as many bytes as the file has. One JSON line per file
goes to OUT/gguf_file.jsonl.

    python benchmarks/gguf_file.py --layers 8 --types q4_k_m,q6_k --devices cuda,cpu --tokenizer tests/data/models/llama --out results
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_quantize import SHAPES, write_model

CHUNK = 16 << 20


def seconds_to_read(root: Path) -> float:
    begin = time.monotonic()
    for path in sorted(root.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK):
                pass
    return time.monotonic() - begin


def seconds_to_write(path: Path, nbytes: int) -> float:
    chunk = os.urandom(CHUNK)
    begin = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for start in range(0, nbytes, CHUNK):
            file.write(chunk[: min(CHUNK, nbytes - start)])
        os.fsync(file.fileno())
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--types", default="q4_k_m,q6_k")
    parser.add_argument("--devices", default="cuda")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        model = Path(scratch) / "model"
        write_model(model, options.shape, options.layers, options.vocab, options.tokenizer, "cuda" if "cuda" in options.devices else "cpu")
        for kind in options.types.split(","):
            for device in options.devices.split(","):
                out = Path(scratch) / f"{kind}-{device}.gguf"
                command = [sys.executable, "-m", "quantkit", "quantize", model, out, "--method", "gguf", "--type", kind, "--device", device]
                begin = time.monotonic()
                done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, check=False)
                wall = time.monotonic() - begin
                if done.returncode:
                    print(kind, device, "failed:", done.stderr[-2000:])
                    continue
                found = json.loads(done.stdout)
                size = out.stat().st_size
                out.unlink()
                line = {
                    "type": kind,
                    "device": found["device"],
                    "cores": len(os.sched_getaffinity(0)),
                    "shape": options.shape,
                    "layers": options.layers,
                    "weights": found["weights"],
                    "bytes_read": found["bytes_before"],
                    "bytes_written": size,
                    "wall_seconds": round(wall, 2),
                    "seconds": round(found["seconds"], 2),
                    "read_seconds": round(seconds_to_read(model), 2),
                    "write_seconds": round(seconds_to_write(out, size), 2),
                    "million_weights_per_second": round(found["weights"] / found["seconds"] / 1e6, 1),
                }
                out.unlink()
                print(json.dumps(line), flush=True)
                with (options.out / "gguf_file.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
