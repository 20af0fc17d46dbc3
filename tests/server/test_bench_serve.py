"""``bench serve`` against the real server, and against what is none."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.commands import bench_serve
from quantkit.commands.bench_requests import Load, asks
from quantkit.commands.bench_serve import BenchServeOptions
from quantkit.commands.prompt_file import api_fields
from quantkit.errors import InputError, MachineError
from quantkit.runtime.engine import Engine
from quantkit.server.app import create_app
from quantkit.text.chat import render_chat


def test_every_request_is_answered_and_counted(url: str, engine: Engine, tmp_path: Path) -> None:
    load, out = Load(10, 20, 6, 0.5, 3), tmp_path / "o.json"
    before = engine.stats()
    report = bench_serve.run(BenchServeOptions(url, load, concurrency=4, out=out))
    after, wanted = engine.stats(), asks(load)
    assert report.data["model"] == "tiny/llama" and report.data["requests"] == 10
    assert (
        report.data["completion_tokens"]
        == sum(ask.sampling.max_tokens for ask in wanted)
        == after.generated_tokens - before.generated_tokens
    )
    assert report.data["prompt_tokens"] == sum(len(ask.prompt) for ask in wanted) == after.prompt_tokens - before.prompt_tokens
    assert report.data["itl_ms"]["p50"] > 0 and json.loads(out.read_text())["requests"] == 10


def test_requests_of_a_file_are_sent_as_they_are_written(url: str, engine: Engine, tmp_path: Path) -> None:
    """A text, tokens with what else shapes an answer, and a conversation, which goes to the chat endpoint."""
    rows: list[dict[str, Any]] = [
        {"prompt": "The capital", "max_tokens": 3, "ignore_eos": True},
        {"prompt": [5, 6], "max_tokens": 4, "logit_bias": {"5": 100}, "stop_token_ids": [7], "seed": 3, "temperature": 0.5, "logprobs": 1},
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "ignore_eos": True, "logprobs": 2},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    report = bench_serve.run(BenchServeOptions(url, Load(9, prompts=file), concurrency=1))
    assert report.data["requests"] == 3 and report.data["completion_tokens"] == 3 + 4 + 5
    template = engine.tokenizer.encode(render_chat(engine.tokenizer, rows[2]["messages"]), special=False)
    assert report.data["prompt_tokens"] == len(engine.tokenizer.encode("The capital", special=True)) + 2 + len(template)
    text, _, chat = asks(Load(9, prompts=file))
    client = bench_serve._Client(BenchServeOptions(url))
    timed = client.complete("tiny/llama", chat, time.perf_counter())
    assert timed.tokens == 5 and len(timed.came) <= 6, "who speaks is no token"
    assert api_fields(text) == {"prompt": "The capital", "max_tokens": 3, "temperature": 0.0, "ignore_eos": True}


def test_requests_come_at_their_rate(url: str) -> None:
    """Eleven at about 20 a second: their moments are drawn, so the time they take is known."""
    options = BenchServeOptions(url, Load(11, 4, 1, seed=5), request_rate=20.0)
    due = bench_serve._moments(options, 11)[-1]
    assert 0.2 < due < 1.5
    start = time.monotonic()
    report = bench_serve.run(options)
    assert report.data["seconds"] > due and time.monotonic() - start > due


def test_a_server_with_a_key(engine: Engine, listen: Callable[[Any], str]) -> None:
    url = listen(create_app(engine, served_model_name="m", api_key="secret"))
    assert bench_serve.run(BenchServeOptions(url, Load(1, 4, 2), api_key="secret")).data["completion_tokens"] == 2
    with pytest.raises(InputError, match="answers 401"):
        bench_serve.run(BenchServeOptions(url, Load(1, 4, 2)))


def test_what_is_refused_is_told(url: str) -> None:
    with pytest.raises(InputError, match=r"answers 400.*max_tokens"):
        bench_serve.run(BenchServeOptions(url, Load(2, 20, 6000)))
    with pytest.raises(InputError, match="--url"):
        bench_serve.run(BenchServeOptions("127.0.0.1:1"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and deaf
        with pytest.raises(MachineError, match="does not answer"):
            bench_serve.run(BenchServeOptions(f"http://127.0.0.1:{taken.getsockname()[1]}"))
