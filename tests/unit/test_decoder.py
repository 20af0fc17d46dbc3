"""The decoder's logits are transformers': every row and rotary kind, with and without a cache, alone and cut among ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from decoder_fixtures import (
    FAMILIES,
    GrowingCache,
    MemoryCheckpoint,
    awq_checkpoint,
    batch_of,
    config_of,
    logits_of,
    plan_of,
    random_twin,
    texts_of,
)
from torch import Tensor

from quantkit.arch.table import spec_for
from quantkit.comm import Comm, run_threads
from quantkit.model import attention
from quantkit.model.attention import Attention, Batch, kv_index
from quantkit.model.decoder import Decoder
from quantkit.model.load import embedded, load_block, load_decoder, load_head
from quantkit.plan import GATHER, ParallelPlan

BAR = 1e-8
BARS = {"gemma2": 5e-5, "gemma2-types": 5e-5}
"""transformers computes Gemma 2's softmax in float32, whatever the dtype of the model."""
LENGTHS = (23, 12, 23, 1)
CROSSES = ("rope-longrope", "rope-longrope-ratio", "phi3-longrope", "phi3-old-config")
"""Families whose angles change at 16 tokens: a cache keeps keys rotated as they were, here and in transformers."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def twin(family: str) -> tuple[Any, MemoryCheckpoint, tuple[Tensor, ...]]:
    """The transformers model, its checkpoint, and transformers' logits of ``texts_of(LENGTHS)``."""
    with torch.no_grad():
        model, checkpoint = random_twin(config_of(family))
        return model, checkpoint, tuple(model(text[None]).logits[0] for text in texts_of(LENGTHS))


def bar_of(family: str) -> float:
    return BARS.get(family, BAR)


def worst(got: list[Tensor] | tuple[Tensor, ...], want: list[Tensor] | tuple[Tensor, ...]) -> float:
    assert [g.shape for g in got] == [w.shape for w in want]
    return max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    _, checkpoint, want = twin(family)
    decoder = load_decoder(checkpoint, dtype=torch.float64)
    texts = texts_of(LENGTHS)
    assert worst(logits_of(decoder, texts), want) < bar_of(family)
    same = [texts[0], texts[2]]  # equal lengths are one attention call
    assert worst(logits_of(decoder, same), [want[0], want[2]]) < bar_of(family)
    assert min(float(w.std()) for w in want) > 0.5, "the bar is absolute: it means nothing on logits near 0"


@pytest.mark.parametrize("family", BARS)
def test_all_but_the_softmax_of_gemma2_is_that_of_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint, want = twin(family)
    decoder, wide = load_decoder(checkpoint, dtype=torch.float64), Tensor.softmax
    monkeypatch.setattr(attention, "scaled_dot_product_attention", _eager)
    monkeypatch.setattr(Tensor, "softmax", lambda scores, dim, dtype: wide(scores, dim, dtype=torch.float32))
    assert worst(logits_of(decoder, texts_of(LENGTHS)), want) < BAR


def _eager(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, attn_mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """Attention by its definition, with its softmax in float32."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if is_causal else attn_mask
    scores = scores if seen is None else scores.masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_matters(family: str) -> None:
    """A norm, bias or matrix that the decoder left out would show: changing any tensor changes the logits.

    Not by a constant, which added to every row of a router changes nothing. One layer of each kind stands for its like.
    """
    _, checkpoint, want = twin(family)
    text, spec = texts_of(LENGTHS)[:1], spec_for(checkpoint.config)
    kinds = {(window, *(path.rpartition(".")[2] for path in spec.block_linears(n).values())): n for n, window in enumerate(spec.windows)}
    others = tuple(spec.tensor(layer, "") for layer in range(spec.layers) if layer not in kinds.values())
    for name, value in checkpoint.values.items():
        if name.startswith(others):
            continue
        moved = replace(checkpoint, values={**checkpoint.values, name: value + torch.linspace(-0.5, 0.5, value.numel()).view_as(value)})
        assert worst(logits_of(load_decoder(moved, dtype=torch.float64), text), want[:1]) > 1e-4, name


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CROSSES])
def test_a_cache_changes_nothing(family: str) -> None:
    """Prefill whole and in pieces, decode token by token, and both in one batch: the logits of the whole text."""
    _, checkpoint, want = twin(family)
    decoder = load_decoder(checkpoint, dtype=torch.float64)
    for got in cached(decoder):
        assert worst(got, want[:3]) < bar_of(family)


def cached(decoder: Decoder) -> Iterator[list[Tensor]]:
    """Logits of the first three texts through a cache, by several schedules of (sequence, start, stop) spans per pass."""
    one_by_one = [
        [(0, 0, 9), (1, 0, 4), (2, 0, 9)],
        *([(s, i, i + 1) for s, i in ((0, 9 + n), (1, 4 + n), (2, 9 + n)) if i < LENGTHS[s]] for n in range(14)),
    ]
    mixed = [
        [(0, 0, 11)],
        [(0, 11, 12), (2, 0, 7)],
        [(2, 7, 19), (0, 12, 13), (1, 0, 12)],
        [(0, 13, 23), (2, 19, 20)],
        [(2, 20, 23)],
    ]
    texts = texts_of(LENGTHS)
    for schedule in (one_by_one, mixed):
        held = GrowingCache()
        rows: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
        for spans in schedule:
            tokens = torch.cat([texts[s][start:stop] for s, start, stop in spans])
            batch = batch_of([(start, stop) for _, start, stop in spans], tuple(40 + s for s, _, _ in spans))
            hidden = decoder.forward(tokens, batch, held)
            for (s, _, _), part in zip(spans, decoder.logits(hidden).split(batch.lengths), strict=True):
                rows[s].append(part)
        yield [torch.cat(rows[s]) for s in range(3)]


@pytest.mark.parametrize("family", CROSSES)
def test_a_cache_that_crosses_the_original_length_is_that_of_transformers(family: str) -> None:
    from transformers import DynamicCache

    model, checkpoint, _ = twin(family)
    decoder, text = load_decoder(checkpoint, dtype=torch.float64), texts_of(LENGTHS)[0]
    theirs, ours = DynamicCache(config=model.config), GrowingCache()
    for start, stop in ((0, 12), *((i, i + 1) for i in range(12, 23))):
        want = model(text[None, start:stop], past_key_values=theirs).logits[0]
        got = decoder.logits(decoder.forward(text[start:stop], batch_of([(start, stop)], (0,)), ours))
        assert worst([got], [want]) < BAR


def test_dynamic_scaling_beyond_the_trained_length_is_that_of_transformers() -> None:
    model, checkpoint, _ = twin("rope-dynamic")
    (text,) = texts_of((90,))
    want = model(text[None]).logits[0]
    assert worst(logits_of(load_decoder(checkpoint, dtype=torch.float64), [text]), [want]) < BAR


def test_a_cache_of_a_sliding_layer_may_forget() -> None:
    """The window is counted from the last token, so keys that no query sees need not be there."""
    _, checkpoint, want = twin("mistral")
    decoder, text = load_decoder(checkpoint, dtype=torch.float64), texts_of(LENGTHS)[0]

    class Forgetful(GrowingCache):
        def update(self, layer: int, sequence: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = super().update(layer, sequence, k, v)
            kept = k.shape[0] + 4  # window 5: the first query also sees 4 tokens before it
            return keys[-kept:], values[-kept:]

    held, rows = Forgetful(), []
    for start, stop in ((0, 9), (9, 10), (10, 17), *((i, i + 1) for i in range(17, 23))):
        rows.append(decoder.logits(decoder.forward(text[start:stop], batch_of([(start, stop)], (0,)), held)))
    assert worst([torch.cat(rows)], want[:1]) < BAR


# ranks


def on_ranks(
    checkpoint: MemoryCheckpoint, plan: ParallelPlan, work: Callable[[Decoder], list[Tensor]], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """``work`` of every rank's decoder, which must be equal bit for bit."""

    def rank(comm: Comm) -> list[Tensor]:
        with torch.no_grad():
            return work(load_decoder(checkpoint, dtype=dtype, plan=plan, comm=comm, parity=True))

    first, *others = run_threads(plan.tp, rank, timeout=60)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    return first


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_together_give_the_logits_of_transformers(family: str, tp: int) -> None:
    """3 KV heads on 2, 4 and 8 ranks: uneven groups, copies of KV heads, ranks without a head or a vocabulary row."""
    _, checkpoint, want = twin(family)
    plan = plan_of(checkpoint, tp)
    assert worst(on_ranks(checkpoint, plan, lambda decoder: logits_of(decoder, texts_of(LENGTHS))), want) < bar_of(family)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3", "gpt2", "qwen2-moe-steps"])
@pytest.mark.parametrize("tp", [2, 5])
def test_ranks_with_a_cache(family: str, tp: int) -> None:
    _, checkpoint, want = twin(family)
    rows = on_ranks(checkpoint, plan_of(checkpoint, tp), lambda decoder: [row for got in cached(decoder) for row in got])
    assert worst(rows, [*want[:3], *want[:3]]) < BAR


@pytest.mark.parametrize("family", ["llama-biases", "gemma3-pattern-softcap"])
def test_gathered_linears(family: str) -> None:
    """o and down cut on N behind a gather of their input: uneven, one rank without outputs, biases cut with the outputs."""
    _, checkpoint, want = twin(family)
    plan = plan_of(checkpoint, 3)
    hidden = (range(32), range(32, 32), range(32, 48))
    gathered = replace(plan, modes={**plan.modes, "o": GATHER, "down": GATHER}, ranges={**plan.ranges, "hidden": hidden})
    assert worst(on_ranks(checkpoint, gathered, lambda decoder: logits_of(decoder, texts_of(LENGTHS))), want) < BAR


def test_query_heads_of_one_group_on_two_ranks() -> None:
    """A rank whose query heads are no equal groups of its KV heads: 4 heads of 3 on one KV head and 1 on the next."""
    _, checkpoint, want = twin("llama")
    plan = plan_of(checkpoint, 2)
    ranges = {**plan.ranges, "heads": (range(3), range(3, 6)), "kv_heads": (range(2), range(1, 3))}
    assert kv_index(range(3), range(2), 2) == (0, 0, 1) and kv_index(range(2, 6), range(1, 3), 2) is None
    assert worst(on_ranks(checkpoint, replace(plan, ranges=ranges), lambda decoder: logits_of(decoder, texts_of(LENGTHS))), want) < BAR


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("group_size", [16, 48])
def test_packed_linears_on_ranks(tp: int, group_size: int) -> None:
    """AWQ words and groups cut among ranks: what one rank computes. Groups of 48 are too few to cut: o and down are gathered."""
    checkpoint = awq_checkpoint(config_of("qwen2-full") | {"head_dim": 16, "intermediate_size": 96}, group_size)
    want = logits_of(load_decoder(checkpoint, dtype=torch.float64, parity=True), texts_of(LENGTHS))
    plan = plan_of(checkpoint, tp)
    if group_size == 48:
        assert GATHER in plan.modes.values()
    assert worst(on_ranks(checkpoint, plan, lambda decoder: logits_of(decoder, texts_of(LENGTHS))), want) < BAR


def test_ranks_in_float32_differ_by_rounding_only() -> None:
    _, checkpoint, want = twin("llama")
    got = on_ranks(checkpoint, plan_of(checkpoint, 3), lambda decoder: logits_of(decoder, texts_of(LENGTHS)), torch.float32)
    assert got[0].dtype == torch.float32 and worst([g.double() for g in got], want) < 1e-4


# blocks, taps, attention by itself


def test_blocks_one_at_a_time_are_the_decoder() -> None:
    """What calibration does: embedding, each block with a tap, final norm and head, each loaded alone."""
    _, checkpoint, want = twin("gemma3")
    texts = texts_of(LENGTHS)
    decoder = load_decoder(checkpoint, dtype=torch.float64)
    spec, batch = decoder.spec, batch_of([(0, len(text)) for text in texts])
    x = torch.cat([embedded(checkpoint, spec, text[None], dtype=torch.float64)[0] for text in texts])
    for layer in range(spec.layers):
        seen: dict[str, Tensor] = {}

        def tap(role: str, value: Tensor, seen: dict[str, Tensor] = seen) -> None:
            assert role not in seen
            seen[role] = value.clone()

        block = load_block(checkpoint, spec, layer, dtype=torch.float64)
        x = block.forward(x, batch, None, tap)
        assert list(seen) == list(spec.linears)
        assert {role: value.shape[1] for role, value in seen.items()} == {role: spec.linear_shape(role)[1] for role in spec.linears}
        assert torch.equal(seen["q"], seen["v"]) and torch.equal(seen["gate"], seen["up"])
    norm, head = load_head(checkpoint, spec, dtype=torch.float64)
    assert worst(list(head(norm(x)).split(batch.lengths)), want) < BAR


def test_empty_passes_and_empty_sequences() -> None:
    _, checkpoint, want = twin("gemma3")
    decoder, text = load_decoder(checkpoint, dtype=torch.float64), texts_of(LENGTHS)[1]
    nothing = decoder.forward(text[:0], Batch(text[:0], (), None))
    assert decoder.logits(nothing).shape == (0, 131)
    hidden = decoder.forward(text, batch_of([(0, 0), (0, 12), (0, 0)], (7, 8, 9)), GrowingCache())
    assert worst([decoder.logits(hidden)], want[1:2]) < BAR


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_attention_against_its_definition(softcap: float | None, window: int | None) -> None:
    """Query i sees key j when j <= i and j > i - window; scores are capped before the softmax."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(9, 4, 8, generator=generator, dtype=torch.float64) * 3
    k, v = (torch.randn(9, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    want = torch.empty(9, 4, 8, dtype=torch.float64)
    for i in range(9):
        first = 0 if window is None else max(0, i - window + 1)
        for h in range(4):
            scores = k[first : i + 1, h // 2] @ q[i, h] * 0.3
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            want[i, h] = scores.softmax(0) @ v[first : i + 1, h // 2]
    layer = Attention(8, 0.3, window, softcap)
    flat = want.flatten(1)
    assert worst([layer(q, k, v, batch_of([(0, 9)]), None, 0)], [flat]) < 1e-12
    for steps in ((9,), (1,) * 9, (4, 1, 3, 1)):
        held, rows, start = GrowingCache(), [], 0
        for step in steps:
            part = slice(start, start + step)
            rows.append(layer(q[part], k[part], v[part], batch_of([(start, start + step)], (0,)), held, 0))
            start += step
        assert worst([torch.cat(rows)], [flat]) < 1e-12


def test_the_bytes_of_a_decoder_are_its_weights() -> None:
    _, checkpoint, _ = twin("llama")
    assert load_decoder(checkpoint, dtype=torch.float64).nbytes == sum(value.nbytes for value in checkpoint.values.values())
    _, tied, _ = twin("gemma3")
    assert load_decoder(tied, dtype=torch.float32).nbytes == sum(value.numel() * 4 for value in tied.values.values())


def mean_error(got: list[Tensor], want: tuple[Tensor, ...]) -> float:
    return float((torch.cat(got).cpu().double() - torch.cat(want)).abs().mean())


def test_bfloat16_errs_as_transformers_does() -> None:
    """No bar on bfloat16 can be absolute: the mean error against float64 is that of transformers in bfloat16."""
    for family in ("llama-biases", "qwen3", "gemma3"):
        _, checkpoint, want = twin(family)
        model = random_twin(config_of(family))[0].to(torch.bfloat16)
        theirs = mean_error([model(text[None]).logits[0] for text in texts_of(LENGTHS)], want)
        ours = mean_error(logits_of(load_decoder(checkpoint, dtype=torch.bfloat16), texts_of(LENGTHS)), want)
        assert 0 < ours < 1.2 * theirs


GPU_FAMILIES = (
    "llama-biases",
    "qwen2",
    "qwen3",
    "gemma3",
    "rope-dynamic",
    "rope-longrope",
    "gemma2",
    "phi3-longrope",
    "gpt2",
    "qwen2-moe-steps",
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", GPU_FAMILIES)
def test_a_gpu_gives_the_logits_of_transformers(family: str) -> None:
    """Float64 on CUDA against transformers on the CPU: its cosines are computed in float32, so the devices differ by 1e-7."""
    _, checkpoint, want = twin(family)
    decoder = load_decoder(checkpoint, dtype=torch.float64, device="cuda")
    texts = texts_of(LENGTHS)
    got = logits_of(decoder, texts)
    assert got[0].is_cuda
    assert worst([g.cpu() for g in got], want) < 1e-4
    # bfloat16 rounds by as much as it does on the CPU, where transformers errs the same.
    error = {
        device: mean_error(logits_of(load_decoder(checkpoint, dtype=torch.bfloat16, device=device), texts), want)
        for device in ("cpu", "cuda")
    }
    assert error["cuda"] < 1.3 * error["cpu"], error
    if family not in CROSSES:
        for rows in cached(decoder):
            assert worst(rows, got[:3]) < BAR

    def rank(comm: Comm) -> list[Tensor]:
        with torch.no_grad():
            return logits_of(load_decoder(checkpoint, dtype=torch.float64, device="cuda", plan=plan_of(checkpoint, 4), comm=comm), texts)

    for part in run_threads(4, rank):
        assert worst(part, got) < 1e-6
