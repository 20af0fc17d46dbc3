"""Perplexity: its windows and conventions, against the definition computed one window at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from decoder_fixtures import batch_of, config_of, random_twin

from quantkit.errors import InputError
from quantkit.evaluate.perplexity import perplexity
from quantkit.layouts.plain import DenseLinear
from quantkit.model.decoder import Decoder
from quantkit.model.load import load_decoder

IDS = torch.randint(0, 131, (53,), generator=torch.Generator().manual_seed(3)).tolist()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load_decoder(random_twin(config_of("qwen2"), torch.float32)[1], dtype=torch.float32)


def nll(decoder: Decoder, window: list[int], first: int) -> list[float]:
    """Negative log-likelihoods of ``window[first:]``, each given all before it."""
    with torch.inference_mode():
        logits = decoder.logits(decoder.forward(torch.tensor(window), batch_of([(0, len(window))])))
    logp = logits.log_softmax(-1)
    return [-float(logp[i - 1, window[i]]) for i in range(first, len(window))]


def check(decoder: Decoder, windows: list[tuple[list[int], int]], window: int, stride: int, bos: int | None) -> str:
    values = [value for part, first in windows for value in nll(decoder, part, first)]
    found = perplexity(decoder, IDS, window=window, stride=stride, bos=bos)
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    assert found.scored == len(values)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-4)
    assert found.error == pytest.approx(math.exp(mean) * spread / math.sqrt(len(values) - 1), rel=1e-3)
    assert found.tokens == len(IDS)
    return found.convention


def test_windows_that_do_not_overlap_drop_the_tail(decoder: Decoder) -> None:
    windows = [(IDS[start : start + 16], 1) for start in (0, 16, 32)]
    assert check(decoder, windows, 16, 16, None) == "window 16, stride 16, windows do not overlap, 45 tokens scored"


def test_with_bos_every_token_of_a_window_counts(decoder: Decoder) -> None:
    windows = [([7, *IDS[start : start + 15]], 1) for start in (0, 15, 30)]
    assert check(decoder, windows, 16, 16, 7) == "window 16, stride 16, BOS first in each window, windows do not overlap, 45 tokens scored"


def test_with_a_stride_only_new_tokens_count(decoder: Decoder) -> None:
    windows = [(IDS[:16], 1), *((IDS[start : start + 16], 12) for start in range(4, 37, 4)), (IDS[40:53], 12)]
    assert check(decoder, windows, 16, 4, None) == "window 16, stride 4, only new tokens scored, 52 tokens scored"
    with_bos = [([7, *IDS[:15]], 1), *(([7, *IDS[start : start + 15]], 12) for start in range(4, 37, 4)), ([7, *IDS[40:53]], 12)]
    assert "53 tokens scored" in check(decoder, with_bos, 16, 4, 7)


def test_a_text_shorter_than_a_window_is_one_window(decoder: Decoder) -> None:
    check(decoder, [(IDS, 1)], 64, 64, None)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(decoder: Decoder) -> None:
    blind = Decoder(
        decoder.spec,
        decoder.embedding,
        decoder.blocks,
        decoder.norm,
        replace(decoder.head, op=DenseLinear(torch.zeros_like(decoder.head.op.weight()), None)),
        decoder.comm,
        decoder.kv_heads,
    )
    found = perplexity(blind, IDS, window=16, stride=16)
    assert found.value == pytest.approx(131, rel=1e-5)
    assert found.error == pytest.approx(0, abs=0.05)


def test_batches_do_not_change_the_figure(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    one = perplexity(decoder, IDS, window=8, stride=5)
    monkeypatch.setattr("quantkit.evaluate.perplexity.BATCH_TOKENS", 8)
    monkeypatch.setattr("quantkit.evaluate.perplexity.LOGIT_ROWS", 3)
    steps: list[tuple[str, int, int]] = []
    other = perplexity(decoder, IDS, window=8, stride=5, progress=lambda *step: steps.append(step), stage="ppl")
    assert other.value == pytest.approx(one.value, rel=1e-5)
    assert steps[0] == ("ppl", 0, 10) and steps[-1] == ("ppl", 10, 10)


def test_logits_that_are_not_numbers_are_refused(decoder: Decoder) -> None:
    broken = replace(decoder.head, op=DenseLinear(decoder.head.op.weight() * float("nan"), None))
    other = Decoder(decoder.spec, decoder.embedding, decoder.blocks, decoder.norm, broken, decoder.comm, decoder.kv_heads)
    with pytest.raises(InputError, match="perplexity: the model's logits are not finite"):
        perplexity(other, IDS, window=16, stride=16)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (16, 17), (16, 0)])
def test_windows_that_cannot_be_used_are_refused(decoder: Decoder, window: int, stride: int) -> None:
    with pytest.raises(InputError, match="--window/--stride"):
        perplexity(decoder, IDS, window=window, stride=stride)


@pytest.mark.parametrize("ids", [[], [5]])
def test_a_text_of_less_than_two_tokens_is_refused(decoder: Decoder, ids: list[int]) -> None:
    with pytest.raises(InputError, match=f"text: has {len(ids)} tokens, expected at least 2"):
        perplexity(decoder, ids, window=16, stride=16)
