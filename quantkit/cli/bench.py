"""The benchmarks as the command line shows them: of the kernels, and of whole models: throughput, latency, serve and study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.app import Group, app, help_or_refuse, perform
from quantkit.cli.options import (
    AttentionBackend,
    Device,
    Dtype,
    ExecutorKind,
    Json,
    KvDtype,
    LmHead,
    MaxBatchedTokens,
    MaxModelLen,
    MaxNumSeqs,
    MemoryShare,
    PrefixCaching,
    Quiet,
    Ranks,
    Replicas,
    Served,
    Timeout,
    Verbose,
    engine_options,
    examples,
    one_of,
)
from quantkit.console import Output
from quantkit.errors import InputError
from quantkit.progress import Progress
from quantkit.report import Report

if TYPE_CHECKING:
    from quantkit.commands.bench_requests import Load

bench_app = typer.Typer(
    cls=Group,
    help="Measure how fast this machine is, beside what else it could run.",
    short_help="Measure how fast this machine is",
    epilog=examples("quantkit bench kernels", "quantkit bench kernels --format int4 --tokens 1 --tokens 16"),
    rich_markup_mode=None,
)

NumPrompts = Annotated[
    int | None, typer.Option("--num-prompts", min=1, metavar="N", help="How many requests. Default: 128 random ones; of a file, all.")
]
InputLen = Annotated[int, typer.Option("--input-len", min=1, metavar="TOKENS", help="Length of random prompts.")]
OutputLen = Annotated[
    int,
    typer.Option("--output-len", min=1, metavar="TOKENS", help="Length of answers; with --prompts the most, where a line says no other."),
]
FixedOutputLen = Annotated[int, typer.Option("--output-len", min=1, metavar="TOKENS", help="Length of answers.")]
Spread = Annotated[
    float, typer.Option("--spread", metavar="SHARE", help="Lengths are drawn from within this part of the lengths above and below.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="The same seed asks the same.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        readable=False,
        help="Prompts from a file instead, as generate reads it: a text per line, or .jsonl objects.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", readable=False, help="Also write every figure as JSON.")]

app.add_typer(bench_app, name="bench")


def _load(context: typer.Context, *also: str) -> Load:
    """What to ask for; with ``--prompts``, of what makes random prompts only ``also`` may be given. Raises InputError naming the option."""
    from quantkit.commands.bench_requests import Load

    given = context.params
    for name in ("input_len", "spread", "seed") if given["prompts"] is not None else ():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in also:
            raise InputError(f"--{name.replace('_', '-')}", "is given with --prompts", "it with random prompts, or the file alone")
    return Load(**{field: given[field] for field in ("num_prompts", "input_len", "output_len", "spread", "seed", "prompts")})


@bench_app.callback(invoke_without_command=True)
def _bench_root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        help_or_refuse(context, context.obj)


@bench_app.command(
    "kernels",
    short_help="Time the CUDA kernels against cuBLAS and a read of their bytes",
    epilog=examples(
        "quantkit bench kernels --peers benchmarks/peers/kernel_peers_h100.json --out kernels.json",
        "quantkit bench kernels --format int4 --format nf4 --shape l3_gateup --tokens 1",
        "quantkit bench kernels --tune --format int4 --shape 11008x4096",
    ),
)
def bench_kernels(
    context: typer.Context,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            autocompletion=one_of("int4", "nf4", "q4_k", "q5_k", "q6_k", "q8_0", "q4_0"),
            help="int4, nf4, q4_k, q5_k, q6_k, q8_0 or q4_0; repeatable. Default: all but q5_k and q4_0.",
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape", metavar="NAME|NxK", help="Out and in features, or a name such as l3_gateup; repeatable. Default: eight shapes."
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, max=65536, metavar="M", help="Rows of x; repeatable. Default: 1 to 4096.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", autocompletion=one_of("float16", "bfloat16"), help="Dtype of x and of the result.")
    ] = "float16",
    peers: Annotated[
        Path | None, typer.Option("--peers", metavar="FILE", readable=False, help="Figures of other kernels, to show beside ours.")
    ] = None,
    out: Out = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure every configuration and keep the fastest, which linears then take on this GPU.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", readable=False, help="With --tune: where to keep it. Default: in your cache.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time products on packed weights and their dequantization on this GPU, each beside cuBLAS and a read of the packed bytes in the same
    run. Every result is compared with float32 before it is timed; exit 1 when one is wrong."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import bench_kernels

        options = bench_kernels.BenchKernelsOptions(
            formats=tuple(formats or ()),
            shapes=tuple(shapes or ()),
            tokens=tuple(tokens or ()),
            dtype=dtype,
            peers=peers,
            out=out,
            tune=tune,
            table=table,
        )
        return bench_kernels.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


@bench_app.command(
    "load",
    short_help="How fast weights come from their files",
    epilog=examples("quantkit bench load SHARDS --rank 1", "quantkit bench load ARTIFACT --tp 2 --device cpu --out load.json"),
)
def load(
    context: typer.Context,
    path: Served,
    tp: Ranks = None,
    rank: Annotated[int, typer.Option("--rank", min=0, metavar="R", help="The rank whose part is loaded, alone.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="How often each is measured; medians are shown.")] = 3,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Load the weights of one rank, with its files in the page cache and without, beside a plain read of the same files in the same run:
    as many reads at once, of as many bytes."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import bench_load

        options = bench_load.BenchLoadOptions(path=path, tp=tp, rank=rank, device=device, dtype=dtype, rounds=rounds, out=out)
        return bench_load.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


@bench_app.command(
    "throughput",
    short_help="Tokens per second of many requests at once",
    epilog=examples(
        "quantkit bench throughput ARTIFACT --num-prompts 256 --input-len 512 --output-len 128 --max-num-seqs 128",
        "quantkit bench throughput SHARDS --prompts prompts.jsonl --out throughput.json",
    ),
)
def throughput(
    context: typer.Context,
    path: Served,
    num_prompts: NumPrompts = None,
    input_len: InputLen = 512,
    output_len: OutputLen = 128,
    spread: Spread = 0.0,
    seed: Seed = 0,
    prompts: Prompts = None,
    out: Out = None,
    tp: Ranks = None,
    dp: Replicas = 1,
    executor: ExecutorKind = "local",
    device: Device = "auto",
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxBatchedTokens = None,
    gpu_memory_utilization: MemoryShare = 0.9,
    kv_cache_dtype: KvDtype = "auto",
    lm_head: LmHead = "auto",
    attention_backend: AttentionBackend = "auto",
    prefix_caching: PrefixCaching = True,
    timeout: Timeout = 60.0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run many requests at once in this process and say how many tokens a second come of it, and when each came."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import bench_throughput

        options = bench_throughput.BenchThroughputOptions(
            path=path,
            load=_load(context),
            out=out,
            engine=engine_options(context),
        )
        return bench_throughput.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


@bench_app.command(
    "latency",
    short_help="Time to the first token and between tokens, of one batch",
    epilog=examples(
        "quantkit bench latency ARTIFACT --input-len 512 --output-len 256", "quantkit bench latency SHARDS --batch-size 8 --rounds 10"
    ),
)
def latency(
    context: typer.Context,
    path: Served,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Requests that run together.")] = 1,
    input_len: InputLen = 512,
    output_len: FixedOutputLen = 128,
    seed: Seed = 0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="How often the batch is run.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", min=0, metavar="N", help="Rounds before these that do not count.")] = 1,
    out: Out = None,
    tp: Ranks = None,
    executor: ExecutorKind = "local",
    device: Device = "auto",
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[
        int | None, typer.Option("--max-num-seqs", min=1, metavar="N", help="Prompts decoded at once. Default: the batch.")
    ] = None,
    max_num_batched_tokens: MaxBatchedTokens = None,
    gpu_memory_utilization: MemoryShare = 0.9,
    kv_cache_dtype: KvDtype = "auto",
    lm_head: LmHead = "auto",
    attention_backend: AttentionBackend = "auto",
    timeout: Timeout = 60.0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run one batch of requests again and again in this process, each time with other prompts, and say how long tokens take."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import bench_latency
        from quantkit.commands.bench_requests import Load

        options = bench_latency.BenchLatencyOptions(
            path=path,
            load=Load(batch_size, input_len, output_len, 0.0, seed),
            rounds=rounds,
            warmup=warmup,
            out=out,
            engine=engine_options(context),
        )
        return bench_latency.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


@bench_app.command(
    "serve",
    short_help="What clients of a running server see",
    epilog=examples(
        "quantkit bench serve --url http://127.0.0.1:8000 --num-prompts 200 --concurrency 64",
        "quantkit bench serve --request-rate 4 --spread 0.5 --out serve.json",
    ),
)
def serve(
    context: typer.Context,
    url: Annotated[str, typer.Option("--url", metavar="URL", help="The server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Its model. Default: the first that it names.")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", envvar="QUANTKIT_API_KEY", help="Key that the server asks for.")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, max=4096, metavar="N", help="Requests under way at most.")] = 32,
    request_rate: Annotated[
        float | None,
        typer.Option("--request-rate", min=0.001, metavar="R", help="Requests per second, at random moments. Default: as fast as they go."),
    ] = None,
    num_prompts: NumPrompts = None,
    input_len: InputLen = 512,
    output_len: OutputLen = 128,
    spread: Spread = 0.0,
    seed: Seed = 0,
    prompts: Prompts = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="How long the server may say nothing within an answer.")
    ] = 600.0,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Send requests to a server that runs, as its clients would, and say what they see: times to the first token, between tokens, of whole
    answers, and the rate of it all."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import bench_serve

        options = bench_serve.BenchServeOptions(
            url=url,
            load=_load(context, *(("seed",) if request_rate is not None else ())),  # which also draws the moments
            model=model,
            api_key=api_key,
            concurrency=concurrency,
            request_rate=request_rate,
            timeout=timeout,
            out=out,
        )
        return bench_serve.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


@bench_app.command(
    "study",
    short_help="Ranks against replicas on word problems: time and accuracy",
    epilog=examples(
        "quantkit bench study ARTIFACT --modes tp1,tp2,dp2,tp2dp2 --data gsm8k_test.jsonl --limit 200 --out study",
        "quantkit bench study MODEL --device cpu --dtype float32 --same",
    ),
)
def study(
    context: typer.Context,
    path: Served,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            metavar="MODE,...",
            help="tpN ranks, dpN replicas, or tpNdpM: replicas of N ranks. Default: one rank, and the greatest power of two of the GPUs "
            "as ranks, as replicas, and both.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", readable=False, help="GSM8K's test.jsonl. Default: 32 problems of our own."),
    ] = None,
    examples_file: Annotated[
        Path | None,
        typer.Option("--examples", metavar="FILE", readable=False, help="Worked examples in its form. Default: 8 of our own."),
    ] = None,
    shots: Annotated[int, typer.Option("--shots", min=0, metavar="N", help="Worked examples before each question.")] = 8,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="The first N questions alone.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Tokens of an answer at most.")] = 256,
    same: Annotated[bool, typer.Option("--same", help="Exit 1 when modes answer differently.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", readable=False, help="Also write study.json, study.md and answers.jsonl there."),
    ] = None,
    executor: ExecutorKind = "local",
    device: Device = "auto",
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxBatchedTokens = None,
    gpu_memory_utilization: MemoryShare = 0.9,
    kv_cache_dtype: KvDtype = "auto",
    lm_head: LmHead = "auto",
    attention_backend: AttentionBackend = "auto",
    prefix_caching: PrefixCaching = True,
    timeout: Timeout = 60.0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer word problems greedily on one rank, on tensor-parallel ranks and on data-parallel replicas, one mode after the other, and say
    of each how long it takes, how many tokens a second come, how many answers are right, and whether they are the same in all."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import bench_study

        options = bench_study.BenchStudyOptions(
            path=path,
            modes=() if modes is None else tuple(modes.split(",")),
            data=data,
            examples=examples_file,
            shots=shots,
            limit=limit,
            chat=chat,
            max_tokens=max_tokens,
            out=out,
            same=same,
            engine=engine_options(context),
        )
        return bench_study.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)
