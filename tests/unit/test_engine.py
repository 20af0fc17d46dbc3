"""The engine: the same text on any number of ranks, alone or in company; stops, ends, cancellation, refusals and failure."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_fixtures import awq_checkpoint, batch_of, config_of, random_twin
from engine_fixtures import Client, GroupExecutor, engine_on
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.commands import plan
from quantkit.commands.plan import PlanOptions
from quantkit.commands.plan import run as run_plan
from quantkit.errors import InputError, MachineError, QuantkitError, RuntimeDied
from quantkit.model.decoder import Decoder
from quantkit.model.load import load_decoder
from quantkit.plan import pass_bytes
from quantkit.runtime import worker
from quantkit.runtime.blocks import BLOCK
from quantkit.runtime.engine import Delta, Engine, QueueFull, SamplingParams
from quantkit.runtime.sampler import Sampled, TokenLogprob
from quantkit.runtime.scheduler import Chunk
from quantkit.runtime.start import start_engine
from quantkit.runtime.stops import StopText
from quantkit.runtime.wire import (
    Begin,
    Frames,
    RankFacts,
    Step,
    error_from_json,
    error_to_json,
    frame,
    sampled_from_json,
    sampled_to_json,
    step_from_json,
    step_to_json,
)
from quantkit.text.tokenizer import load_tokenizer

MODELS = Path(__file__).parent.parent / "data" / "models"
PROMPTS = ("The capital", "A", "In the beginning of the year the", "If you want to know what this is,", "One two three four", "def f(x):")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors as small as these are only slowed down by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama() -> Checkpoint:
    return open_checkpoint(MODELS / "llama")


@pytest.fixture
def engine(llama: Checkpoint) -> Iterator[Engine]:
    made = engine_on(GroupExecutor(llama, 1), MODELS / "llama", llama)
    yield made
    made.close()


def settle(engine: Engine) -> None:
    """Wait until the engine has nothing to do."""
    until = time.monotonic() + 20
    while (stats := engine.stats()).running or stats.waiting:
        assert time.monotonic() < until
        time.sleep(0.005)


def held(engine: Engine) -> list[tuple[int, ...]]:
    """The sequences in each rank's cache, once the engine has told the ranks what to forget."""
    executor = engine._executor
    assert isinstance(executor, GroupExecutor)
    for _ in range(400):
        found = [runner.cache.sequences for runner in executor.runners]
        if not any(found):
            break
        time.sleep(0.005)
    return found


def without_cache(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, every one from a pass over the whole text."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            hidden = decoder.forward(torch.tensor(tokens), batch_of([(0, len(tokens))]))
            tokens.append(int(decoder.logits(hidden[-1:]).argmax()))
    return tokens[len(prompt) :]


# the same text


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_greedy_text_is_that_of_the_bare_decoder_on_any_ranks_alone_and_together(name: str) -> None:
    """Three trained models: no cache, one rank, two, three; one request, or six in steps of seven tokens with three seats."""
    path = MODELS / name
    checkpoint, tokenizer = open_checkpoint(path), load_tokenizer(path)
    params = SamplingParams(10, temperature=0, ignore_eos=True)
    prompts = [tokenizer.encode(text, special=True) for text in PROMPTS]
    bare = load_decoder(checkpoint, dtype=torch.float32)
    want = [without_cache(bare, prompt, 10) for prompt in prompts]
    assert len({tuple(tokens) for tokens in want}) > 3, "prompts that all lead to one text show nothing"
    for tp in (1, 2, 3):
        executor = GroupExecutor(checkpoint, tp)
        engine = engine_on(executor, path, checkpoint, max_num_seqs=3, step_tokens=7)
        try:
            alone = Client(engine, prompts[2], params).answer()
            assert alone.tokens == want[2] and alone.reason == "length"
            together = [client.answer() for client in [Client(engine, prompt, params) for prompt in prompts]]
            assert [answer.tokens for answer in together] == want
            assert [answer.text for answer in together] == [tokenizer.decode(tokens) for tokens in want]
            assert max(len(step.chunks) for step in executor.steps) == 3
            assert held(engine) == [()] * tp
            assert engine.stats().kv_tokens_used == 0
        finally:
            engine.close()


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_packed_models_on_ranks(family: str) -> None:
    """Random AWQ words; 3 KV heads for 2 ranks and 4: uneven cuts, copies, a rank without a KV head's memory to itself."""
    checkpoint: Any = awq_checkpoint(config_of(family) | {"head_dim": 16, "intermediate_size": 96, "tie_word_embeddings": True}, 16)
    prompt = [5, 17, 99, 3, 42]
    want = without_cache(load_decoder(checkpoint, dtype=torch.float32, parity=True), prompt, 12)
    for tp in (2, 4):
        engine = engine_on(GroupExecutor(checkpoint, tp), MODELS / "llama", checkpoint, max_model_len=64, kv_blocks=4)
        try:
            assert Client(engine, prompt, SamplingParams(12, temperature=0, ignore_eos=True)).answer().tokens == want
        finally:
            engine.close()


def test_a_seed_gives_its_text_whatever_else_runs(engine: Engine, llama: Checkpoint) -> None:
    prompt = engine.tokenizer.encode("The", special=True)
    params = SamplingParams(24, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True, frequency_penalty=0.2)
    alone = Client(engine, prompt, params).answer()
    assert Client(engine, prompt, params).answer().tokens == alone.tokens
    crowd = [Client(engine, prompt, SamplingParams(5 + 4 * i, temperature=1.3, ignore_eos=True)) for i in range(3)]
    again = Client(engine, prompt, params)
    crowd += [Client(engine, prompt, SamplingParams(9, temperature=0, ignore_eos=True))]
    assert again.answer().tokens == alone.tokens
    texts = {tuple(client.answer().tokens) for client in crowd}
    assert len(texts) == 4, "without a seed each request draws its own"
    other = SamplingParams(24, temperature=0.9, top_p=0.95, seed=8, ignore_eos=True, frequency_penalty=0.2)
    assert Client(engine, prompt, other).answer().tokens != alone.tokens


def test_logprobs_are_those_of_the_model(engine: Engine, llama: Checkpoint) -> None:
    prompt = engine.tokenizer.encode("The city of", special=True)
    got = Client(engine, prompt, SamplingParams(5, temperature=0, logprobs=3, frequency_penalty=1.0, ignore_eos=True)).answer()
    decoder = load_decoder(llama, dtype=torch.float32)
    tokens = torch.tensor(prompt + got.tokens)
    with torch.inference_mode():
        want = decoder.logits(decoder.forward(tokens, batch_of([(0, len(tokens))]))).log_softmax(-1)[len(prompt) - 1 : -1]
    assert [entry.token for entry in got.logprobs] == got.tokens
    for row, entry in zip(want, got.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        best = row.topk(3)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_prompt_logprobs_are_those_of_the_model(llama: Checkpoint, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps of 5 tokens scored three at a time, twice, though the second could use the blocks of the first."""
    monkeypatch.setattr(worker, "SCORE_ROWS", 3)
    engine = engine_on(GroupExecutor(llama, tp), MODELS / "llama", llama, step_tokens=5, max_num_seqs=2)
    prompt = [*engine.tokenizer.encode("The city of the king was large and old", special=True), *range(40, 60)]
    decoder = load_decoder(llama, dtype=torch.float32)
    with torch.inference_mode():
        want = decoder.logits(decoder.forward(torch.tensor(prompt), batch_of([(0, len(prompt))]))).log_softmax(-1)
    try:
        for _ in range(2):
            said: queue.SimpleQueue[Any] = queue.SimpleQueue()
            engine.submit(prompt, SamplingParams(2, temperature=0, ignore_eos=True, prompt_logprobs=2), said.put)
            first, second = said.get(timeout=60), said.get(timeout=60)
            assert [one.token for one in first.prompt_logprobs] == prompt[1:] and second.prompt_logprobs == ()
            for row, one in zip(want, first.prompt_logprobs, strict=False):
                assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
                assert [value for _, value in one.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
            assert first.logprobs == ()
    finally:
        engine.close()


def test_sampled_text_is_the_same_on_any_ranks(llama: Checkpoint) -> None:
    """Everything that shapes a distribution, drawn from columns of 1, 2 and 3 ranks."""
    asks = [
        SamplingParams(24, seed=1, ignore_eos=True),
        SamplingParams(24, seed=2, top_k=20, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(24, seed=3, top_p=0.8, frequency_penalty=0.5, ignore_eos=True),
        SamplingParams(24, seed=4, min_p=0.1, logit_bias=((5, 3.0), (900, 4.0)), ignore_eos=True),
        SamplingParams(24, temperature=0, repetition_penalty=1.2, min_tokens=20),
    ]
    texts = []
    for tp in (1, 2, 3):
        engine = engine_on(GroupExecutor(llama, tp), MODELS / "llama", llama)
        prompt = engine.tokenizer.encode("In the beginning", special=True)
        try:
            texts.append([client.answer().tokens for client in [Client(engine, prompt, params) for params in asks]])
        finally:
            engine.close()
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(tokens) for tokens in texts[0]}) == len(asks)


@pytest.mark.parametrize("family", ["rope-longrope", "rope-dynamic"])
def test_frequencies_look_at_a_prompt_s_length_and_at_nothing_else(family: str) -> None:
    """A prompt beyond the trained length: whole, in pieces, in company, behind a short one that begins alike, preempted: one text."""
    _, checkpoint = random_twin(config_of(family), torch.float64)
    prompt = [(7 * i + i * i) % 120 + 3 for i in range(40)]
    decoder = load_decoder(checkpoint, dtype=torch.float64)
    first = int(decoder.logits(decoder.forward(torch.tensor(prompt), batch_of([(0, 40)])))[-1].argmax())
    params, texts = SamplingParams(9, temperature=0, ignore_eos=True), []
    for step_tokens, blocks in ((64, 16), (12, 16), (7, 16), (24, 4)):
        executor = GroupExecutor(checkpoint, 1, torch.float64)
        engine = engine_on(
            executor, MODELS / "llama", checkpoint, max_model_len=64, step_tokens=step_tokens, kv_blocks=blocks, max_num_seqs=2
        )
        try:
            short = Client(engine, prompt[:16], params)
            clients = [Client(engine, prompt, params) for _ in range(2)]
            short.answer()
            texts += [client.answer().tokens for client in clients]
            texts.append(Client(engine, prompt, params).answer().tokens)
        finally:
            engine.close()
    assert texts[0][0] == first and texts == [texts[0]] * len(texts)


# the same text, whatever becomes of the blocks


class KeptExecutor(GroupExecutor):
    """One for many engines, one after the other."""

    def close(self) -> None:
        while self._under_way:  # launched ahead for a request that was done
            self.collect()


@pytest.fixture(scope="module")
def executors(llama: Checkpoint) -> Iterator[dict[int, KeptExecutor]]:
    made = {tp: KeptExecutor(llama, tp) for tp in (1, 2)}
    yield made
    for executor in made.values():
        GroupExecutor.close(executor)


TEXT = (5, 17, 99, 3, 42, 7, 7, 8, 250, 31, 64, 12, 90, 11, 55, 4, 200, 201, 18, 6, 77, 78, 79, 14, 15, 16, 21, 22, 23, 24, 25, 26, 27, 28)


@dataclass(frozen=True)
class Ask:
    """A prompt: ``common`` tokens that others may begin with too, then its own; and how it goes on."""

    common: int
    own: tuple[int, ...]
    params: SamplingParams

    @property
    def prompt(self) -> list[int]:
        return [*TEXT[: self.common], *self.own]


ASKS = st.builds(
    Ask,
    st.integers(0, len(TEXT)),
    st.lists(st.integers(0, 255), min_size=1, max_size=6).map(tuple),
    st.one_of(
        st.builds(lambda count: SamplingParams(count, temperature=0, ignore_eos=True), st.integers(1, 30)),
        st.builds(
            lambda count, seed: SamplingParams(count, temperature=0.8, seed=seed, frequency_penalty=0.3, ignore_eos=True),
            st.integers(1, 30),
            st.integers(0, 9),
        ),
        st.builds(lambda seed: SamplingParams(40, seed=seed, stop_ids=tuple(range(0, 250, 5)), ignore_eos=True), st.integers(0, 9)),
    ),
)
UNDISTURBED: dict[Ask, list[int]] = {}


def undisturbed(executor: GroupExecutor, llama: Checkpoint, ask: Ask) -> list[int]:
    """The answer on one rank, alone, without earlier blocks, with memory for all."""
    if ask not in UNDISTURBED:
        engine = engine_on(executor, MODELS / "llama", llama, prefix_caching=False)
        UNDISTURBED[ask] = Client(engine, ask.prompt, ask.params).answer().tokens
        engine.close()
    return UNDISTURBED[ask]


@settings(max_examples=15, deadline=None)
@given(
    asks=st.lists(ASKS, min_size=2, max_size=6),
    tp=st.sampled_from([1, 2]),
    seats=st.integers(1, 4),
    spare=st.integers(0, 20),
    extra=st.integers(0, 4),
    prefix_caching=st.booleans(),
    ahead=st.booleans(),
)
def test_no_text_depends_on_seats_budget_blocks_ranks_or_company(
    executors: dict[int, KeptExecutor],
    llama: Checkpoint,
    asks: list[Ask],
    tp: int,
    seats: int,
    spare: int,
    extra: int,
    prefix_caching: bool,
    ahead: bool,
) -> None:
    """Requests beside each other in memory that is hardly enough for the longest of them: preempted, resumed, with shared beginnings;
    each pass launched before the tokens of the last are known, or after."""
    executors[tp].ahead = executors[1].ahead = False
    want = [undisturbed(executors[1], llama, ask) for ask in asks]
    blocks = max(-(-(len(ask.prompt) + ask.params.max_tokens) // BLOCK) for ask in asks) + extra
    limits = {"max_num_seqs": seats, "step_tokens": seats + spare, "kv_blocks": blocks, "prefix_caching": prefix_caching}
    executors[tp].ahead = ahead
    engine = engine_on(executors[tp], MODELS / "llama", llama, max_model_len=blocks * BLOCK, **limits)
    try:
        clients = [Client(engine, ask.prompt, ask.params) for ask in asks]
        assert [client.answer().tokens for client in clients] == want
        assert Client(engine, asks[0].prompt, asks[0].params).answer().tokens == want[0], "hot is cold"
        settle(engine)
        assert engine.stats().kv_tokens_used == 0
    finally:
        engine.close()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_preempted_is_undisturbed_and_hot_is_cold(executors: dict[int, KeptExecutor], llama: Checkpoint, tp: int, ahead: bool) -> None:
    """Four requests that grow where there is room for two and a half; then each again, with what is left of its blocks."""
    asks = [
        Ask(34, (number,), SamplingParams(60, temperature=number % 2 * 0.7, seed=number, presence_penalty=0.2, ignore_eos=True))
        for number in range(4)
    ]
    executors[1].ahead = False
    want = [undisturbed(executors[1], llama, ask) for ask in asks]
    executors[tp].ahead = ahead
    engine = engine_on(executors[tp], MODELS / "llama", llama, max_num_seqs=4, kv_blocks=14)
    try:
        clients = [Client(engine, ask.prompt, ask.params) for ask in asks]
        assert [client.answer().tokens for client in clients] == want
        stats = engine.stats()
        assert stats.preemptions > 0 and stats.generated_tokens == 240 and stats.prompt_tokens == 140
        for ask, tokens in zip(asks, want, strict=True):
            before = engine.stats().prefix_tokens_found
            assert Client(engine, ask.prompt, ask.params).answer().tokens == tokens
            assert engine.stats().prefix_tokens_found == before + 32
        salted: queue.SimpleQueue[Delta | QuantkitError] = queue.SimpleQueue()
        engine.submit(asks[0].prompt, SamplingParams(1), salted.put, cache_salt="mine")
        salted.get(timeout=60)
        assert engine.stats().prefix_tokens_found == before + 32, "another salt finds nothing"
    finally:
        engine.close()


def test_float8_keys_and_values_say_nearly_the_same(llama: Checkpoint) -> None:
    """Logprobs of one text: near those with keys and values as computed, and not the same."""
    prompt = load_tokenizer(MODELS / "llama").encode(PROMPTS[2], special=True)
    found = []
    for fp8 in (False, True):
        executor = GroupExecutor(llama, 1, kv_fp8=fp8)
        engine = engine_on(executor, MODELS / "llama", llama)
        answer = Client(engine, prompt, SamplingParams(2, temperature=0, logprobs=1, ignore_eos=True)).answer()
        engine.close()
        found.append(answer.logprobs[1].logprob)
    assert 0 < abs(found[0] - found[1]) < 0.2


# ends


def test_ends(engine: Engine) -> None:
    """A stop id, the end token, max_tokens and the longest text each end a request, with the right reason."""
    prompt = engine.tokenizer.encode("The capital", special=True)
    free = Client(engine, prompt, SamplingParams(12, temperature=0, ignore_eos=True)).answer()
    assert (free.reason, len(free.tokens), free.deltas) == ("length", 12, 12)
    third = free.tokens[2]
    at = free.tokens.index(third)
    stopped = Client(engine, prompt, SamplingParams(12, temperature=0, stop_ids=(third,))).answer()
    assert (stopped.reason, stopped.tokens) == ("stop", free.tokens[: at + 1])
    assert stopped.text == engine.tokenizer.decode(free.tokens[:at])
    long = Client(engine, prompt, SamplingParams(10_000, temperature=0, ignore_eos=True)).answer()
    assert long.reason == "length" and len(prompt) + len(long.tokens) == engine.max_model_len


def test_the_end_token_of_the_model_ends_a_text(llama: Checkpoint) -> None:
    prompt = load_tokenizer(MODELS / "llama").encode("The capital", special=True)
    tokens = without_cache(load_decoder(llama, dtype=torch.float32), prompt, 4)
    config = {**llama.config, "eos_token_id": tokens[3]}
    ending = Checkpoint(llama.root, llama.kind, config, llama.tensors)
    engine = engine_on(GroupExecutor(ending, 1), MODELS / "llama", ending)
    try:
        until = tokens.index(tokens[3])
        answer = Client(engine, prompt, SamplingParams(9, temperature=0)).answer()
        assert (answer.reason, answer.tokens) == ("stop", tokens[: until + 1])
        assert answer.text == engine.tokenizer.decode(tokens[:until])
        assert len(Client(engine, prompt, SamplingParams(9, temperature=0, ignore_eos=True)).answer().tokens) == 9
    finally:
        engine.close()


def test_a_stop_string_across_tokens_never_shows(engine: Engine) -> None:
    prompt = engine.tokenizer.encode("The capital", special=True)
    free = Client(engine, prompt, SamplingParams(20, temperature=0, ignore_eos=True)).answer()
    pieces = [engine.tokenizer.decode([token]) for token in free.tokens]
    border = len("".join(pieces[:6]))
    stop = free.text[border - 2 : border + 2]
    got = Client(engine, prompt, SamplingParams(20, temperature=0, ignore_eos=True, stop=("never there", stop))).answer()
    assert got.reason == "stop" and got.text == free.text[: free.text.index(stop)] and got.tokens == free.tokens[: len(got.tokens)]
    assert len(got.tokens) < 20
    almost = Client(engine, prompt, SamplingParams(20, temperature=0, ignore_eos=True, stop=(free.text[-3:] + "$$",))).answer()
    assert (almost.reason, almost.text) == ("length", free.text), "what was held back comes out at the end"


@settings(max_examples=300, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), max_size=30),
    st.integers(0, 4),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], cuts: list[int], deaf: int) -> None:
    """The first that ends behind the ``deaf`` first pieces, wherever it began."""
    pieces = [*cuts, len(text)]
    want, ended = text, False
    for end in range(sum(pieces[:deaf]) + 1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            want, ended = text[: min(starts)], True
            break
    watch, got, stopped, at = StopText(stops), "", False, 0
    for number, size in enumerate(pieces):
        piece, stopped = watch.push(text[at : at + size], heed=number >= deaf)
        got, at = got + piece, at + size
        assert want.startswith(got)
        if stopped:
            break
    assert (got + watch.finish(), stopped) == (want, ended)


def test_nothing_ends_a_text_before_min_tokens(engine: Engine) -> None:
    """Neither a stop id, which is not sampled then, nor a stop string, which is text then."""
    prompt = engine.tokenizer.encode("The capital", special=True)
    free = Client(engine, prompt, SamplingParams(12, temperature=0, ignore_eos=True)).answer()
    ids = Client(engine, prompt, SamplingParams(12, temperature=0, ignore_eos=True, stop_ids=(free.tokens[2],), min_tokens=6)).answer()
    assert free.tokens[2] not in ids.tokens[:6] and len(ids.tokens) >= 6 and ids.tokens[:2] == free.tokens[:2]
    stop = engine.tokenizer.decode(free.tokens[:3])[-2:]
    early = Client(engine, prompt, SamplingParams(12, temperature=0, ignore_eos=True, stop=(stop,))).answer()
    late = Client(engine, prompt, SamplingParams(12, temperature=0, ignore_eos=True, stop=(stop,), min_tokens=4)).answer()
    assert early.reason == "stop" and len(early.tokens) <= 3
    assert late.tokens == free.tokens[: len(late.tokens)] and len(late.tokens) > 4 and late.text.startswith(early.text + stop)


# cancellation and refusal


@pytest.mark.parametrize("ahead", [False, True])
def test_a_cancelled_request_says_and_computes_nothing_more(llama: Checkpoint, ahead: bool) -> None:
    executor = GroupExecutor(llama, 2, ahead=ahead)
    engine = engine_on(executor, MODELS / "llama", llama, max_num_seqs=1)
    said: list[Delta | QuantkitError] = []
    third, cancelled = threading.Event(), threading.Event()

    def on_delta(delta: Delta | QuantkitError) -> None:
        assert not cancelled.is_set()
        said.append(delta)
        if len(said) == 3:
            third.set()

    try:
        running = engine.submit([5, 6, 7], SamplingParams(250, temperature=0, ignore_eos=True), on_delta)
        waiting = engine.submit([8], SamplingParams(200, temperature=0), on_delta)
        assert third.wait(30)
        engine.cancel(waiting)
        engine.cancel(running)
        cancelled.set()
        engine.cancel(running)
        assert engine.stats().running == engine.stats().waiting == engine.stats().kv_tokens_used == 0
        assert held(engine) == [(), ()]
        steps = len(executor.steps)
        assert waiting not in {chunk.sequence for step in executor.steps for chunk in step.chunks}
        after = Client(engine, [5, 6, 7], SamplingParams(2, temperature=0, ignore_eos=True)).answer()
        assert len(after.tokens) == 2 and len(executor.steps) <= steps + 3
    finally:
        engine.close()


def test_a_callback_may_cancel_and_submit(engine: Engine) -> None:
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    numbers: list[int] = []

    def second(delta: Delta | QuantkitError) -> None:
        assert isinstance(delta, Delta)
        done.put(delta.finish_reason or "")

    def first(delta: Delta | QuantkitError) -> None:
        engine.cancel(numbers[0])
        engine.submit([3], SamplingParams(1, temperature=0, ignore_eos=True), second)

    numbers.append(engine.submit([3, 4], SamplingParams(50, ignore_eos=True), first))
    assert done.get(timeout=30) == "length"
    settle(engine)
    assert done.empty()


def test_refusals_of_requests(llama: Checkpoint) -> None:
    engine = engine_on(GroupExecutor(llama, 1), MODELS / "llama", llama, max_model_len=16, max_num_seqs=1, max_queue=2, kv_blocks=1)
    vocab = engine.spec.dims["vocab"].elements
    said: list[Delta | QuantkitError] = []
    try:
        for prompt in ([], [vocab], [-1], [0] * 16):
            with pytest.raises(InputError, match="prompt"):
                engine.submit(prompt, SamplingParams(4), said.append)
        with pytest.raises(InputError, match="stop_ids"):
            engine.submit([0], SamplingParams(4, stop_ids=(vocab,)), said.append)
        assert not said
        assert Client(engine, [0] * 15, SamplingParams(4, ignore_eos=True)).answer().tokens
        gate = threading.Event()

        def stuck(_: Delta | QuantkitError) -> None:
            gate.wait(30)

        clients = [engine.submit([1], SamplingParams(8, ignore_eos=True), stuck) for _ in range(3)]
        with pytest.raises(QueueFull) as caught:
            engine.submit([1], SamplingParams(8), said.append)
        assert caught.value.exit_code == 3
        gate.set()
        settle(engine)
        assert clients == sorted(clients)
        assert Client(engine, [1], SamplingParams(2, ignore_eos=True)).answer().reason == "length"
    finally:
        engine.close()
    engine.close()
    with pytest.raises(RuntimeDied, match="closed"):
        engine.submit([1], SamplingParams(8), said.append)


class Broken(GroupExecutor):
    """Loses a rank in its third step."""

    def collect(self) -> list[Sampled]:
        if len(self.steps) == 2:
            raise RuntimeDied("rank 1", "was killed by SIGKILL", "every rank alive")
        return super().collect()


def test_a_lost_rank_ends_every_request_with_the_reason(llama: Checkpoint) -> None:
    engine = engine_on(Broken(llama, 1), MODELS / "llama", llama, max_num_seqs=1)
    clients = [Client(engine, [5, 6], SamplingParams(50, ignore_eos=True)) for _ in range(3)]
    for client in clients:
        with pytest.raises(RuntimeDied, match="rank 1: was killed"):
            client.answer()
    assert isinstance(engine.failure, RuntimeDied) and engine.stats().running == 0
    assert engine.failure.__cause__ is None, "its frames would hold the model"
    with pytest.raises(RuntimeDied, match="rank 1"):
        engine.submit([5], SamplingParams(1), lambda _: None)
    engine.close()


def test_close_ends_what_runs_with_an_error(llama: Checkpoint) -> None:
    engine = engine_on(GroupExecutor(llama, 1), MODELS / "llama", llama)
    client = Client(engine, [5, 6], SamplingParams(250, ignore_eos=True))
    engine.close()
    with pytest.raises(RuntimeDied, match="closed"):
        client.answer()
    assert engine.failure is None and not engine._thread.is_alive()


def test_logits_that_are_no_numbers_end_the_request() -> None:
    checkpoint = awq_checkpoint(config_of("qwen2-full") | {"head_dim": 16, "intermediate_size": 96}, 16)
    checkpoint.values["model.norm.weight"].fill_(float("nan"))
    engine = engine_on(GroupExecutor(checkpoint, 1), MODELS / "llama", checkpoint, max_model_len=32, kv_blocks=2)
    try:
        for temperature in (0.0, 1.0):
            with pytest.raises(RuntimeDied, match="not numbers"):
                Client(engine, [5, 6], SamplingParams(5, temperature=temperature)).answer()
        assert engine.failure is None and held(engine) == [()]
    finally:
        engine.close()


# starting


def test_start_on_one_rank_of_this_process() -> None:
    engine = start_engine(str(MODELS / "qwen2"), device="cpu", max_model_len=64)
    try:
        assert (engine.tp, engine.dtype, engine.max_model_len) == (1, "bfloat16", 64)
        assert engine.stats().weight_bytes[0] > 100_000 and engine.stats().kv_bytes_per_token[0] > 0
        prompt = engine.tokenizer.encode("The", special=True)
        assert Client(engine, prompt, SamplingParams(3, temperature=0, ignore_eos=True)).answer().reason == "length"
        assert engine.stats().generated_tokens == 3 and engine.stats().prompt_tokens == len(prompt)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"device": "tpu"}, InputError, "--device"),
        ({"dtype": "int8"}, InputError, "--dtype"),
        ({"max_model_len": 1}, InputError, "--max-model-len"),
        ({"max_model_len": 1 << 20}, InputError, "which the model was made for"),
        ({"tp": 0}, InputError, "--tp"),
        ({"max_num_seqs": 0}, InputError, "max_num_seqs 0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, InputError, "--max-num-batched-tokens"),
        ({"memory_share": 0.0}, InputError, "--gpu-memory-utilization"),
        ({"memory_share": 1.1}, InputError, "--gpu-memory-utilization"),
        ({"kv_cache_dtype": "int4"}, InputError, "--kv-cache-dtype"),
        ({"device": "cuda", "tp": 64}, MachineError, "0 of 64 GPUs"),
    ],
)
def test_refusals_at_the_start(options: dict[str, Any], kind: type[QuantkitError], words: str) -> None:
    with pytest.raises(kind, match=words):
        start_engine(str(MODELS / "llama"), **options)


def test_memory_bounds_the_longest_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for 6 blocks and one that is nobody's: the default is shortened, what was asked for is refused, and so is none at all."""
    per_token = 4 * 2 * 4 * 32 * 4  # layers, keys and values, KV heads, head_dim, float32
    engine = start_engine(str(MODELS / "llama"), device="cpu", parity=True, max_num_batched_tokens=64)
    (weights,) = engine.stats().weight_bytes
    one = pass_bytes(engine.spec, 1, tokens=64, sequences=8, itemsize=4)
    engine.close()
    monkeypatch.setattr(worker, "free_memory", lambda: int((7 * BLOCK * per_token + weights + one) / 0.5) - weights + 16)
    options: dict[str, Any] = {"device": "cpu", "parity": True, "max_num_batched_tokens": 64, "memory_share": 0.5}
    engine = start_engine(str(MODELS / "llama"), **options)
    stats = engine.stats()
    engine.close()
    assert stats.kv_bytes_per_token == (per_token,)
    assert (engine.max_model_len, stats.kv_tokens_total, engine.dtype) == (96, 96, "float32")
    halved = start_engine(str(MODELS / "llama"), **options, kv_cache_dtype="fp8")
    halved.close()
    assert (halved.max_model_len, halved.stats().kv_bytes_per_token) == ((4 * 7 - 1) * BLOCK, (per_token // 4,))
    with pytest.raises(MachineError, match="at most 96"):
        start_engine(str(MODELS / "llama"), **options, max_model_len=97)
    monkeypatch.setattr(worker, "free_memory", lambda: 0)
    with pytest.raises(MachineError, match="keys and values"):
        start_engine(str(MODELS / "llama"), device="cpu")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_plan_predicts_the_blocks(name: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget in which nothing else is bounded: within 3 % of what the ranks find."""
    budget = 96 << 20
    monkeypatch.setattr(plan, "RUNTIME_BYTES", 0)  # on a GPU alone
    monkeypatch.setattr(plan, "GROUP_BYTES", 0)
    checkpoint = open_checkpoint(MODELS / name)
    report = run_plan(PlanOptions(str(MODELS / name), tp, gpu_memory=str(budget), max_num_seqs=8, max_num_batched_tokens=1024))
    dtype = getattr(torch, {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[report.data["dtype"]])
    heaviest = max(rank["weights"] for rank in report.data["ranks"])
    monkeypatch.setattr(worker, "free_memory", lambda: tp * (budget - heaviest))
    executor = GroupExecutor(checkpoint, tp, dtype)
    executor.close()
    found = min(facts.kv_blocks for facts in executor.facts if facts.kv_blocks is not None)
    assert found > 100 and abs(report.data["kv_blocks_that_fit"] / found - 1) < 0.03


# messages


def test_messages_survive_the_wire() -> None:
    params = SamplingParams(7, 0.3, seed=1 << 63, stop=("a", "é\n"), stop_ids=(4,), logprobs=2)
    chunks = (Chunk(5, 0, (1, 2, 3), True, (9, 8)), Chunk(2, 9, (7,), False))
    full = SamplingParams(9, logit_bias=((7, -1.5), (8, 2)), min_tokens=3, repetition_penalty=1.5, prompt_logprobs=0)
    step = Step((3, 4), (6,), (Begin(5, params, -(1 << 62)), Begin(6, full, 1, (2, 3), (9, 9))), chunks)
    answers = [Sampled(5), Sampled(7, TokenLogprob(7, -1.25, ((7, -1.25), (9, float("-inf"))))), Sampled(0, TokenLogprob(0, -0.5, ()))]
    answers += [Sampled(4, None, (TokenLogprob(1, -2.0, ((1, -2.0),)), TokenLogprob(3, -1.0, ())))]
    error = MachineError("disk", "is full", None, "free some")
    data = frame({"step": step_to_json(step)}) + frame({"sampled": sampled_to_json(answers)}) + frame({"error": error_to_json(error)})
    for size in (1, 3, 1000):
        frames = Frames("rank 0")
        first, second, third = [message for at in range(0, len(data), size) for message in frames.feed(data[at : at + size])]
        assert step_from_json(first["step"]) == step
        assert sampled_from_json(second["sampled"]) == answers
        back = error_from_json(third["error"])
        assert (type(back), back.line, back.hint) == (MachineError, error.line, "free some")


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x02\0\0\0{]", b"\x02\0\0\0[]"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(RuntimeDied, match="rank 0"):
        list(Frames("rank 0").feed(data))


def test_a_rank_without_kv_heads_does_not_bound_the_cache(llama: Checkpoint) -> None:
    checkpoint = awq_checkpoint(config_of("qwen2-full") | {"head_dim": 16, "intermediate_size": 96, "num_key_value_heads": 1}, 16)
    executor = GroupExecutor(checkpoint, 8)
    executor.close()
    empty = [facts for facts in executor.facts if facts.kv_blocks is None]
    assert empty and all(facts == RankFacts(facts.weight_bytes, 0, None) for facts in empty)
