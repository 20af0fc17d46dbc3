"""The benchmarks of whole models as the command line shows them: throughput, latency and serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import Device, Json, Quiet, Verbose, _examples, _run, bench_app
from quantkit.cli.offline import Dtype, KvDtype, MaxBatchedTokens, MaxModelLen, MaxNumSeqs, MemoryShare, PrefixCaching, Served, Timeout, Tp
from quantkit.console import Output
from quantkit.progress import Progress
from quantkit.report import Report

NumPrompts = Annotated[int, typer.Option("--num-prompts", min=1, metavar="N", help="How many requests.")]
InputLen = Annotated[int, typer.Option("--input-len", min=1, metavar="TOKENS", help="Length of random prompts.")]
OutputLen = Annotated[int, typer.Option("--output-len", min=1, metavar="TOKENS", help="Length of answers.")]
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
        help="Prompts from a file instead: a text per line, or .jsonl objects with prompt and perhaps max_tokens.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", readable=False, help="Also write every figure as JSON.")]


@bench_app.command(
    "throughput",
    short_help="Tokens per second of many requests at once",
    epilog=_examples(
        "quantkit bench throughput ARTIFACT --num-prompts 256 --input-len 512 --output-len 128 --max-num-seqs 128",
        "quantkit bench throughput SHARDS --prompts prompts.jsonl --out throughput.json",
    ),
)
def throughput(
    context: typer.Context,
    path: Served,
    num_prompts: NumPrompts = 128,
    input_len: InputLen = 512,
    output_len: OutputLen = 128,
    spread: Spread = 0.0,
    seed: Seed = 0,
    prompts: Prompts = None,
    out: Out = None,
    tp: Tp = None,
    device: Device = "auto",
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxBatchedTokens = 1024,
    gpu_memory_utilization: MemoryShare = 0.9,
    kv_cache_dtype: KvDtype = "auto",
    prefix_caching: PrefixCaching = True,
    timeout: Timeout = 60.0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run many requests at once in this process and say how many tokens a second come of it, and when each came."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import bench_throughput
        from quantkit.commands.bench_load import Load
        from quantkit.commands.generate import EngineOptions

        options = bench_throughput.BenchThroughputOptions(
            path=path,
            load=Load(num_prompts, input_len, output_len, spread, seed, prompts),
            out=out,
            engine=EngineOptions(
                tp=tp,
                device=device,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_dtype=kv_cache_dtype,
                prefix_caching=prefix_caching,
                timeout=timeout,
            ),
        )
        return bench_throughput.run(options, progress)

    _run(context, Output(json, quiet, verbose), work)


@bench_app.command(
    "latency",
    short_help="Time to the first token and between tokens, of one batch",
    epilog=_examples(
        "quantkit bench latency ARTIFACT --input-len 512 --output-len 256", "quantkit bench latency SHARDS --batch-size 8 --rounds 10"
    ),
)
def latency(
    context: typer.Context,
    path: Served,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Requests that run together.")] = 1,
    input_len: InputLen = 512,
    output_len: OutputLen = 128,
    seed: Seed = 0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="How often the batch is run.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", min=0, metavar="N", help="Rounds before these that do not count.")] = 1,
    out: Out = None,
    tp: Tp = None,
    device: Device = "auto",
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxBatchedTokens = 1024,
    gpu_memory_utilization: MemoryShare = 0.9,
    kv_cache_dtype: KvDtype = "auto",
    timeout: Timeout = 60.0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run one batch of requests again and again in this process, each time with other prompts, and say how long tokens take."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import bench_latency
        from quantkit.commands.bench_load import Load
        from quantkit.commands.generate import EngineOptions

        options = bench_latency.BenchLatencyOptions(
            path=path,
            load=Load(batch_size, input_len, output_len, 0.0, seed),
            rounds=rounds,
            warmup=warmup,
            out=out,
            engine=EngineOptions(
                tp=tp,
                device=device,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_dtype=kv_cache_dtype,
                timeout=timeout,
            ),
        )
        return bench_latency.run(options, progress)

    _run(context, Output(json, quiet, verbose), work)


@bench_app.command(
    "serve",
    short_help="What clients of a running server see",
    epilog=_examples(
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
    num_prompts: NumPrompts = 128,
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
        from quantkit.commands.bench_load import Load

        options = bench_serve.BenchServeOptions(
            url=url,
            load=Load(num_prompts, input_len, output_len, spread, seed, prompts),
            model=model,
            api_key=api_key,
            concurrency=concurrency,
            request_rate=request_rate,
            timeout=timeout,
            out=out,
        )
        return bench_serve.run(options, progress)

    _run(context, Output(json, quiet, verbose), work)
