"""Decoding as CUDA graphs says what the same passes say one kernel at a time, on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_fixtures import config_of, random_twin

from quantkit.model.load import load_decoder
from quantkit.runtime import worker
from quantkit.runtime.graphs import obstacle, sizes_for
from quantkit.runtime.kv_cache import cache_for
from quantkit.runtime.llm import LLM
from quantkit.runtime.params import SamplingParams

MODELS = Path(__file__).parent.parent / "data" / "models"
PROMPTS = ("The capital", "A", "In the beginning of the year the", "If you want to know what this is,", "One two three four", "def f(x):")


def test_sizes() -> None:
    assert sizes_for(1) == (1,) and sizes_for(8) == (1, 2, 4, 8) and sizes_for(100)[-2:] == (96, 100)
    assert sizes_for(5000)[-1] == 512, "larger batches go without"


@pytest.mark.parametrize("family", ["llama", "qwen2-moe"])
def test_what_stands_in_the_way_is_said(family: str) -> None:
    _, checkpoint = random_twin(config_of(family), torch.bfloat16)
    decoder = load_decoder(checkpoint, dtype=torch.bfloat16)
    assert obstacle(decoder, cache_for(decoder, 1)) == "it is not on a GPU"


def answers(path: Path, *, ahead: bool = True, **options: Any) -> tuple[list[tuple[int, ...]], bool]:
    """Tokens of greedy and sampled requests beside each other, and whether there were graphs."""
    asks = [SamplingParams(40, temperature=0, ignore_eos=True), SamplingParams(40, temperature=0)]
    asks += [SamplingParams(40, seed=1, ignore_eos=True), SamplingParams(30, seed=2, top_k=20, repetition_penalty=1.3)]
    asks += [SamplingParams(24, seed=3, top_p=0.8, logprobs=2), SamplingParams(9, temperature=0, presence_penalty=0.5)]
    with LLM(str(path), device="cuda", max_num_seqs=2, **options) as llm:
        engine: Any = llm.engine
        engine._ahead = int(ahead)
        found = [one.token_ids for one in llm.generate([*PROMPTS, PROMPTS[0]], [*asks, asks[0]])]
        found += [one.token_ids for one in llm.generate([*PROMPTS], asks[0])]
        return found, engine._executor.runner.graphs is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_graphs_are_eager(name: str, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled, with penalties and cuts, two seats for seven requests, run ahead or not: the same tokens."""
    captured, graphs = answers(MODELS / name, kv_cache_dtype=kv)
    waited, _ = answers(MODELS / name, kv_cache_dtype=kv, ahead=False)
    monkeypatch.setattr(worker, "make_graphs", lambda *given: None)
    eager, none = answers(MODELS / name, kv_cache_dtype=kv)
    assert graphs and not none
    assert captured == waited == eager
