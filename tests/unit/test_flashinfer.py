"""Whose attention runs: what was asked for or an error, FlashInfer's where it is installed (on a GPU), against torch's."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_fixtures import awq_checkpoint, batch_of, config_of, texts_of
from torch import Tensor

from quantkit.errors import InputError, MachineError
from quantkit.model.attention import BACKENDS, Attention
from quantkit.model.load import load_decoder
from quantkit.ops import flashinfer_attention, paged_attention
from quantkit.runtime.kv_cache import cache_for
from quantkit.runtime.llm import LLM
from quantkit.runtime.params import SamplingParams

MODELS = Path(__file__).parent.parent / "data" / "models"
needs_flashinfer = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flashinfer") is None, reason="needs FlashInfer and a CUDA device"
)
KINDS = [(128, None, None), (64, 40, 5.0)]
"""Each is compiled once: a plain one, and one with a window and a soft cap."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_a_backend_that_cannot_run_is_an_error_not_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "flashinfer"):
        layer = Attention(64, 0.125, None, None, backend=name)
        with pytest.raises(MachineError, match=f"--attention-backend: is {name}, and Triton's kernel does not run here"):
            layer.require(torch.float32, torch.float32, torch.device("cpu"))
        with pytest.raises(MachineError, match="--attention-backend"):
            LLM(str(MODELS / "llama"), device="cpu", attention_backend=name, max_model_len=32)
    for name in ("auto", "torch"):
        Attention(64, 0.125, None, None, backend=name).require(torch.float32, torch.float32, torch.device("cpu"))
    with pytest.raises(InputError, match=f"--attention-backend: is 'fast', expected one of {', '.join(BACKENDS)}"):
        LLM(str(MODELS / "llama"), device="cpu", attention_backend="fast")
    monkeypatch.setattr("quantkit.model.attention.usable", lambda *_: True)
    with pytest.raises(MachineError, match="is flashinfer, and it "):
        Attention(64, 0.125, None, None, backend="flashinfer").require(torch.float32, torch.float32, torch.device("cpu"))
    q = torch.empty(0, 1, 64)
    assert Attention(64, 0.1, None, None).reads_blocks(q, q.dtype)
    assert not Attention(64, 0.1, None, None, backend="torch").reads_blocks(q, q.dtype)
    with pytest.raises(MachineError, match="no equal groups"):
        Attention(64, 0.125, None, None, (0, 0, 1), "triton").require(torch.float32, torch.float32, torch.device("cpu"))


def test_torch_s_attention_may_be_asked_for() -> None:
    params, found = SamplingParams(6, temperature=0.0, ignore_eos=True), []
    for name in ("auto", "torch"):
        with LLM(str(MODELS / "llama"), device="cpu", dtype="float32", max_model_len=64, max_num_seqs=2, attention_backend=name) as llm:
            assert all(block.attention.backend == name for block in llm.engine._executor._runner.decoder.blocks)  # type: ignore[union-attr,attr-defined]
            found.append(llm.generate([5, 6, 7], params)[0].token_ids)
    assert found[0] == found[1]


def test_what_flashinfer_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu, half = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
    obstacle = flashinfer_attention.obstacle.__wrapped__
    monkeypatch.setattr(flashinfer_attention, "installed", lambda: False)
    assert obstacle(gpu, half, half, 128, windowed=False, capped=False) == "it is not installed"
    monkeypatch.setattr(flashinfer_attention, "installed", lambda: True)
    assert "needs a GPU" in obstacle(cpu, half, half, 128, windowed=False, capped=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "16 bits" in obstacle(gpu, half, torch.float8_e4m3fn, 128, windowed=False, capped=False)
    assert "16 bits" in obstacle(gpu, torch.float32, torch.float32, 128, windowed=False, capped=False)
    assert obstacle(gpu, half, half, 80, windowed=False, capped=False) == "it has no heads of 80"


def test_a_version_of_flashinfer_that_fails_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(flashinfer_attention, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    obstacle = flashinfer_attention.obstacle.__wrapped__

    def broken(*_: Any, **__: Any) -> float:
        raise TypeError("plan() takes no such argument")

    for test, reason in ((broken, "does not run here (plan() takes"), (lambda *_, **__: 0.5, "its error is 0.5")):
        monkeypatch.setattr(flashinfer_attention, "self_test", test)
        assert reason in obstacle(torch.device("cuda"), torch.bfloat16, torch.bfloat16, 128, windowed=True, capped=False)
        assert "FlashInfer is not used" in caplog.messages[-1]
    monkeypatch.setattr(flashinfer_attention, "self_test", lambda *_, **__: 0.001)
    assert obstacle(torch.device("cuda"), torch.bfloat16, torch.bfloat16, 128, windowed=True, capped=False) is None


def test_pages_know_who_has_one_token() -> None:
    tables = paged_attention.table_of([[3], [0, 1], [2]], torch.device("cpu"))
    pages = paged_attention.make_pages(tables, [2, 1, 0], [(9, 10), (3, 20), (4, 5)], 2)
    assert (pages.singles, pages.pieces, pages.spans) == (1, 18, ((9, 10), (3, 20), (4, 5)))
    alone = pages.alone()
    assert (alone.rows.tolist(), alone.lengths.tolist(), alone.starts.tolist(), alone.tasks.tolist()) == ([2], [10], [0, 1], [[0, 0]])
    assert (alone.longest, alone.height, alone.group, alone.pieces) == (10, 16, 2, 0) and alone.tables is tables
    assert paged_attention.make_pages(tables, range(2), [(19, 20), (4, 5)], 1).pieces == 0
    lengths = torch.tensor([20, 5], dtype=torch.int32)
    assert paged_attention.decode_pages(tables, lengths, lengths, 1, 20).pieces == 0


# on a GPU


@pytest.mark.gpu
@needs_flashinfer
@pytest.mark.parametrize(("dim", "window", "softcap"), KINDS)
def test_it_is_torch_s_attention(dim: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In scattered blocks, of which the places that are no token's are NaN; plans follow one another without being waited for."""
    device = torch.device("cuda", 0)
    kind = {"windowed": window is not None, "capped": softcap is not None}
    assert flashinfer_attention.obstacle(device, torch.bfloat16, torch.bfloat16, dim, **kind) is None
    error = flashinfer_attention.self_test(device, torch.bfloat16, dim, window=window, softcap=softcap)
    assert error < 1e-2
    before = flashinfer_attention._Planner.run
    monkeypatch.setattr(flashinfer_attention._Planner, "run", lambda *given: before(*given[:5], 1.5 * given[5], *given[6:]))
    assert flashinfer_attention.self_test(device, torch.bfloat16, dim, window=window, softcap=softcap) > 5e-2
    monkeypatch.undo()
    heads, kv_heads = 8, 2
    generator = torch.Generator().manual_seed(3)
    passes: list[tuple[Tensor, Tensor, Tensor]] = []
    layer = Attention(dim, dim**-0.5, window, softcap)
    for spans in ([(0, 33)], [(31, 64), (500, 501), (0, 7)], [(990, 1100), (17, 19)], [(0, 1), (700, 701), (2, 5)]):
        order = torch.randperm(120, generator=generator).tolist()
        pool = torch.full((2, 120, 16, kv_heads, dim), float("nan"), dtype=torch.bfloat16)
        tables = [[order.pop() for _ in range(-(-stop // 16))] for _, stop in spans]
        for table, (_, stop) in zip(tables, spans, strict=True):
            for at in range(stop):
                pool[:, table[at // 16], at % 16] = torch.randn(2, kv_heads, dim, generator=generator).bfloat16()
        pool = pool.to(device)
        q = torch.randn(sum(b - a for a, b in spans), heads, dim, generator=generator).to(device, torch.bfloat16)
        pages = paged_attention.make_pages(paged_attention.table_of(tables, device), range(len(tables)), spans, heads // kv_heads)
        got = flashinfer_attention.attend(q, pool[0], pool[1], pages, scale=dim**-0.5, window=window, softcap=softcap)
        row, wants = 0, []
        for table, (start, stop) in zip(tables, spans, strict=True):
            held = [x[table].flatten(0, 1)[:stop].double() for x in pool]
            wants.append(layer._over(q[row : row + stop - start].double(), *held))
            row += stop - start
        passes.append((got, torch.cat(wants), q))
    for got, want, _ in passes:
        assert float((got.double() - want).abs().max()) < 3e-2


@pytest.mark.gpu
@needs_flashinfer
def test_a_model_over_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of prompts go to FlashInfer, decoding to Triton's kernel; logits are those of torch's attention."""
    config = config_of("llama") | {"head_dim": 128, "hidden_size": 96, "intermediate_size": 96, "tie_word_embeddings": True}
    checkpoint: Any = awq_checkpoint(config, 16)
    texts = texts_of((40, 22))
    steps = [[(0, 19), (0, 7)], [(19, 20), (7, 18)], [(20, 21), (18, 19)], [(21, 40), (19, 20)]]
    found, calls = [], []
    monkeypatch.setattr(flashinfer_attention._Planner, "_plan", _counted(flashinfer_attention._Planner._plan, calls))
    for name in ("flashinfer", "torch"):
        decoder = load_decoder(checkpoint, dtype=torch.bfloat16, device="cuda:0", attention=name)
        for block in decoder.blocks:
            block.attention.require(torch.bfloat16, torch.bfloat16, decoder.device)
        calls.clear()
        cache = cache_for(decoder, 7)
        cache.extend(0, [5, 1, 3], 0)
        cache.extend(1, [0, 6], 0)
        rows = []
        for now in steps:
            tokens = torch.cat([text[start:stop] for text, (start, stop) in zip(texts, now, strict=True)])
            rows.append(decoder.logits(decoder.forward(tokens, batch_of(now, (0, 1)), cache)))
        assert len(calls) == (3 if name == "flashinfer" else 0), "one plan for all layers of a pass that has pieces"
        found.append(torch.cat(rows).double())
    assert float((found[0] - found[1]).abs().max()) < 0.15 * float(found[1].abs().max())


def _counted(function: Any, calls: list[int]) -> Any:
    def counted(*given: Any) -> None:
        calls.append(1)
        function(*given)

    return counted
