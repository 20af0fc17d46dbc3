"""The same checkpoint quantized by other people's tools, on the same calibration tokens, for quantkit to be measured against.

    python benchmarks/reference_quality.py tokens BASE TOKENS [--samples 128] [--seq-len 512]      in quantkit's environment
    python benchmarks/reference_quality.py all BASE TOKENS OUT [--only NAME ...]                   every run below, one after the other
    ENVIRONMENT/bin/python benchmarks/reference_quality.py make NAME BASE TOKENS OUT [--device cuda]   one run, in its tool's environment

TOKENS is JSON: windows of token ids of quantkit's built-in calibration text. `all` runs each tool in its environment of tests/oracles
(`make -C tests/oracles envs` builds them), at the lowest priority on one thread, and appends a line per run to OUT/runs.jsonl. OUT/NAME is
an artifact as the tool saves it, with its tokenizer.

4 bits in groups of 64, every other setting the tool's default. The models run in float32, since a CPU without AVX512 needs minutes for
what it does in seconds there; what a tool leaves in float32 is then stored as float16 when the base is. Beside a base in bfloat16,
whose values float16 may not hold, it stays float32, so that no rounding of ours is charged to the tool. AutoAWQ 0.2.9 has no Gemma 3,
and gptqmodel's AWQ fails on it ("Gemma3RotaryEmbedding.forward() missing 1 required positional argument: 'layer_type'").
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Windows = list[list[int]]
GROUP = 64


def gptqmodel_save(base: Path, windows: Windows, out: Path, settings: dict[str, Any], backend: str, device: str) -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    # A dtype given as a string is ignored, and bfloat16 taken.
    model = GPTQModel.load(str(base), QuantizeConfig(bits=4, group_size=GROUP, **settings), dtype=torch.float32, device=device)
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    model.quantize(calibration, batch_size=1, backend=getattr(BACKEND, backend))
    model.save(str(out))
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def gptqmodel_gptq(base: Path, windows: Windows, out: Path, sym: bool, device: str) -> None:
    gptqmodel_save(base, windows, out, {"method": "gptq", "format": "gptq", "desc_act": False, "sym": sym}, "AUTO", device)


def gptqmodel_awq(base: Path, windows: Windows, out: Path, sym: bool, device: str) -> None:
    import torch
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # type: ignore[import-not-found]

    AwqTorchLinear.SUPPORTS_DTYPES = [*AwqTorchLinear.SUPPORTS_DTYPES, torch.float32]  # its packer does; its kernel, not run here, may not
    gptqmodel_save(base, windows, out, {"method": "awq", "format": "gemm", "sym": sym}, "AWQ_TORCH", device)


def autoawq(base: Path, windows: Windows, out: Path, sym: bool, device: str) -> None:
    import torch
    from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoAWQForCausalLM.from_pretrained(str(base), torch_dtype=torch.float32, device_map=device, safetensors=True)
    length = max(map(len, windows))
    settings = {"zero_point": not sym, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
    model.quantize(tokenizer, quant_config=settings, calib_data=windows, max_calib_samples=len(windows), max_calib_seq_len=length)
    model.save_quantized(str(out))
    tokenizer.save_pretrained(out)


def llmcompressor_save(
    base: Path, windows: Windows, out: Path, modifiers: Callable[[dict[str, Any]], list[Any]], sym: bool, device: str
) -> None:
    import torch
    from datasets import Dataset  # type: ignore[import-not-found]
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = {"num_bits": 4, "type": "int", "symmetric": sym, "strategy": "group", "group_size": GROUP}
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map=device)
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=modifiers(scheme),
        max_seq_length=max(map(len, windows)),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def llmcompressor_gptq(base: Path, windows: Windows, out: Path, sym: bool, device: str) -> None:
    def modifiers(scheme: dict[str, Any]) -> list[Any]:
        from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]

        return [GPTQModifier(**scheme)]

    llmcompressor_save(base, windows, out, modifiers, sym, device)


def llmcompressor_awq(base: Path, windows: Windows, out: Path, sym: bool, device: str) -> None:
    def modifiers(scheme: dict[str, Any]) -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]
        from llmcompressor.modifiers.transform.awq import AWQModifier  # type: ignore[import-not-found]
        from llmcompressor.pipelines.cache import IntermediatesCache  # type: ignore[import-not-found]

        if device == "cpu":
            IntermediatesCache.pin_memory = lambda *_, **__: None  # it pins for a GPU, and raises where there is none
        return [AWQModifier(), QuantizationModifier(**scheme)]

    llmcompressor_save(base, windows, out, modifiers, sym, device)


@dataclass(frozen=True, slots=True)
class Run:
    """One artifact: who makes it, in which environment, with symmetric groups or not."""

    environment: str
    make: Callable[[Path, Windows, Path, bool, str], None]
    sym: bool


RUNS = {
    "gptqmodel-gptq": Run("gptqmodel", gptqmodel_gptq, True),
    "llmcompressor-gptq": Run("llmcompressor", llmcompressor_gptq, True),
    "autoawq-awq-asym": Run("autoawq", autoawq, False),
    "llmcompressor-gptq-asym": Run("llmcompressor", llmcompressor_gptq, False),
    "gptqmodel-gptq-asym": Run("gptqmodel", gptqmodel_gptq, False),
    "llmcompressor-awq-asym": Run("llmcompressor", llmcompressor_awq, False),
    "gptqmodel-awq-asym": Run("gptqmodel", gptqmodel_awq, False),
}


def store(artifact: Path, dtype: str) -> None:
    """Every float32 tensor of the artifact as ``dtype``, float16 or float32, and a config that says so."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in sorted(artifact.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {"format": "pt"}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if any(value.dtype == torch.bfloat16 for value in tensors.values()):
            raise ValueError(f"{path}: holds bfloat16, so the tool did not run the model in float32")
        if dtype == "float32":
            continue
        halves = {name: value.half() if value.dtype == torch.float32 else value for name, value in tensors.items()}
        if any(bool(value.isinf().any()) for value in halves.values() if value.dtype == torch.float16):
            raise ValueError(f"{path}: a value is too large for float16")
        save_file({name: value.contiguous() for name, value in halves.items()}, path, metadata)
    config = json.loads((artifact / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (artifact / "config.json").write_text(json.dumps(config, indent=2))


def check(artifact: Path) -> None:
    """Raises ValueError when the artifact lacks what makes it one."""
    config = json.loads((artifact / "config.json").read_text())
    if "quant_method" not in config.get("quantization_config", {}):
        raise ValueError(f"{artifact}: config.json has no quantization_config")
    for name in ("tokenizer.json", "model.safetensors"):
        if not (artifact / name).is_file():
            raise ValueError(f"{artifact}: has no {name}")


def make(name: str, base: Path, tokens: Path, out: Path, device: str = "cpu") -> None:
    """One artifact, in this environment."""
    windows: Windows = json.loads(tokens.read_text())
    RUNS[name].make(base, windows, out, RUNS[name].sym, device)
    store(out, "float16" if json.loads((base / "config.json").read_text())["dtype"] == "float16" else "float32")
    check(out)


def run_all(base: Path, tokens: Path, out: Path, names: list[str]) -> int:
    """Every run that has no artifact yet; the number of those that failed."""
    environments = Path(__file__).resolve().parent.parent / "tests" / "oracles" / ".venv"
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": ""}
    base, tokens, out = base.resolve(), tokens.resolve(), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        artifact, partial = out / name, out / f"{name}.part"
        if artifact.exists():
            print(f"{name}: is there", flush=True)
            continue
        shutil.rmtree(partial, ignore_errors=True)
        python = environments / RUNS[name].environment / "bin" / "python"
        command = [str(python), "-W", "ignore", str(Path(__file__).resolve()), "make", name, str(base), str(tokens), str(partial)]
        print(f"{name}: begins {time.strftime('%H:%M:%S')}", flush=True)
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        with (out / f"{name}.log").open("w") as log:
            code = subprocess.run(
                ["nice", "-n", "19", *command],
                env={**os.environ, **variables},
                cwd=out,  # where the tools may put logs
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        line = {"run": name, "exit": code, "seconds": round(time.monotonic() - start), "cpu_seconds": round(cpu), "sym": RUNS[name].sym}
        with (out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: exit {code} after {line['seconds']} s", flush=True)
        if code:
            failed += 1
        else:
            partial.rename(artifact)
    return failed


def write_tokens(base: Path, out: Path, samples: int, seq_len: int) -> None:
    from quantkit.quantizers.calibration import text_tokens
    from quantkit.text.tokenizer import load_tokenizer

    out.write_text(json.dumps(text_tokens(load_tokenizer(base), "builtin", samples, seq_len).tokens.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("tokens")
    for name in ("base", "tokens"):
        task.add_argument(name, type=Path)
    task.add_argument("--samples", type=int, default=128)
    task.add_argument("--seq-len", type=int, default=512)
    task = tasks.add_parser("make")
    task.add_argument("name", choices=list(RUNS))
    for name in ("base", "tokens", "out"):
        task.add_argument(name, type=Path)
    task.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    task = tasks.add_parser("all")
    for name in ("base", "tokens", "out"):
        task.add_argument(name, type=Path)
    task.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    given = parser.parse_args()
    if given.task == "tokens":
        write_tokens(given.base, given.tokens, given.samples, given.seq_len)
    elif given.task == "make":
        make(given.name, given.base, given.tokens, given.out, given.device)
    else:
        sys.exit(bool(run_all(given.base, given.tokens, given.out, given.only)))


if __name__ == "__main__":
    main()
