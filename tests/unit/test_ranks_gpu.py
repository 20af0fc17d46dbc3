"""Ranks on GPUs, one and several: the same text in any number of them, by processes and by Ray's actors; deaths that are noticed."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fixtures import Client
from rank_fixtures import heard_at

from quantkit.errors import RuntimeDied
from quantkit.runtime.engine import SamplingParams, TokenLogprob
from quantkit.runtime.start import start_engine

LLAMA = Path(__file__).parent.parent / "data" / "models" / "llama"
PROMPTS = ("The capital", "In the beginning of the year the", "One two three four", "A")
PARAMS = (SamplingParams(24, temperature=0, ignore_eos=True), SamplingParams(24, seed=5, top_p=0.9, frequency_penalty=0.1, ignore_eos=True))
ROUNDED = 0.1
"""By how much log-probabilities may differ in bfloat16."""
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
EXECUTORS = ("local", pytest.param("ray", marks=pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")))


def answers(engine: Any) -> list[list[int]]:
    """Tokens of every prompt in every way, all at once."""
    clients = [Client(engine, engine.tokenizer.encode(text, special=True), params) for text in PROMPTS for params in PARAMS]
    return [client.answer().tokens for client in clients]


def said(**how: Any) -> list[list[int]]:
    engine = start_engine(str(LLAMA), **how)
    try:
        return answers(engine)
    finally:
        engine.close()


def scored(how: dict[str, Any]) -> list[list[TokenLogprob]]:
    """The likeliest tokens after each prompt, and how likely they and their rivals are."""
    engine = start_engine(str(LLAMA), **how)
    params = SamplingParams(24, temperature=0, ignore_eos=True, logprobs=5)
    try:
        return [Client(engine, engine.tokenizer.encode(text, special=True), params).answer().logprobs for text in PROMPTS]
    finally:
        engine.close()


def scores_agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Token for token, until two texts part; there the other's token was among the likeliest, no less likely than roundings explain."""
    compared = 0
    for mine, theirs in zip(scored(one), scored(other), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            rivals = dict(a.top)
            assert b.token in rivals and abs(b.logprob - rivals[b.token]) < ROUNDED and rivals[b.token] > a.logprob - ROUNDED
            compared += 1
            if a.token != b.token:
                break
    assert compared >= 8 * len(PROMPTS), "texts that part at once show nothing"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_says_what_the_cpu_says() -> None:
    assert said(device="cuda", parity=True) == said(device="cpu", parity=True)
    engine = start_engine(str(LLAMA))
    try:
        assert engine.dtype == "bfloat16" and answers(engine) == answers(engine)
    finally:
        engine.close()
    assert torch.cuda.memory_reserved() < 1 << 28, "a closed engine gives its memory back, nine tenths of the GPU's"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_an_actor_of_rays_on_a_gpu_says_what_this_process_says() -> None:
    assert said(device="cuda", dtype="float32", executor="ray") == said(device="cuda", dtype="float32")


@pytest.mark.multigpu
@TWO
@pytest.mark.parametrize("executor", EXECUTORS)
def test_two_gpus_say_what_one_says(executor: str) -> None:
    assert said(tp=2, device="cuda", dtype="float32", executor=executor) == said(device="cuda", dtype="float32")


@pytest.mark.multigpu
@TWO
def test_two_gpus_differ_from_one_in_bfloat16_by_its_roundings() -> None:
    """A rank's part of a sum is rounded before it is added, so texts may part, but only where two tokens are as likely as can be told."""
    scores_agree({"device": "cuda", "dtype": "bfloat16"}, {"tp": 2, "device": "cuda", "dtype": "bfloat16"})


def test_two_ranks_differ_from_one_in_bfloat16_by_its_roundings() -> None:
    """The same on a CPU, by processes."""
    scores_agree({"device": "cpu", "dtype": "bfloat16"}, {"tp": 2, "device": "cpu", "dtype": "bfloat16"})


@pytest.mark.multigpu
@TWO
@pytest.mark.parametrize("executor", EXECUTORS)
def test_two_replicas_have_a_gpu_each(executor: str) -> None:
    engine: Any = start_engine(str(LLAMA), dp=2, device="cuda", dtype="float32", executor=executor)
    try:
        assert answers(engine) == said(device="cuda", dtype="float32")
        ranks = [one._executor.ranks[0] for one in engine._engines]
        if executor == "local":
            assert [rank.start["device"] for rank in ranks] == ["cuda:0", "cuda:1"]
        assert all(one.stats().steps > 0 for one in engine._engines)
    finally:
        engine.close()


@pytest.mark.multigpu
@TWO
def test_ranks_on_gpus_listen_on_loopback_and_a_killed_or_silent_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.runtime.executor.SILENT_SECONDS", 4.0)
    for number, words in ((signal.SIGKILL, "rank 1: was killed by SIGKILL"), (signal.SIGSTOP, "rank 1: has said nothing")):
        engine: Any = start_engine(str(LLAMA), tp=2, device="cuda", parity=True, timeout=10)
        try:
            pids = [rank.process.pid for rank in engine._executor.ranks]
            answers(engine)
            assert heard_at(pids) <= {"127.0.0.1", "::1"}
            os.kill(pids[1], number)
            start = time.monotonic()
            with pytest.raises(RuntimeDied, match=words):
                answers(engine)
            assert time.monotonic() - start < 15
            assert all(not Path(f"/proc/{pid}").exists() for pid in pids), "none is left"
        finally:
            engine.close()
