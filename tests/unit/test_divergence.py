"""Divergence: its figures against their definitions, computed over whole windows at once."""

from __future__ import annotations

import math

import pytest
import torch
from decoder_fixtures import batch_of, config_of, random_twin
from torch import Tensor

from quantkit.errors import InputError
from quantkit.evaluate.divergence import divergence
from quantkit.evaluate.perplexity import perplexity
from quantkit.model.decoder import Decoder
from quantkit.model.load import load_decoder

IDS = torch.randint(0, 131, (53,), generator=torch.Generator().manual_seed(3)).tolist()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base() -> Decoder:
    return load_decoder(random_twin(config_of("qwen2"), torch.float32)[1], dtype=torch.float32)


@pytest.fixture(scope="module")
def other() -> Decoder:
    """The same model in bfloat16: near, and not equal."""
    return load_decoder(random_twin(config_of("qwen2"), torch.float32)[1], dtype=torch.bfloat16)


def log_probabilities(decoder: Decoder, window: list[int]) -> Tensor:
    with torch.inference_mode():
        logits = decoder.logits(decoder.forward(torch.tensor(window), batch_of([(0, len(window))])))
    return logits.double().log_softmax(-1)


def test_a_model_does_not_diverge_from_itself(base: Decoder) -> None:
    found = divergence(base, base, IDS, window=16, stride=16)
    assert (found.mean, found.maximum, found.rms_change, found.same_top) == (0.0, 0.0, 0.0, 1.0)
    assert found.perplexity == perplexity(base, IDS, window=16, stride=16)


def test_figures_are_their_definitions(base: Decoder, other: Decoder) -> None:
    found = divergence(base, other, IDS, window=16, stride=16)
    kl, changes, same = [], [], []
    for start in (0, 16, 32):
        window = IDS[start : start + 16]
        p, q = log_probabilities(base, window)[:-1], log_probabilities(other, window)[:-1]
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        true = torch.tensor(window[1:])[:, None]
        changes += (q.gather(1, true).exp() - p.gather(1, true).exp())[:, 0].tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    ordered = sorted(kl)
    assert found.mean == pytest.approx(sum(kl) / len(kl), rel=1e-3, abs=1e-7)
    assert found.mean > 0
    assert found.error == pytest.approx(torch.tensor(kl).std().item() / math.sqrt(len(kl)), rel=1e-2)
    assert found.median == pytest.approx(ordered[len(kl) // 2], rel=1e-2, abs=1e-7)
    assert found.maximum == pytest.approx(ordered[-1], rel=1e-2)
    assert found.rms_change == pytest.approx(math.sqrt(sum(c * c for c in changes) / len(changes)), rel=1e-3)
    assert found.same_top == sum(same) / len(same)
    assert found.perplexity.value == pytest.approx(perplexity(other, IDS, window=16, stride=16).value, rel=1e-5)


def test_models_of_other_vocabularies_are_refused(base: Decoder) -> None:
    config = {**config_of("qwen2"), "vocab_size": 140}
    wide = load_decoder(random_twin(config, torch.float32)[1], dtype=torch.float32)
    with pytest.raises(InputError, match="a vocabulary of"):
        divergence(base, wide, IDS, window=16, stride=16)
