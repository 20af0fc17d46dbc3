"""The benchmarks of whole models: what they ask for, how times become figures, and that what they count is what was made."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import LLM
from quantkit.commands import bench_kernels, bench_latency, bench_load, bench_serve, bench_throughput
from quantkit.commands.bench_latency import BenchLatencyOptions
from quantkit.commands.bench_requests import TOKENS, Load, Timed, asks, figures
from quantkit.commands.bench_throughput import BenchThroughputOptions
from quantkit.commands.generate import EngineOptions
from quantkit.commands.prompt_file import Line, text_line
from quantkit.errors import InputError
from quantkit.runtime.params import SamplingParams

MODELS = Path(__file__).parent.parent / "data" / "models"
HELLO = [{"role": "user", "content": "Hi"}]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.sampled_from([0.0, 0.25, 0.9]), st.integers(0, 99))
def test_random_requests_are_within_the_spread_and_repeat(count: int, prompt: int, output: int, spread: float, seed: int) -> None:
    load = Load(count, prompt, output, spread, seed)
    made = asks(load)
    assert made == asks(load) and len(made) == count
    assert made != asks(Load(count, prompt, output, spread, seed + 1))
    for ask in made:
        tokens, params = ask.prompt, ask.sampling
        assert isinstance(tokens, list) and params.greedy and params.ignore_eos and set(tokens) <= set(TOKENS) and not ask.chat
        for length, mean in ((len(tokens), prompt), (params.max_tokens, output)):
            assert max(1, round(mean * (1 - spread))) <= length <= round(mean * (1 + spread))


def test_requests_from_a_file(tmp_path: Path) -> None:
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\ntwo\nthree\n")
    lines = ({"prompt": "one", "max_tokens": 3}, {"prompt": "two", "id": 1}, {"messages": HELLO, "temperature": 0.5})
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    greedy = SamplingParams(7, temperature=0)
    assert asks(Load(2, prompts=text, output_len=7)) == [text_line("one", greedy), text_line("two", greedy)]
    assert [ask.prompt for ask in asks(Load(prompts=text))] == ["one", "two", "three"] and len(asks(Load(input_len=1))) == 128
    text.write_text("more\n" * 200)
    assert len(asks(Load(prompts=text))) == 200, "a file is not cut where no number is given"
    first, second, third = asks(Load(9, prompts=rows, output_len=7))
    assert (first.prompt, first.sampling) == ("one", replace(greedy, max_tokens=3)) and second == Line("two", False, greedy, second.given)
    assert third.chat and third.prompt == HELLO and third.sampling == replace(greedy, temperature=0.5)
    for row, words in (
        ("{", "line 4: is not JSON"),
        ('{"prompt": 5}', "line 4: prompt: is int"),
        ('{"prompt": "a", "max_tokens": 0}', "line 4: max_tokens: is 0"),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(rows.read_text() + row)
        with pytest.raises(InputError, match=words):
            asks(Load(9, prompts=bad))
    text.write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        asks(Load(prompts=text))
    with pytest.raises(InputError, match="--spread"):
        asks(Load(spread=1.0))


def test_figures_are_what_the_times_say() -> None:
    answers = [Timed(0.0, (1.0, 1.5, 2.5), 10, 3), Timed(1.0, (1.5,), 6, 1)]
    got = figures(answers, 4.0)
    assert (got["requests_per_second"], got["tokens_per_second"], got["total_tokens_per_second"]) == (0.5, 1.0, 5.0)
    assert got["ttft_ms"] == {"mean": 750.0, "p50": 1000.0, "p90": 1000.0, "p99": 1000.0}
    assert got["itl_ms"] == {"mean": 750.0, "p50": 1000.0, "p90": 1000.0, "p99": 1000.0}
    assert got["e2e_ms"]["mean"] == 1500.0
    assert figures(answers[1:], 4.0)["itl_ms"] is None
    hundred = figures([Timed(0.0, (at / 1000,), 1, 1) for at in range(100, 0, -1)], 1.0)["ttft_ms"]
    assert (hundred["p50"], hundred["p90"], hundred["p99"]) == (51.0, 91.0, 100.0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(MODELS / "llama"), device="cpu", dtype="float32", max_num_seqs=3) as made:
        yield made


@pytest.fixture
def loaded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The benchmarks measure this one."""
    monkeypatch.setattr(EngineOptions, "start", lambda self, path, progress: contextlib.nullcontext(llm))
    return llm


def test_throughput_counts_every_token(loaded: LLM, tmp_path: Path) -> None:
    load, out = Load(9, 30, 8, 0.5, 1), tmp_path / "o.json"
    before = loaded.engine.stats()
    report = bench_throughput.run(BenchThroughputOptions("m", load, out))
    after, wanted = loaded.engine.stats(), asks(load)
    made = sum(ask.sampling.max_tokens for ask in wanted)
    assert report.data["completion_tokens"] == made == after.generated_tokens - before.generated_tokens - 2, "2 are of the warm-up"
    assert report.data["prompt_tokens"] == sum(len(ask.prompt) for ask in wanted) and report.data["requests"] == 9
    assert report.data["tokens_per_second"] == pytest.approx(made / report.data["seconds"])
    assert json.loads(out.read_text()) == json.loads(json.dumps(report.data))
    assert 0 < report.data["ttft_ms"]["p50"] <= report.data["e2e_ms"]["p50"] <= 1000 * report.data["seconds"]


def test_latency_runs_new_prompts_in_every_round(loaded: LLM) -> None:
    before = loaded.engine.stats()
    report = bench_latency.run(BenchLatencyOptions("m", Load(2, 40, 6), rounds=3, warmup=1))
    after = loaded.engine.stats()
    assert report.data["requests"] == 6 and report.data["completion_tokens"] == 36
    assert after.generated_tokens - before.generated_tokens == 48
    assert after.prefix_tokens_found == before.prefix_tokens_found, "a prompt was found computed"


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (bench_throughput.run, BenchThroughputOptions("m")),
        (bench_latency.run, BenchLatencyOptions("m")),
        (bench_load.run, bench_load.BenchLoadOptions("m")),
        (bench_serve.run, bench_serve.BenchServeOptions()),
        (bench_kernels.run, bench_kernels.BenchKernelsOptions()),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(run: Callable[..., Any], options: Any, tmp_path: Path) -> None:
    for out, words in ((tmp_path, "is a directory"), (tmp_path / "no" / "o.json", "no is no directory")):
        with pytest.raises(InputError, match=words) as caught:
            run(replace(options, out=out))
        assert caught.value.where == "--out"


def test_what_cannot_be_measured_is_refused(loaded: LLM) -> None:
    with pytest.raises(InputError, match="2000 tokens"):
        bench_throughput.run(BenchThroughputOptions("m", Load(1, 2000, 8)))
    options: Any = BenchLatencyOptions("m", Load(9), engine=EngineOptions(max_num_seqs=8))
    with pytest.raises(InputError, match="--batch-size"):
        bench_latency.run(options)
