"""What the commands' command lines share: arguments and options that several have, examples, completions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quantkit.commands.generate import EngineOptions

VERBATIM = "\b\n"
"""Begins a paragraph of help whose line breaks are kept."""


def examples(*lines: str) -> str:
    return f"{VERBATIM}Examples:\n" + "\n".join(f"  {line}" for line in lines)


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Completions of an option whose values are few; the command itself says what it takes."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


Model = Annotated[
    str, typer.Argument(metavar="MODEL", show_default=False, help="Checkpoint or artifact directory, .gguf file or pkg:NAME.")
]
# readable=False: the parser looks at no path; commands do, and say what they expected.
Out = Annotated[Path, typer.Argument(metavar="OUT", readable=False, show_default=False, help="Directory to write; it must not exist.")]
Target = Annotated[
    Path, typer.Argument(metavar="OUT", readable=False, show_default=False, help="Directory to write, or a .gguf file; it must not exist.")
]
Tp = Annotated[int, typer.Option("--tp", min=1, metavar="N", show_default=False, help="Tensor-parallel ranks.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there and holds a checkpoint.")]
PartSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="Most bytes in one file: 5GB, 24GiB. Default: 5GB of safetensors; a GGUF file is not split.",
    ),
]
PreTokenizer = Annotated[
    str | None,
    typer.Option("--pre-tokenizer", metavar="NAME", help="With gguf: llama.cpp's name of how the tokenizer cuts, where it is unknown."),
]
Device = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda", autocompletion=one_of("auto", "cpu", "cuda"), help="Where to compute.")
]
Calib = Annotated[
    str | None,
    typer.Option(
        "--calib",
        metavar="FILE|self|builtin",
        autocompletion=one_of("self", "builtin"),
        show_default=False,
        help="Calibration text: a text or JSONL file, sampled from the model, or built-in English. Default: builtin.",
    ),
]
ComputeDtype = Annotated[
    str,
    typer.Option(
        "--compute-dtype",
        metavar="DTYPE",
        autocompletion=one_of("auto", "float32", "bfloat16", "float16"),
        help="Dtype of calibration's forward passes. Default: float32, on a GPU that of a 16-bit model.",
    ),
]
Offload = Annotated[bool, typer.Option("--offload", help="Keep the calibration activations in a file, not in memory.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="The result and errors only: no progress, warnings or next steps.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Progress lines where no bar can be drawn, logs, and the time taken.")]
Served = Annotated[
    str, typer.Argument(metavar="MODEL", show_default=False, help="Checkpoint, artifact or shard directory, .gguf file or pkg:NAME.")
]
Ranks = Annotated[int | None, typer.Option("--tp", min=1, metavar="N", help="Tensor-parallel ranks. Default: as sharded, else 1.")]
Replicas = Annotated[
    int,
    typer.Option("--dp", min=1, metavar="N", help="Data-parallel replicas, each of --tp ranks; the limits below are of each."),
]
ExecutorKind = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="local|ray",
        autocompletion=one_of("local", "ray"),
        help="Where ranks run: on this machine, or on a Ray cluster (RAY_ADDRESS; without it, one that is started here).",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        autocompletion=one_of("bfloat16", "float16", "float32"),
        help="Compute dtype: bfloat16, float16 or float32. Default: fits the model and the device.",
    ),
]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", min=1, metavar="TOKENS", help="Longest prompt and answer together. Default: the model's.")
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option("--max-num-seqs", min=1, metavar="N", help="Prompts decoded at once. Default: 128 on a GPU, 64 on a CPU."),
]
MaxBatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens",
        min=1,
        metavar="TOKENS",
        help="Tokens of one pass: longer prompts are computed in pieces. Default: 4096 on a GPU, 1024 on a CPU.",
    ),
]
MemoryShare = Annotated[
    float,
    typer.Option(
        "--gpu-memory-utilization", metavar="SHARE", help="What the runtime may take of a GPU's memory, or of a CPU's free memory."
    ),
]
KvDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        metavar="DTYPE",
        autocompletion=one_of("auto", "fp8"),
        help="How keys and values are stored: auto (as computed) or fp8 (a byte each).",
    ),
]
LmHead = Annotated[
    str,
    typer.Option(
        "--lm-head",
        metavar="KIND",
        autocompletion=one_of("auto", "q8_0"),
        help="The output head: auto (as stored) or q8_0 (encoded to 8-bit blocks when it is loaded).",
    ),
]
AttentionBackend = Annotated[
    str,
    typer.Option(
        "--attention-backend",
        metavar="NAME",
        autocompletion=one_of("auto", "triton", "flashinfer", "torch"),
        help="Whose attention: triton, flashinfer (prompts; decoding is triton's) or torch. auto: the best that works here.",
    ),
]
PrefixCaching = Annotated[
    bool, typer.Option("--enable-prefix-caching/--disable-prefix-caching", help="Compute what prompts begin with alike once.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="How long a rank may hang before the runtime gives up.")
]


def engine_options(context: typer.Context, **fixed: Any) -> EngineOptions:
    """The engine's options as a command has them, by their names; ``fixed`` are those that it does not leave open."""
    from dataclasses import fields

    from quantkit.commands.generate import EngineOptions

    given = {field.name: context.params[field.name] for field in fields(EngineOptions) if field.name in context.params}
    return EngineOptions(**given, **fixed)
