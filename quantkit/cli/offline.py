"""The commands that run a model without a server, as the command line shows them: generate and chat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import app, perform
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
)
from quantkit.console import Conversation, Output
from quantkit.progress import Progress
from quantkit.report import Report

System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt: what the model is told first.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", help="Draw among the likeliest tokens that have this much of all likelihood.")]
TopK = Annotated[int, typer.Option("--top-k", metavar="K", help="Draw among the K likeliest tokens; 0 is all.")]
MinP = Annotated[float, typer.Option("--min-p", metavar="P", help="Leave out what is less likely than this part of the likeliest.")]
Repetition = Annotated[
    float, typer.Option("--repetition-penalty", metavar="F", help="Above 1: what prompt and answer have already is less likely.")
]
Presence = Annotated[
    float, typer.Option("--presence-penalty", metavar="F", help="Above 0: what the answer has already is less likely, -2 to 2.")
]
Frequency = Annotated[
    float, typer.Option("--frequency-penalty", metavar="F", help="Above 0: the more often the answer has it, the less likely, -2 to 2.")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same text. Default: another each time.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End an answer before this text; repeatable.")]


@app.command(
    short_help="Generate text from one prompt or a file of them",
    epilog=examples(
        "quantkit generate ARTIFACT 'The capital of France is'",
        "quantkit generate ARTIFACT 'Say hello' --chat --temperature 0.7 --seed 1",
        "quantkit generate SHARDS --prompts prompts.jsonl --out answers.jsonl --max-tokens 128",
    ),
)
def generate(
    context: typer.Context,
    path: Served,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", show_default=False, help="A text to go on from.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            readable=False,
            help="A prompt per line; of a .jsonl file an object with prompt or messages, and sampling as the API names it.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", readable=False, help="Write answers here as JSONL, in order.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the --out file if it is there.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are a user's messages: apply the model's chat template.")] = False,
    system: System = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, metavar="TOKENS", help="Longest answer.")] = 256,
    min_tokens: Annotated[int, typer.Option("--min-tokens", min=0, metavar="TOKENS", help="Nothing ends an answer before these.")] = 0,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token; 1 draws as trained.")
    ] = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_ids: Annotated[
        list[int] | None, typer.Option("--stop-token-id", min=0, metavar="ID", help="End an answer at this token; repeatable.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", min=0, max=20, metavar="N", help="Log-probabilities of each token and of the N likeliest.")
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option("--prompt-logprobs", min=0, max=20, metavar="N", help="The same of the prompt's tokens.")
    ] = None,
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
    """Generate text from one prompt, or from a file of them, as many at once as fit. Without sampling options the likeliest tokens are
    taken; a line of a .jsonl file may say otherwise for itself."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import generate
        from quantkit.runtime.params import SamplingParams

        options = generate.GenerateOptions(
            path=path,
            prompt=prompt,
            prompts=prompts,
            out=out,
            overwrite=overwrite,
            chat=chat,
            system=system,
            sampling=SamplingParams(
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                seed=seed,
                stop=tuple(stop or ()),
                stop_ids=tuple(stop_token_ids or ()),
                ignore_eos=ignore_eos,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            ),
            engine=engine_options(context),
        )
        return generate.run(options, progress)

    perform(context, Output(json, quiet, verbose), work)


@app.command(
    short_help="Talk with a model in the terminal",
    epilog=examples("quantkit chat ARTIFACT", "quantkit chat SHARDS --system 'Answer in one sentence.' --temperature 0"),
)
def chat(
    context: typer.Context,
    path: Served,
    system: System = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, metavar="TOKENS", help="Longest answer. Default: what the context leaves.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token; 1 draws as trained.")
    ] = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    tp: Ranks = None,
    executor: ExecutorKind = "local",
    device: Device = "auto",
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    gpu_memory_utilization: MemoryShare = 0.9,
    kv_cache_dtype: KvDtype = "auto",
    lm_head: LmHead = "auto",
    attention_backend: AttentionBackend = "auto",
    timeout: Timeout = 60.0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk with a model in the terminal; answers come as they are made. /reset begins again, /system TEXT sets the system prompt, /exit or
    Ctrl-D ends, Ctrl-C stops an answer."""

    def work(progress: Progress) -> Report:
        from quantkit.commands import chat
        from quantkit.runtime.params import SamplingParams

        options = chat.ChatOptions(
            path=path,
            system=system,
            max_tokens=max_tokens,
            sampling=SamplingParams(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                seed=seed,
                stop=tuple(stop or ()),
            ),
            engine=engine_options(context, max_num_seqs=1),
        )
        return chat.run(options, Conversation(), progress)

    perform(context, Output(json, quiet, verbose), work)
