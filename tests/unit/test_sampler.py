"""The sampler against plain definitions: what may be drawn, how often, what is reported, and that nothing else matters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.runtime.sampler import INVALID, Sampled, SamplingParams, greedy, penalized, sample, token_logprob, uniform


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors as small as these are only slowed down by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(logits: list[float], index: int = 0, seed: int = 0, counts: dict[int, int] | None = None, **params: Any) -> Sampled:
    return sample(torch.tensor(logits), SamplingParams(8, **params), seed=seed, index=index, counts=counts or {})


def allowed(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The definition: token -> probability of the distribution that is left, in float64."""
    peak = max(logits)
    weights = {token: math.exp((value - peak) / temperature) for token, value in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: -weights[token])[: top_k or None]
    total, mass, kept = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        kept.append(token)
        mass += weights[token]
        if mass >= top_p * total:
            break
    kept = [token for token in kept if weights[token] >= min_p]
    left = sum(weights[token] for token in kept)
    return {token: weights[token] / left for token in kept}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=40, unique=True),
    st.floats(0.2, 3.0),
    st.integers(0, 12),
    st.floats(0.05, 1.0),
    st.sampled_from([0.0, 0.05, 0.4]),
    st.integers(0, 2**63),
)
def test_only_what_the_cuts_leave_is_drawn(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    loose = allowed(logits, temperature, top_k, min(top_p + 1e-5, 1.0), max(min_p - 1e-5, 0.0))
    for index in range(6):
        got = draw(logits, index, seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        assert got.token in loose


@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.2},
    ],
)
def test_tokens_are_as_frequent_as_they_are_probable(cuts: dict[str, Any]) -> None:
    """1,500 positions of one request: a chi-squared test that a wrong distribution fails and a right one passes for this seed."""
    logits = [0.1 * ((7 * token) % 12) * 3 for token in range(12)]
    want = allowed(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **cuts})
    rounds = 1500
    seen = Counter(draw(logits, index, seed=11, **cuts).token for index in range(rounds))
    assert set(seen) == set(want)
    chi = sum((seen[token] - rounds * p) ** 2 / (rounds * p) for token, p in want.items())
    assert chi < 2.2 * len(want) + 14


def test_random_numbers_are_fixed_by_seed_and_position() -> None:
    values = [uniform(3, index) for index in range(2000)]
    assert values == [uniform(3, index) for index in range(2000)] and values != [uniform(4, index) for index in range(2000)]
    assert all(0 <= value < 1 for value in values) and abs(sum(values) / 2000 - 0.5) < 0.02
    assert uniform(0, 1) == 0.29868916236736043, "a seed means the same text in every version"


def test_greedy_takes_the_lowest_of_equals_and_refuses_what_is_no_number() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, float("nan"), 1.0, 2.0], [float("inf"), 0.0, 0.0, 0.0]])
    assert [got.token for got in greedy(rows)] == [1, 0, INVALID, INVALID]
    assert draw([1.0, 3.0, 3.0], temperature=0).token == 1
    for broken in ([0.0, math.nan], [math.inf, 0.0]):
        assert draw(broken, temperature=0, logprobs=1) == draw(broken, temperature=1, logprobs=1) == Sampled(INVALID)
    masked = [-math.inf, 0.0, -math.inf]
    assert draw(masked).token == draw(masked, temperature=0).token == 1


def test_limits_of_the_parameters_are_greedy() -> None:
    logits = [0.5, 2.0, 1.9, -3.0]
    for index in range(50):
        for cut in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-30}):
            assert draw(logits, index, **cut).token == 1


def test_top_p_of_a_flat_vocabulary() -> None:
    """3,000 equal tokens: top-p 0.9 leaves 2,700 of them: none is too unlikely to count."""
    seen = {draw([0.0] * 3000, index, top_p=0.9).token for index in range(200)}
    assert len(seen) > 180 and 2400 < max(seen) < 2700


def test_penalties_are_of_generated_tokens() -> None:
    logits = torch.tensor([3.0, 2.5, 1.0, 0.0])
    params = SamplingParams(8, temperature=0, presence_penalty=0.25, frequency_penalty=0.5)
    assert torch.allclose(penalized(logits, params, {0: 2, 2: 1}), torch.tensor([1.75, 2.5, 0.25, 0.0]))
    assert penalized(logits, params, {}) is logits and penalized(logits, SamplingParams(8), {0: 2}) is logits
    assert sample(logits, params, seed=0, index=0, counts={0: 1}).token == 1
    assert sample(logits, params, seed=0, index=0, counts={}).token == 0
    assert logits.tolist() == [3.0, 2.5, 1.0, 0.0], "the model's logits are left alone"


def test_logprobs_are_of_the_model_not_of_what_was_sampled_from() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    total = math.log(sum(math.exp(value) for value in logits))
    got = draw(logits, counts={0: 3}, temperature=0, frequency_penalty=2.0, logprobs=3)
    assert got.token == 1 and got.logprob is not None
    assert got.logprob.logprob == pytest.approx(1.0 - total, abs=1e-6)
    assert [token for token, _ in got.logprob.top] == [0, 1, 2]
    assert [value for _, value in got.logprob.top] == pytest.approx([value - total for value in logits[:3]], abs=1e-6)
    assert draw(logits, temperature=0).logprob is None
    assert draw(logits, temperature=0, logprobs=0).logprob == token_logprob(torch.tensor(logits), 0, 0)
    assert len(token_logprob(torch.tensor(logits), 0, 20).top) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "warm"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"min_p": 2.0},
        {"seed": 1 << 64},
        {"seed": 0.5},
        {"logprobs": 21},
        {"logprobs": -1},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3},
        {"stop": ("a", "")},
        {"stop": tuple("abcdefgh" * 9)},
        {"stop_ids": (-1,)},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**{"max_tokens": 4, **wrong})
    assert caught.value.where == next(iter(wrong))
