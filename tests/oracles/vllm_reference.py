"""vLLM on a CPU reads an artifact as it is and generates; runs in the vllm environment, which has no quantkit.

    vllm_reference.py logprobs ARTIFACT PROMPTS OUT [--tp N] [--tokens N] [--dtype DTYPE]

PROMPTS is JSON: a list of prompts, each a list of token ids. OUT becomes JSON: per prompt the ``tokens`` that vLLM continued it with
(greedy), and ``logprobs``: for each token of the prompt but the first, and then for each of ``tokens``, the log-probabilities that the
tokens before it give it and the 20 likeliest ids (as strings). Further, what vLLM took the artifact for: its quantization and dtype.
With --tp 2 each rank has a core of its own.

vLLM's 8-bit products with AMX know no float32: with ``--dtype float32`` it runs without AMX.

vLLM's build for a CPU without AVX512 lacks the 4-bit product. There ``Kernel`` supplies it in plain torch, from the words that vLLM has
read, sharded and repacked; ``kernel`` of OUT says which one ran.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_INT4_W4A8": "0",
}
"""Read by vLLM when it is imported, and by its workers. The last: else, on a CPU with AMX, it rounds the activations of 4-bit linears to
int8, which no artifact asks for."""

AMX = "QUANTKIT_ORACLE_AMX"
"""An environment variable. 0: this process and its workers do without AMX."""
LIKELIEST = 20


def placement(tp: int) -> dict[str, str]:
    """One process when there is one rank; else a core for each rank, of those that this process may use."""
    if tp == 1:
        return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(tp))}


def gemm_wna16(
    x: Tensor, q_weight: Tensor, out: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, pack_factor: int, isa_hint: str
) -> None:
    """``out [T, N] = x W``: words ``[N/16, 2K]``, 16 outputs of an input in two words; scales ``[G, N]``; zeros ``[G, N/8]`` or 8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)

    def nibbles(words: Tensor) -> Tensor:
        return (words.unsqueeze(-1) >> shifts & 15).flatten(-2)

    k, n = x.shape[1], scales.shape[1]
    codes = nibbles(q_weight.view(n // 16, k, 2)).permute(1, 0, 2).reshape(k, n)
    zero = torch.full_like(scales, 8, dtype=torch.int32) if zeros is None else nibbles(zeros)
    group = torch.arange(k) // (k // scales.shape[0])
    weight = scales.float()[group] * (codes - zero[group])
    y = x.float() @ weight
    out.copy_(y if bias is None else y + bias.float())


def settle_amx() -> None:
    """Hides AMX where it is not wanted; else asks Linux for it, which vLLM's 4-bit product does not, and dies of SIGILL."""
    if os.environ.get(AMX) == "0":
        torch.cpu._is_amx_tile_supported = lambda: False
    elif torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise OSError("Linux refuses AMX to this process")


def provide_kernel() -> bool:
    """Registers the product above where vLLM's build for this CPU has none. True where it has one."""
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    settle_amx()
    current_platform.import_kernels()
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return not LIBRARY
    library: Any = torch.library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    arguments = "Tensor x, Tensor q_weight, Tensor(a!) out, Tensor scales, Tensor? zeros, Tensor? bias, int pack_factor, str isa_hint"
    library.define(f"cpu_gemm_wna16({arguments}) -> ()")
    library.impl("cpu_gemm_wna16", gemm_wna16, "CPU")
    LIBRARY.append(library)
    return False


LIBRARY: list[Any] = []
"""Keeps the registration alive."""


class Kernel:
    """What vLLM mixes into its workers: each of them imports this module by name, which settles AMX and registers the product there."""


def logprobs(artifact: str, prompts: list[list[int]], tp: int, tokens: int, dtype: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    kernel = "vLLM's" if provide_kernel() else "plain torch"
    model = LLM(
        model=artifact,
        tensor_parallel_size=tp,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=128,
        seed=0,
        disable_log_stats=True,
        worker_extension_cls="vllm_reference.Kernel",
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=LIKELIEST, prompt_logprobs=LIKELIEST, ignore_eos=True)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    answers = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                {str(i): entry.logprob for i, entry in step.items()} for step in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            ],
        }
        for output in outputs
    ]
    config = model.llm_engine.model_config
    return {"quantization": config.quantization, "dtype": str(config.dtype), "kernel": kernel, "tp": tp, "prompts": answers}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["logprobs"])
    parser.add_argument("artifact")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    amx = "0" if given.dtype == "float32" else "1"
    os.environ.update(SETTINGS | placement(given.tp) | {AMX: amx, "PYTHONPATH": str(Path(__file__).parent)})
    answer = logprobs(given.artifact, json.loads(given.prompts.read_text()), given.tp, given.tokens, given.dtype)
    given.out.write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
elif __name__ == Path(__file__).stem:
    provide_kernel()
