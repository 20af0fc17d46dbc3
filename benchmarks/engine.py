"""How fast is the engine on a GPU, and what is it bound by?

Writes a random model of a real one's shapes (bfloat16, or 4-bit GPTQ of group 128), loads it as a user would, and runs batches of
BATCH prompts of 512 tokens with 256 tokens of answer. Decoding alone is timed from the moment when the last of a batch has its first
token until the first has its last. Beside each figure stands what reading the weights and the keys and values once per token would
take at this GPU's measured read speed. One JSON line per run goes to OUT/engine.jsonl.

    python benchmarks/engine.py --shape llama-3-8b --layouts bf16,int4 --batches 1,128 --out results
    python benchmarks/engine.py --shape qwen2.5-14b --layouts bf16 --batches 1 --tp 1,2 --out results
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantkit.commands.bench_requests import Load, Timed, asks
from quantkit.commands.bench_throughput import timed
from quantkit.progress import silent
from quantkit.runtime.llm import LLM

SHAPES = {
    "llama-3-8b": ("llama", 4096, 14336, 32, 8, 32, 128256),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 4, 28, 152064),
    "qwen2.5-14b": ("qwen2", 5120, 13824, 40, 8, 48, 152064),
}
"""Family, hidden, FFN, heads, KV heads, layers, vocabulary."""
GROUP = 128
TOKENIZER = Path(__file__).parent.parent / "tests" / "data" / "models" / "llama"


def write_model(root: Path, shape: str, layout: str, layers: int | None) -> None:
    """Random weights in one file per block, written by several threads."""
    family, hidden, ffn, heads, kv, depth, vocab = SHAPES[shape]
    depth, head = layers or depth, hidden // heads
    root.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, root / name)
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": ["LlamaForCausalLM" if family == "llama" else "Qwen2ForCausalLM"],
        "num_hidden_layers": depth,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16" if layout == "bf16" else "float16",
    }
    if layout == "int4":
        facts = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
        config["quantization_config"] = facts
    (root / "config.json").write_text(json.dumps(config))
    dtype = torch.bfloat16 if layout == "bf16" else torch.float16
    q, small = heads * head, kv * head
    shapes = {
        **{f"self_attn.{name}_proj": (n, hidden) for name, n in (("q", q), ("k", small), ("v", small))},
        "self_attn.o_proj": (hidden, q),
        **{f"mlp.{name}_proj": (ffn, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, ffn),
    }

    def matrix(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, device="cuda") * k**-0.5).to(dtype).cpu()

    def linear(name: str, n: int, k: int) -> dict[str, torch.Tensor]:
        bias = {f"{name}.bias": torch.zeros(n, dtype=dtype)} if family == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj") else {}
        if layout == "bf16":
            return {f"{name}.weight": matrix(n, k), **bias}
        code = torch.randint(-(2**31), 2**31 - 1, (k // 8, n), dtype=torch.int64, device="cuda").to(torch.int32).cpu()
        parts = {
            "qweight": code,
            "qzeros": torch.full((k // GROUP, n // 8), 0x77777777, dtype=torch.int32),
            "scales": torch.full((k // GROUP, n), k**-0.5 / 4.6, dtype=torch.float16),
            "g_idx": (torch.arange(k) // GROUP).to(torch.int32),
        }
        return {f"{name}.{part}": value for part, value in parts.items()} | bias

    def write(index: int) -> dict[str, str]:
        if index == depth:
            tensors = {f"{name}.weight": matrix(vocab, hidden) for name in ("model.embed_tokens", "lm_head")}
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
        else:
            prefix, tensors = f"model.layers.{index}", {}
            for name, size in shapes.items():
                tensors |= linear(f"{prefix}.{name}", *size)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        file = f"model-{index + 1:05d}-of-{depth + 1:05d}.safetensors"
        save_file(tensors, root / file, metadata={"format": "pt"})
        return dict.fromkeys(tensors, file)

    torch.manual_seed(0)
    with ThreadPoolExecutor(8) as pool:
        maps = list(pool.map(write, range(depth + 1)))
    weight_map = {name: file for each in maps for name, file in each.items()}
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.cuda.empty_cache()


def read_speed() -> float:
    """Bytes per second of a sum over 4 GiB, the best of ten."""
    data, best = torch.ones(1 << 31, dtype=torch.float16, device="cuda"), 0.0
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        data.sum()
        end.record()
        end.synchronize()
        best = max(best, data.nbytes / start.elapsed_time(end) * 1e3)
    del data
    torch.cuda.empty_cache()
    return best


def decoding(answers: list[Timed]) -> tuple[float, float]:
    """Tokens per second, and the median seconds of a step, while all of a batch decode."""
    first, last = max(answer.came[0] for answer in answers), min(answer.came[-1] for answer in answers)
    tokens = sum(sum(first < when <= last for when in answer.came) for answer in answers)
    gaps = [b - a for answer in answers for a, b in zip(answer.came, answer.came[1:], strict=False) if first < b <= last]
    return tokens / (last - first), statistics.median(gaps)


def profiled(llm: LLM, batch: int, args: argparse.Namespace) -> list[tuple[str, int, float]]:
    """Kernels of a run by their share: (name, launches, seconds)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        timed(llm, asks(Load(batch, 32, 64, 0.0, 99)), silent)
    rows = [(event.key[:70], event.count, event.self_device_time_total / 1e6) for event in found.key_averages()]
    return sorted(rows, key=lambda row: -row[2])[: args.profile]


def measure(root: Path, args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """All batches on one engine; prints and writes a line for each."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    options: dict[str, Any] = {"tp": facts["tp"], "dtype": "bfloat16", "max_model_len": 2048, "max_num_batched_tokens": args.step_tokens}
    with LLM(str(root), max_num_seqs=max(args.batches), lm_head=args.lm_head, **options) as llm:
        load = time.perf_counter() - start
        stats = llm.engine.stats()
        facts |= {"load_seconds": round(load, 1), "weight_bytes": sum(stats.weight_bytes), "kv_tokens": stats.kv_tokens_total}
        facts |= {"card": torch.cuda.get_device_name(0), "torch": torch.__version__, "lm_head": args.lm_head}
        timed(llm, asks(Load(2, 64, 8, 0.0, 7)), silent)
        for batch in args.batches:
            timed(llm, asks(Load(batch, 16, 4, 0.0, 7)), silent)
            runs = []
            for seed in range(args.rounds):
                answers, seconds = timed(llm, asks(Load(batch, args.input_len, args.output_len, 0.0, seed)), silent)
                runs.append(
                    (*decoding(answers), batch * args.output_len / seconds, statistics.median(answer.came[0] for answer in answers))
                )
            rate, step, whole, first = max(runs)
            held = facts["weight_bytes"] - facts["embedding_bytes"]
            read = held + batch * (args.input_len + args.output_len / 2) * sum(stats.kv_bytes_per_token)
            floor = read / facts["tp"] / facts["read_speed"]
            line = facts | {"batch": batch, "input": args.input_len, "output": args.output_len, "decode_tokens_per_second": round(rate, 1)}
            line |= {"step_ms": round(step * 1e3, 3), "floor_ms": round(floor * 1e3, 3), "tokens_per_second": round(whole, 1)}
            line |= {"first_token_ms": round(first * 1e3, 1)}
            with (args.out / "engine.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"{facts['shape']} {facts['layout']} tp {facts['tp']} batch {batch}: decode {rate:.1f} tok/s, step {step * 1e3:.2f} ms"
                f" (floor {floor * 1e3:.2f}), whole {whole:.1f} tok/s, first {first * 1e3:.0f} ms, load {load:.1f} s,"
                f" kv {stats.kv_tokens_total}",
                flush=True,
            )
            if args.profile:
                for name, count, spent in profiled(llm, batch, args):
                    print(f"    {spent * 1e3:8.2f} ms {count:6d} {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--layouts", default="bf16,int4", help="bf16, int4")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--batches", type=numbers, default=[1, 128])
    parser.add_argument("--tp", type=numbers, default=[1])
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--step-tokens", type=int, default=4096)
    parser.add_argument("--lm-head", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N kernels that take most time")
    parser.add_argument("--work", type=Path, help="where models are written and found again")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    speed = read_speed()
    _, hidden, *_, vocab = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as scratch:
        for layout in args.layouts.split(","):
            root = (args.work or Path(scratch)) / f"{args.shape}-{layout}-{args.layers or 'all'}"
            if not root.exists():
                start, partial = time.perf_counter(), root.with_name(f"{root.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                write_model(partial, args.shape, layout, args.layers)
                partial.rename(root)
                print(f"wrote {root.name} in {time.perf_counter() - start:.1f} s", flush=True)
            for tp in args.tp:
                facts = {"shape": args.shape, "layout": layout, "layers": args.layers, "tp": tp, "read_speed": speed}
                measure(root, args, facts | {"embedding_bytes": 2 * hidden * vocab})
            if args.work is None:
                shutil.rmtree(root)


if __name__ == "__main__":
    main()
