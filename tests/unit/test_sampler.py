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

from quantkit.comm import Comm, Solo, run_threads
from quantkit.errors import InputError
from quantkit.runtime.sampler import INVALID, Sampled, Sampler, SamplingParams, gumbel, random_key


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors as small as these are only slowed down by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sampler(columns: range, vocab: int, comm: Comm, requests: list[SamplingParams], prompts: list[list[int]] | None = None) -> Sampler:
    """A sampler with a sequence for each request, whose seed is 100 more than its number; it may end with token 1."""
    made = Sampler(columns, vocab, comm, torch.device("cpu"))
    for number, params in enumerate(requests):
        made.begin(number, params, 100 + number if params.seed is None else params.seed, (1,), tuple(prompts[number]) if prompts else ())
    return made


def draws(logits: list[float], positions: int, **params: Any) -> list[Sampled]:
    """What one request gets at its first positions, whose logits are all the same."""
    made = sampler(range(len(logits)), len(logits), Solo(), [SamplingParams(1 << 20, **{"seed": 0, **params})])
    return [made.sample([0], torch.tensor([logits])).result()[0] for _ in range(positions)]


def draw(logits: list[float], **params: Any) -> Sampled:
    return draws(logits, 1, **params)[0]


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
    for got in draws(logits, 6, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p):
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
    seen = Counter(got.token for got in draws(logits, rounds, seed=11, **cuts))
    assert set(seen) == set(want)
    chi = sum((seen[token] - rounds * p) ** 2 / (rounds * p) for token, p in want.items())
    assert chi < 2.2 * len(want) + 14


KEY, NOISE = 5509842535781378034, -0.32499833787692395


def test_random_numbers_are_fixed_by_seed_position_and_token() -> None:
    tokens = torch.arange(20_000)
    noise = [gumbel(torch.full_like(tokens, random_key(3, index)), tokens) for index in range(2)]
    again = gumbel(torch.full((5,), random_key(3, 1)), torch.tensor([7, 0, 19_999, 7, 3]))
    assert again.tolist() == [noise[1][token].item() for token in (7, 0, 19_999, 7, 3)]
    both = torch.stack(noise)
    # Gumbel's own mean and variance, and nothing in common between neighbours in position or in token.
    assert both.mean() == pytest.approx(0.5772, abs=0.02) and both.var() == pytest.approx(math.pi**2 / 6, rel=0.04)
    assert abs(torch.corrcoef(both)[0, 1]) < 0.02 and abs(torch.corrcoef(torch.stack([both[0, 1:], both[0, :-1]]))[0, 1]) < 0.02
    assert random_key(0, 1) == KEY and gumbel(torch.tensor([KEY]), torch.tensor([5])).item() == pytest.approx(NOISE, abs=1e-12), (
        "a seed means the same text in every version"
    )


def test_greedy_takes_the_lowest_of_equals_and_refuses_what_is_no_number() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, float("nan"), 1.0, 2.0], [float("inf"), 0.0, 0.0, 0.0]])
    made = sampler(range(4), 4, Solo(), [SamplingParams(8, temperature=0)] * 4)
    assert [got.token for got in made.sample([0, 1, 2, 3], rows).result()] == [1, 0, INVALID, INVALID]
    for broken in ([0.0, math.nan], [math.inf, 0.0]):
        assert draw(broken, temperature=0, logprobs=1) == draw(broken, temperature=1, logprobs=1) == Sampled(INVALID)
    masked = [-math.inf, 0.0, -math.inf]
    assert draw(masked).token == draw(masked, temperature=0).token == 1


def test_limits_of_the_parameters_are_greedy() -> None:
    logits = [0.5, 2.0, 1.9, -3.0]
    for cut in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-30}, {"temperature": 2e-5}):
        assert {got.token for got in draws(logits, 50, **cut)} == {1}


@pytest.mark.parametrize("spread", [0.0, 1e-4])
def test_top_p_of_a_flat_vocabulary(spread: float) -> None:
    """3,000 tokens, more than are looked at before whole rows are sorted: as likely as one another, all are left; falling, 0.9 of them."""
    logits = [-spread * token for token in range(3000)]
    seen = {got.token for got in draws(logits, 400, top_p=0.9)}
    assert len(seen) > 330 and (2900 if spread == 0 else 2500) < max(seen) < (3000 if spread == 0 else 2700)


# transformers' own processors as the oracle


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cuts_leave_what_transformers_leaves(data: st.DataObject) -> None:
    """A flattening temperature and many draws: no token that its warpers take out is drawn, and the likely ones that they leave are."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    vocab = data.draw(st.integers(2, 60))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = torch.randn(1, vocab, generator=generator) * data.draw(st.sampled_from([0.3, 1.0, 4.0]))
    cuts: dict[str, Any] = {"temperature": data.draw(st.sampled_from([0.5, 1.0, 1.7]))}
    chain = [processors.TemperatureLogitsWarper(cuts["temperature"])]
    if data.draw(st.booleans()):
        cuts["top_k"] = data.draw(st.integers(1, vocab))
        chain.append(processors.TopKLogitsWarper(cuts["top_k"]))
    if data.draw(st.booleans()):
        cuts["top_p"] = data.draw(st.floats(0.05, 0.99))
        chain.append(processors.TopPLogitsWarper(cuts["top_p"]))
    if data.draw(st.booleans()):
        cuts["min_p"] = data.draw(st.floats(0.01, 0.9))
        chain.append(processors.MinPLogitsWarper(cuts["min_p"]))
    if "min_p" in cuts and len(chain) > 2:
        cuts["min_p"] = min(cuts["min_p"], 0.5)
        chain[-1] = processors.MinPLogitsWarper(cuts["min_p"])
    want = logits
    for step in chain:
        want = step(torch.zeros(1, 1, dtype=torch.long), want)
    probabilities = want.softmax(-1)[0]
    seen = Counter(got.token for got in draws(logits[0].tolist(), 300, **cuts))
    assert all(probabilities[token] > 0 for token in seen)
    assert all(seen[token] for token, p in enumerate(probabilities.tolist()) if p > 0.06)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_repetition_penalty_and_bias_are_those_of_transformers(data: st.DataObject) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    vocab = data.draw(st.integers(2, 40))
    tokens = st.integers(0, vocab - 1)
    prompt, penalty = data.draw(st.lists(tokens, min_size=1, max_size=20)), data.draw(st.sampled_from([0.5, 1.2, 3.0]))
    bias = data.draw(st.dictionaries(tokens, st.sampled_from([-7.0, -0.5, 2.0, 9.0]), max_size=5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    params = SamplingParams(64, temperature=0, repetition_penalty=penalty, logit_bias=tuple(bias.items()))
    made, text = sampler(range(vocab), vocab, Solo(), [params], [prompt]), list(prompt)
    for _ in range(6):
        logits = torch.randn(1, vocab, generator=generator) * 3
        want = logits
        if bias:
            want = processors.SequenceBiasLogitsProcessor([[[token], amount] for token, amount in bias.items()])(torch.tensor([text]), want)
        want = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text]), want)
        state = made._states[0]
        assert torch.equal(made._shaped([state], logits), want)
        text.append(made.sample([0], logits).result()[0].token)
        assert text[-1] == int(want.argmax())


def test_presence_and_frequency_penalties_are_of_the_answer_alone() -> None:
    """OpenAI's definition: presence once for every token of the answer, frequency for each time it was given."""
    logits = torch.tensor([[3.0, 2.5, 1.0, 0.0]])
    params = SamplingParams(64, temperature=0, presence_penalty=0.25, frequency_penalty=0.5)
    made = sampler(range(4), 4, Solo(), [params], [[1, 1, 1]])
    counts, tokens = [0, 0, 0, 0], []
    for _ in range(8):
        want = logits - torch.tensor([[0.25 * (count > 0) + 0.5 * count for count in counts]])
        assert torch.equal(made._shaped([made._states[0]], logits), want)
        tokens.append(made.sample([0], logits).result()[0].token)
        counts[tokens[-1]] += 1
    assert tokens[:4] == [0, 1, 0, 0] and logits.tolist() == [[3.0, 2.5, 1.0, 0.0]], "the model's logits are left alone"


def test_what_a_sequence_leaves_behind_does_not_penalize_the_next() -> None:
    params = SamplingParams(64, temperature=0, repetition_penalty=50.0, frequency_penalty=2.0)
    logits = torch.tensor([[3.0, 2.5, 2.0]])
    made = sampler(range(3), 3, Solo(), [params], [[0]])
    assert made.sample([0], logits).result()[0].token == 1
    made.forget(0)
    made.begin(9, params, 0, (), ())
    assert made.sample([9], logits).result()[0].token == 0


def test_no_end_before_min_tokens() -> None:
    assert [got.token for got in draws([1.0, 9.0, 0.0], 5, temperature=0, min_tokens=3)] == [0, 0, 0, 1, 1]
    assert 1 not in {got.token for got in draws([1.0, 9.0, 0.0], 50, min_tokens=50)}


def test_a_bias_bans_and_forces() -> None:
    logits = [1.0, 2.0, 3.0, 4.0]
    assert {got.token for got in draws(logits, 60, logit_bias={3: -100.0, 2: -100.0})} == {0, 1}
    assert {got.token for got in draws(logits, 60, logit_bias={0: 100.0})} == {0}
    assert draw(logits, temperature=0, logit_bias=[(0, 3.5)]).token == 0


def test_logprobs_are_of_the_model_not_of_what_was_sampled_from() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    total = math.log(sum(math.exp(value) for value in logits))
    got = draw(logits, temperature=0, logit_bias={0: -50.0}, logprobs=3)
    assert got.token == 1 and got.logprob is not None
    assert got.logprob.logprob == pytest.approx(1.0 - total, abs=1e-6)
    assert [token for token, _ in got.logprob.top] == [0, 1, 2]
    assert [value for _, value in got.logprob.top] == pytest.approx([value - total for value in logits[:3]], abs=1e-6)
    assert draw(logits, temperature=0).logprob is None
    only = draw(logits, temperature=0, logprobs=0).logprob
    assert only is not None and only.top == () and only.logprob == pytest.approx(2.0 - total, abs=1e-6)
    all_four = draw(logits, temperature=0, logprobs=20).logprob
    assert all_four is not None and len(all_four.top) == 4


def test_prompt_logprobs_come_with_the_first_token() -> None:
    generator = torch.Generator().manual_seed(5)
    prompt, logits = [3, 0, 4, 1], torch.randn(4, 5, generator=generator)
    made = sampler(range(5), 5, Solo(), [SamplingParams(8, temperature=0, prompt_logprobs=2)], [prompt])
    for start, stop in ((0, 3), (1, 2), (3, 4)):  # in pieces, one of them again, as after a preemption
        tokens = made.unscored(0, start, stop - start)
        made.score_prompt(0, start, logits[start : start + len(tokens)], tokens)
    first, second = (made.sample([0], logits[-1:]).result()[0] for _ in range(2))
    want = logits.double().log_softmax(-1)
    assert [one.token for one in first.prompt] == prompt[1:] and second.prompt == ()
    assert [one.logprob for one in first.prompt] == pytest.approx([want[at, token].item() for at, token in enumerate(prompt[1:])], abs=1e-6)
    for row, one in zip(want, first.prompt, strict=False):
        assert [token for token, _ in one.top] == row.topk(2).indices.tolist()
    assert made.unscored(0, 0, 4) == (), "what runs again after the first token is not scored again"


# laws

NUMBERS = st.sampled_from([-4.0, -0.25, 0.0, 0.5, 0.75, 3.0, 11.0])  # few values: many are equal
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(64),
    temperature=st.sampled_from([0.0, 0.4, 1.0, 1.9]),
    top_p=st.sampled_from([0.1, 0.6, 0.9, 1.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 8, 100]),
    min_p=st.sampled_from([0.0, 0.0, 0.2]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.75]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.7]),
    logit_bias=st.lists(st.tuples(st.integers(0, 5), NUMBERS), max_size=3, unique_by=lambda pair: pair[0]).map(tuple),
    min_tokens=st.sampled_from([0, 2]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_sample_what_one_would_and_company_changes_nothing(data: st.DataObject) -> None:
    """The same tokens from whole rows, from columns cut anywhere (a rank may have none), and from each request alone."""
    vocab = data.draw(st.integers(6, 40))
    requests = data.draw(st.lists(PARAMS, min_size=1, max_size=5))
    prompts = [data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=6)) for _ in requests]
    size = data.draw(st.integers(2, 4))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, vocab), min_size=size - 1, max_size=size - 1))), vocab]
    steps = [torch.tensor([[data.draw(NUMBERS) for _ in range(vocab)] for _ in requests]) for _ in range(3)]
    everyone = list(range(len(requests)))

    def run(comm: Comm, columns: range, who: list[int]) -> list[list[Sampled]]:
        made = sampler(columns, vocab, comm, requests, prompts)
        local = [rows[who][:, columns.start : columns.stop] if columns else torch.full((len(who), 1), -math.inf) for rows in steps]
        return [made.sample(who, rows).result() for rows in local]

    want = run(Solo(), range(vocab), everyone)
    ranks = run_threads(size, lambda comm: run(comm, range(cuts[comm.rank], cuts[comm.rank + 1]), everyone))
    for got in ranks:
        assert [[one.token for one in step] for step in got] == [[one.token for one in step] for step in want]
        for ours, theirs in zip((one for step in got for one in step), (one for step in want for one in step), strict=True):
            assert (ours.logprob is None) == (theirs.logprob is None)
            if ours.logprob is not None and theirs.logprob is not None:
                assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-5)
                assert [p for _, p in ours.logprob.top] == pytest.approx([p for _, p in theirs.logprob.top], abs=1e-5)
    for number in everyone:
        alone = run(Solo(), range(vocab), [number])
        assert [step[0].token for step in alone] == [step[number].token for step in want]


@pytest.mark.parametrize("top_p", [0.5, 0.999999])
def test_ranks_sample_what_one_would_from_a_large_vocabulary(top_p: float) -> None:
    """5,000 tokens in bfloat16's steps, so that many are equal; the greater top-p needs whole rows."""
    vocab, cuts = 5000, [0, 1700, 1700, 5000]
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(1)).mul(3).bfloat16().float()
    requests = [SamplingParams(8, top_p=top_p, top_k=top_k) for top_k in (0, 0, 50, 2000, 0, 0)]

    def run(comm: Comm, columns: range) -> list[int]:
        local = logits[:, columns.start : columns.stop] if columns else torch.full((6, 1), -math.inf)
        return [one.token for one in sampler(columns, vocab, comm, requests).sample(range(6), local).result()]

    want = run(Solo(), range(vocab))
    assert run_threads(3, lambda comm: run(comm, range(cuts[comm.rank], cuts[comm.rank + 1]))) == [want] * 3
    assert len(set(want)) > 3


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
        {"top_k": -2},
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
        {"stop_ids": 3},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1.0},
        {"logit_bias": {3: 101}},
        {"logit_bias": {"a": 1}},
        {"logit_bias": (3, 4)},
        {"min_tokens": 5},
        {"min_tokens": -1},
        {"prompt_logprobs": 21},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**{"max_tokens": 4, **wrong})
    assert caught.value.where == next(iter(wrong))
