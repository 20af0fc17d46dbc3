"""Every option reaches its command, and the command line has no defaults of its own.

The command's work is not done here: its ``run`` is caught, and the options that came to it are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from quantkit.commands.bench_requests import Load
from quantkit.commands.generate import EngineOptions
from quantkit.commands.quantize_gguf import GgufChoices
from quantkit.report import Report
from quantkit.runtime.params import SamplingParams

Run = Callable[..., Any]

CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "inspect": (
        "m",
        {"path": "m"},
        "--tensors --plot w.png --tensor a --tensor b",
        {"tensors": True, "plot": Path("w.png"), "tensor": ("a", "b")},
    ),
    "plan": (
        "m --tp 3",
        {"path": "m", "tp": 3},
        (
            "--method awq --bits 3 --group-size 32 --gpu-memory 24GiB --max-model-len 99 --lm-head q8_0 --max-num-seqs 3 "
            "--max-num-batched-tokens 64 --gpu-memory-utilization 0.5 --kv-cache-dtype fp8"
        ),
        {"method": "awq", "bits": 3, "group_size": 32, "gpu_memory": "24GiB", "max_model_len": 99, "lm_head": "q8_0"}
        | {"max_num_seqs": 3, "max_num_batched_tokens": 64, "gpu_memory_utilization": 0.5, "kv_cache_dtype": "fp8"},
    ),
    "convert": (
        "m o",
        {"path": "m", "out": Path("o")},
        "--to gguf --dtype float16 --max-shard-size 24GiB --pre-tokenizer llama-bpe --overwrite",
        {"to": "gguf", "dtype": "float16", "max_shard_size": 24 << 30, "pre_tokenizer": "llama-bpe", "overwrite": True},
    ),
    "quantize": (
        "m o",
        {"path": "m", "out": Path("o")},
        (
            "--method awq --bits 3 --group-size -1 --sym --format awq --recipe r.yaml --override a:keep --override b:bits=4 --calib self "
            "--samples 7 --seq-len 9 --device cpu --max-shard-size 5MB --resume --overwrite --dry-run --option mse=false --option block=64 "
            "--inputs float --compute-dtype float16 --offload --devices 2 --for-tp 4 --type q6_k --imatrix i.gguf --pure "
            "--tensor-type a=q8_0 --tensor-type b=q5_k --output-tensor-type q8_0 --token-embedding-type q6_k --leave-output-tensor "
            "--allow-requantize --pre-tokenizer gpt-2"
        ),
        {"method": "awq", "bits": 3, "group_size": -1, "sym": True, "format": "awq", "recipe": Path("r.yaml")}
        | {"override": ("a:keep", "b:bits=4"), "calib": "self", "samples": 7, "seq_len": 9, "device": "cpu"}
        | {"max_shard_size": 5_000_000, "resume": True, "overwrite": True, "dry_run": True}
        | {"option": ("mse=false", "block=64"), "inputs": "float", "compute_dtype": "float16", "offload": True}
        | {"devices": 2, "for_tp": 4}
        | {"gguf": GgufChoices("q6_k", Path("i.gguf"), True, ("a=q8_0", "b=q5_k"), "q8_0", "q6_k", True, True, "gpt-2")},
    ),
    "imatrix": (
        "m o",
        {"path": "m", "out": Path("o")},
        "--calib t --samples 7 --seq-len 9 --format dat --output --device cpu --compute-dtype float16 --offload --overwrite",
        {"calib": "t", "samples": 7, "seq_len": 9, "format": "dat", "output": True, "device": "cpu", "compute_dtype": "float16"}
        | {"offload": True, "overwrite": True},
    ),
    "doctor": ("", {}, "--build-kernels", {"build_kernels": True}),
    "bench kernels": (
        "",
        {},
        (
            "--format int4 --format nf4 --shape l3_o --shape 128x256 --tokens 1 --tokens 9 --dtype bfloat16 --peers p.json --out o.json "
            "--tune --table t.json"
        ),
        {"formats": ("int4", "nf4"), "shapes": ("l3_o", "128x256"), "tokens": (1, 9), "dtype": "bfloat16", "peers": Path("p.json")}
        | {"out": Path("o.json"), "tune": True, "table": Path("t.json")},
    ),
    "bench load": (
        "m",
        {"path": "m"},
        "--tp 2 --rank 1 --device cpu --dtype float32 --rounds 5 --out o.json",
        {"tp": 2, "rank": 1, "device": "cpu", "dtype": "float32", "rounds": 5, "out": Path("o.json")},
    ),
    "bench throughput": (
        "m",
        {"path": "m"},
        (
            "--num-prompts 3 --input-len 4 --output-len 5 --spread 0.5 --seed 6 --out o.json --tp 2 --device cuda "
            "--dtype float32 --max-model-len 99 --max-num-seqs 3 --max-num-batched-tokens 64 --gpu-memory-utilization 0.5 "
            "--kv-cache-dtype fp8 --disable-prefix-caching --timeout 1.5 --dp 3 --executor ray --lm-head q8_0 --attention-backend torch"
        ),
        {"load": Load(3, 4, 5, 0.5, 6), "out": Path("o.json")}
        | {"engine": EngineOptions(2, "cuda", "float32", 99, 3, 64, 0.5, "fp8", False, 1.5, 3, "ray", "q8_0", "torch")},
    ),
    "bench latency": (
        "m",
        {"path": "m"},
        (
            "--batch-size 3 --input-len 4 --output-len 5 --seed 6 --rounds 7 --warmup 0 --out o.json --tp 2 --device cuda --dtype float32 "
            "--max-model-len 99 --max-num-seqs 3 --max-num-batched-tokens 64 --gpu-memory-utilization 0.5 --kv-cache-dtype fp8 "
            "--timeout 1.5 --executor ray --lm-head q8_0 --attention-backend torch"
        ),
        {"load": Load(3, 4, 5, 0.0, 6), "rounds": 7, "warmup": 0, "out": Path("o.json")}
        | {"engine": EngineOptions(2, "cuda", "float32", 99, 3, 64, 0.5, "fp8", True, 1.5, 1, "ray", "q8_0", "torch")},
    ),
    "bench serve": (
        "",
        {},
        (
            "--url http://h:1 --model m --api-key k --concurrency 2 --request-rate 0.5 --num-prompts 3 --input-len 4 --output-len 5 "
            "--spread 0.5 --seed 6 --timeout 1.5 --out o.json"
        ),
        {"url": "http://h:1", "model": "m", "api_key": "k", "concurrency": 2, "request_rate": 0.5, "timeout": 1.5, "out": Path("o.json")}
        | {"load": Load(3, 4, 5, 0.5, 6)},
    ),
    "bench study": (
        "m",
        {"path": "m"},
        (
            "--modes tp2,dp2 --data d.jsonl --examples e.jsonl --shots 3 --limit 4 --chat --max-tokens 5 --same --out o --device cuda "
            "--dtype float32 --max-model-len 99 --max-num-seqs 3 --max-num-batched-tokens 64 --gpu-memory-utilization 0.5 "
            "--kv-cache-dtype fp8 --disable-prefix-caching --timeout 1.5 --executor ray --lm-head q8_0 --attention-backend torch"
        ),
        {"modes": ("tp2", "dp2"), "data": Path("d.jsonl"), "examples": Path("e.jsonl"), "shots": 3, "limit": 4, "chat": True}
        | {"max_tokens": 5, "same": True, "out": Path("o")}
        | {"engine": EngineOptions(None, "cuda", "float32", 99, 3, 64, 0.5, "fp8", False, 1.5, 1, "ray", "q8_0", "torch")},
    ),
    "pad": (
        "m o --tp 2",
        {"path": "m", "out": Path("o"), "tp": 2},
        "--multiple 64 --max-shard-size 2GB --overwrite",
        {"multiple": 64, "max_shard_size": 2_000_000_000, "overwrite": True},
    ),
    "shard": ("m o --tp 2", {"path": "m", "out": Path("o"), "tp": 2}, "--overwrite", {"overwrite": True}),
    "unshard": ("m o", {"path": Path("m"), "out": Path("o")}, "--overwrite", {"overwrite": True}),
    "verify": ("m", {"path": "m"}, "--deep", {"deep": True}),
    "serve": (
        "m",
        {"path": "m"},
        (
            "--host ::1 --port 0 --api-key k --served-model-name n --tp 2 --device cuda --dtype float32 --max-model-len 9 --max-num-seqs 3 "
            "--max-num-batched-tokens 64 --gpu-memory-utilization 0.5 --kv-cache-dtype fp8 --disable-prefix-caching "
            "--max-queue 0 --timeout 1.5 --dp 3 --executor ray --lm-head q8_0 --attention-backend torch"
        ),
        {"host": "::1", "port": 0, "api_key": "k", "served_model_name": "n", "tp": 2, "device": "cuda", "dtype": "float32"}
        | {"max_model_len": 9, "max_num_seqs": 3, "max_num_batched_tokens": 64, "gpu_memory_utilization": 0.5}
        | {"kv_cache_dtype": "fp8", "prefix_caching": False, "max_queue": 0, "timeout": 1.5, "dp": 3, "executor": "ray"}
        | {"lm_head": "q8_0", "attention_backend": "torch"},
    ),
    "generate": (
        "m",
        {"path": "m"},
        (
            "p --prompts f.jsonl --out o.jsonl --overwrite --chat --system s --max-tokens 9 --min-tokens 2 --temperature 0.5 --top-p 0.9 "
            "--top-k 7 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty -0.3 --seed 4 --stop a --stop b "
            "--stop-token-id 5 --stop-token-id 6 --ignore-eos --logprobs 3 --prompt-logprobs 0 --tp 2 --device cuda --dtype float32 "
            "--max-model-len 99 --max-num-seqs 3 --max-num-batched-tokens 64 --gpu-memory-utilization 0.5 --kv-cache-dtype fp8 "
            "--disable-prefix-caching --timeout 1.5 --dp 3 --executor ray --lm-head q8_0 --attention-backend torch"
        ),
        {"prompt": "p", "prompts": Path("f.jsonl"), "out": Path("o.jsonl"), "overwrite": True, "chat": True, "system": "s"}
        | {"sampling": SamplingParams(9, 0.5, 0.9, 7, 0.1, 4, ("a", "b"), (5, 6), True, 3, 0.2, -0.3, 1.1, (), 2, 0)}
        | {"engine": EngineOptions(2, "cuda", "float32", 99, 3, 64, 0.5, "fp8", False, 1.5, 3, "ray", "q8_0", "torch")},
    ),
    "chat": (
        "m",
        {"path": "m"},
        (
            "--system s --max-tokens 9 --temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 "
            "--frequency-penalty -0.3 --seed 4 --stop a --tp 2 --device cuda --dtype float32 --max-model-len 99 "
            "--gpu-memory-utilization 0.5 --kv-cache-dtype fp8 --timeout 1.5 --executor ray --lm-head q8_0 --attention-backend torch"
        ),
        {"system": "s", "max_tokens": 9}
        | {"sampling": SamplingParams(16, 0.5, 0.9, 7, 0.1, 4, ("a",), (), False, None, 0.2, -0.3, 1.1)}
        | {"engine": EngineOptions(2, "cuda", "float32", 99, 1, None, 0.5, "fp8", True, 1.5, 1, "ray", "q8_0", "torch")},
    ),
    "report": (
        "m a",
        {"base": "m", "artifacts": ("a",)},
        (
            "b --out d --text t --window 64 --stride 32 --tokens 500 --baseline f --max-ppl-increase 5% --max-memory 6GiB --dtype bfloat16"
            " --device cpu --kld --max-kld 0.05"
        ),
        {"artifacts": ("a", "b"), "out": Path("d"), "text": Path("t"), "window": 64, "stride": 32, "tokens": 500}
        | {"baseline": Path("f"), "max_ppl_increase": 0.05, "max_memory": 6 << 30, "dtype": "bfloat16", "device": "cpu"}
        | {"kld": True, "max_kld": 0.05},
    ),
}
"""Command: its least arguments, the fields that these set, further arguments, the fields that those set."""


@pytest.fixture
def caught(quantkit: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The options that a command line comes to."""

    def call(name: str, *arguments: str) -> Any:
        got: list[Any] = []

        def run(options: Any, *terminal_and_progress: Any) -> Report:
            got.append(options)
            return Report(name, {})

        monkeypatch.setattr(_module(name), "run", run)
        result = quantkit(*name.split(), *arguments)
        assert (result.code, result.err) == (0, "")
        return got[0]

    return call


def _module(name: str) -> Any:
    return import_module(f"quantkit.commands.{name.replace(' ', '_')}")


def _options(name: str) -> Any:
    return getattr(_module(name), f"{name.title().replace(' ', '')}Options")


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_the_command_s_own(name: str, caught: Run) -> None:
    least, fields, _, _ = CASES[name]
    assert caught(name, *least.split()) == _options(name)(**fields)


@pytest.mark.parametrize("name", CASES)
def test_every_option_arrives(name: str, caught: Run) -> None:
    least, fields, more, further = CASES[name]
    kind = _options(name)
    assert set(kind.__dataclass_fields__) == set(fields) | set(further), "an option is not tried here"
    default = kind(**fields)
    assert all(getattr(default, field) != value for field, value in further.items()), "a value tried is the default"
    assert caught(name, *least.split(), *more.split()) == kind(**(fields | further))


def test_sym_has_three_states(caught: Run) -> None:
    assert [caught("quantize", "m", "o", *flag).sym for flag in ([], ["--sym"], ["--asym"])] == [None, True, False]


@pytest.mark.parametrize("line", ["bench throughput m", "bench serve"])
def test_prompts_of_a_file_take_no_option_of_random_ones(line: str, caught: Run, quantkit: Run) -> None:
    """Of a file are all prompts, unless it is said how many; the seed also draws the moments of a rate."""
    words = line.split()
    name, least = " ".join(words[:2]), words[2:]
    assert caught(name, *least, "--prompts", "p.txt").load == Load(prompts=Path("p.txt"))
    more = ("--num-prompts", "3", "--output-len", "5")
    assert caught(name, *least, "--prompts", "p.txt", *more).load == Load(3, output_len=5, prompts=Path("p.txt"))
    for option in ("--input-len", "--spread", "--seed"):
        result = quantkit(*words, "--prompts", "p.txt", option, "0" if option != "--input-len" else "512")
        assert (result.code, result.err.partition(",")[0]) == (2, f"error: {option}: is given with --prompts")
    if name == "bench serve":
        load = caught(name, "--prompts", "p.txt", "--request-rate", "2", "--seed", "7").load
        assert load == Load(seed=7, prompts=Path("p.txt"))


def test_the_api_key_may_come_from_the_environment(caught: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_API_KEY", "secret")
    assert caught("serve", "m").api_key == "secret"
    assert caught("serve", "m", "--api-key", "other").api_key == "other"


@pytest.mark.parametrize(
    "text,share", [("5%", 0.05), ("0.5 %", 0.005), ("0.05", 0.05), (".02", 0.02), ("250%", 2.5), ("0%", 0.0), ("0", 0.0)]
)
def test_shares(text: str, share: float, caught: Run) -> None:
    assert caught("report", "m", "a", "--max-ppl-increase", text).max_ppl_increase == pytest.approx(share)


@pytest.mark.parametrize("text", ["5", "1", "-5%", "%", "nan", "inf%", "5%%", "1e-3", ""])
def test_what_is_no_share(text: str, quantkit: Run) -> None:
    result = quantkit("report", "m", "a", f"--max-ppl-increase={text}")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: --max-ppl-increase: ")
