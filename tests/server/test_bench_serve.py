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
from quantkit.errors import InputError, MachineError
from quantkit.runtime.engine import Engine
from quantkit.server.app import create_app


def test_every_request_is_answered_and_counted(url: str, engine: Engine, tmp_path: Path) -> None:
    load, out = Load(10, 20, 6, 0.5, 3), tmp_path / "o.json"
    before = engine.stats()
    report = bench_serve.run(BenchServeOptions(url, load, concurrency=4, out=out))
    after, wanted = engine.stats(), asks(load)
    assert report.data["model"] == "tiny/llama" and report.data["requests"] == 10
    assert report.data["completion_tokens"] == sum(ask.output for ask in wanted) == after.generated_tokens - before.generated_tokens
    assert report.data["prompt_tokens"] == sum(len(ask.prompt) for ask in wanted) == after.prompt_tokens - before.prompt_tokens
    assert report.data["itl_ms"]["p50"] > 0 and json.loads(out.read_text())["requests"] == 10


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
