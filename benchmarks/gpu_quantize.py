"""How long does one GPU take to quantize a model of Llama-3-8B's shapes (or Qwen2-72B's), and how much of it does that need?

Writes a random checkpoint of LAYERS layers (bfloat16, a vocabulary of VOCAB), calibrates on random words, runs the methods one
after the other, each on every number of DEVICES, and extrapolates to the whole model's layers. One JSON line per run goes to
OUT/gpu_quantize.jsonl.

    python benchmarks/gpu_quantize.py --layers 8 --methods rtn,nf4,gptq,awq --tokenizer tests/data/models/llama --out results
    python benchmarks/gpu_quantize.py --layers 4 --methods gptq --devices 1,2 --tokenizer tests/data/models/llama --out results
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"llama-3-8b": (4096, 14336, 32, 8, 32), "qwen2-72b": (8192, 29568, 64, 8, 80)}
"""Hidden, FFN, heads, KV heads, layers."""
CALIBRATED = ("gptq", "awq", "w8a8")


def method_options(method: str, given: list[str]) -> list[str]:
    """The arguments for those of the options ``given``, METHOD.NAME=VALUE, that are the method's."""
    return [item for option in given if option.startswith(f"{method}.") for item in ("--option", option)]


def write_model(root: Path, shape: str, layers: int, vocab: int, tokenizer: Path, device: str) -> None:
    """A Llama of ``layers`` layers of a shape's widths, random weights: one file per layer."""
    hidden, ffn, heads, kv, _ = SHAPES[shape]
    torch.manual_seed(0)
    root.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, root / name)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (root / "config.json").write_text(json.dumps(config))

    def matrix(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, device=device) * k**-0.5).to(torch.bfloat16).cpu()

    head = hidden // heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv * head, hidden),
        "self_attn.v_proj": (kv * head, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    weight_map: dict[str, str] = {}
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    for index in range(layers + 1):
        if index < layers:
            prefix = f"model.layers.{index}."
            tensors = {f"{prefix}{name}.weight": matrix(n, k) for name, (n, k) in shapes.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {f"{prefix}{norm}.weight": ones.clone() for norm in norms}
        else:
            tables = ("model.embed_tokens.weight", "lm_head.weight")
            tensors = {**{name: matrix(vocab, hidden) for name in tables}, "model.norm.weight": ones}
        file = f"model-{index + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, root / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_text(path: Path, tokenizer: Path) -> None:
    """Random text of the tokenizer's own words, long enough for any of the runs."""
    words = [w for w in json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"] if w.isascii() and w.isalpha()]
    chosen = random.Random(0).choices(words, k=600_000)
    path.write_text(" ".join(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--methods", default="rtn,nf4,gptq,awq")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--devices", default="1", help="numbers of GPUs, with commas between them")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        model, text = Path(scratch) / "model", Path(scratch) / "text.txt"
        write_model(model, options.shape, options.layers, options.vocab, options.tokenizer, options.device)
        write_text(text, options.tokenizer)
        for method, devices in itertools.product(options.methods.split(","), map(int, options.devices.split(","))):
            out = Path(scratch) / f"{method}-{devices}"
            calibrated = method in CALIBRATED
            calibration = ("--calib", text, "--samples", options.samples, "--seq-len", options.seq_len) if calibrated else ()
            extra = method_options(method, options.option)
            where = ("--device", options.device, "--devices", devices)
            command = [sys.executable, "-m", "quantkit", "quantize", model, out, "--method", method, *where, "--json"]
            begin = time.monotonic()
            done = subprocess.run([*map(str, [*command, *calibration, *extra])], capture_output=True, text=True, check=False)
            wall = time.monotonic() - begin
            if done.returncode:
                print(method, devices, "failed:", done.stderr[-2000:])
                continue
            found = json.loads(done.stdout)
            found = found.get("data", found)
            blocks = json.loads((out / "quantkit.json").read_text())["blocks"]
            line = {
                "method": method,
                "devices": devices,
                "gpu": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
                "torch": torch.__version__,
                "shape": options.shape,
                "layers": options.layers,
                "tokens": options.samples * options.seq_len if calibrated else 0,
                "wall_seconds": round(wall, 1),
                "seconds": round(found["seconds"], 1),
                "extrapolated_minutes": round(wall / options.layers * SHAPES[options.shape][-1] / 60, 2),
                "peak_gpu_gib": round(found.get("peak_device_bytes", 0) / 2**30, 2),
                "peak_host_gib": round(found["peak_memory_bytes"] / 2**30, 2),
                "output_error_layer_0": {role: facts.get("output_error") for role, facts in blocks["0"].items()},
            }
            print(json.dumps(line), flush=True)
            with (options.out / "gpu_quantize.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
