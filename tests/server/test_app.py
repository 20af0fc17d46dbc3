"""The application: over a real engine what it answers, over a scripted one what it does when things go wrong."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from quantkit import __version__
from quantkit.errors import RuntimeDied
from quantkit.runtime.engine import Delta, Engine
from quantkit.runtime.sampler import SamplingParams
from quantkit.server.app import create_app
from quantkit.server.edge import DRAINED_BODY, MAX_BODY
from quantkit.server.protocol import TOKEN_CHARACTERS
from quantkit.text.tokenizer import Tokenizer

NAME = "tiny/llama"
PROMPT = "The quick brown fox jumps over"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 12}
HELLO: list[Any] = [{"role": "user", "content": "Tell me a story."}]


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url) as client:
        yield client


def direct(engine: Engine, ids: list[int], **params: Any) -> list[Delta]:
    """What the engine itself says to a prompt."""
    said: queue.Queue[Any] = queue.Queue()
    engine.submit(ids, SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **params}), said.put)
    deltas = [said.get(timeout=30)]
    while deltas[-1].finish_reason is None:
        deltas.append(said.get(timeout=30))
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


# Over the real engine.


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == NAME and model.owned_by == "quantkit" and model.created > 0
    assert client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_what_the_engine_says(client: openai.OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT, special=True)
    deltas = direct(engine, ids)
    answer = client.completions.create(prompt=PROMPT, **GREEDY)
    [choice] = answer.choices
    assert choice.text == text_of(deltas) and choice.text
    assert choice.finish_reason == deltas[-1].finish_reason and choice.logprobs is None
    assert answer.object == "text_completion" and answer.model == NAME and answer.id.startswith("cmpl-")
    assert answer.usage is not None
    made = sum(len(delta.tokens) for delta in deltas)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), made)
    assert answer.usage.total_tokens == len(ids) + made


def test_sixteen_tokens_when_none_are_named(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_the_stream_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, **GREEDY)
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert len(chunks) > 4 and len({chunk.id for chunk in chunks}) == 1
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_prompts_of_every_form(client: openai.OpenAI, engine: Engine) -> None:
    other = "Once upon a time"
    alone = [client.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in (PROMPT, other)]
    ids = [engine.tokenizer.encode(prompt, special=True) for prompt in (PROMPT, other)]
    assert client.completions.create(prompt=ids[0], **GREEDY).choices[0].text == alone[0]
    for prompts in ([PROMPT, other], ids):
        answer = client.completions.create(prompt=prompts, **GREEDY)
        assert [(choice.index, choice.text) for choice in answer.choices] == [(0, alone[0]), (1, alone[1])]
        assert answer.usage is not None and answer.usage.prompt_tokens == len(ids[0]) + len(ids[1])


def test_echo_begins_with_the_prompt(client: openai.OpenAI, engine: Engine) -> None:
    plain = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    assert client.completions.create(prompt=PROMPT, echo=True, **GREEDY).choices[0].text == PROMPT + plain
    ids = engine.tokenizer.encode(PROMPT, special=True)
    assert client.completions.create(prompt=ids, echo=True, **GREEDY).choices[0].text == engine.tokenizer.decode(ids, special=True) + plain
    chunks = client.completions.create(prompt=PROMPT, echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + plain


def test_logprobs_of_completions(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(prompt=PROMPT, logprobs=3, **GREEDY)
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.tokens and scores.token_logprobs and scores.top_logprobs and scores.text_offset
    assert answer.usage is not None
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == answer.usage.completion_tokens
    text = answer.choices[0].text
    for token, logprob, top, offset in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, scores.text_offset, strict=True):
        assert len(top) == 3 and logprob <= 0
        assert top[token] == max(top.values()) == logprob  # greedy: the chosen one is the likeliest
        assert (
            text[offset:].startswith(token)
            or token.startswith("token_id:")
            or not engine.tokenizer.decode(engine.tokenizer.encode(token, special=False))
        )
    said = direct(engine, engine.tokenizer.encode(PROMPT, special=True), logprobs=3)
    assert scores.token_logprobs == pytest.approx([one.logprob for delta in said for one in delta.logprobs])
    chunks = list(client.completions.create(prompt=PROMPT, logprobs=3, stream=True, **GREEDY))
    pieces = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs is not None]
    assert [token for piece in pieces for token in piece.tokens or []] == scores.tokens
    assert [offset for piece in pieces for offset in piece.text_offset or []] == scores.text_offset


def test_an_echo_is_scored_from_its_second_token(client: openai.OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT, special=True)
    plain = client.completions.create(prompt=PROMPT, logprobs=2, **GREEDY).choices[0]
    for prompt, shown in ((PROMPT, PROMPT), (ids, engine.tokenizer.decode(ids, special=True))):
        choice = client.completions.create(prompt=prompt, echo=True, logprobs=2, **GREEDY).choices[0]
        scores, tail = choice.logprobs, plain.logprobs
        assert choice.text == shown + plain.text and scores is not None and tail is not None
        assert scores.tokens and scores.token_logprobs and scores.top_logprobs and scores.text_offset and tail.tokens
        count = len(ids)
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(scores.text_offset)
        assert scores.tokens[count:] == tail.tokens and scores.token_logprobs[count:] == pytest.approx(tail.token_logprobs)
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None and scores.text_offset[0] == 0
        assert scores.text_offset[count] == len(shown) and sorted(scores.text_offset) == scores.text_offset
        for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
            assert token.startswith("token_id:") or choice.text[offset:].startswith((token, token.lstrip())) or not token.strip("<s>")
        [said] = [delta for delta in direct(engine, ids, prompt_logprobs=2) if delta.prompt_logprobs]
        assert scores.token_logprobs[1:count] == pytest.approx([one.logprob for one in said.prompt_logprobs])
        for token, top, logprob in list(zip(scores.tokens, scores.top_logprobs, scores.token_logprobs, strict=True))[1:]:
            assert 2 <= len(top) <= 3 and logprob in (top.get(token), *(top[name] for name in top if name.startswith("token_id:")))
        chunks = list(client.completions.create(prompt=prompt, echo=True, logprobs=2, stream=True, **GREEDY))
        assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
        pieces = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs is not None]
        assert [token for piece in pieces for token in piece.tokens or []] == scores.tokens
        assert [offset for piece in pieces for offset in piece.text_offset or []] == scores.text_offset


def test_prompt_logprobs_as_vllm_tells_them(client: openai.OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT, special=True)
    [said] = [delta for delta in direct(engine, ids, prompt_logprobs=1) if delta.prompt_logprobs]
    more = {"prompt_logprobs": 1}
    [choice] = client.completions.create(prompt=PROMPT, extra_body=more, **GREEDY).choices
    first, *told = choice.model_extra["prompt_logprobs"]
    assert first is None and choice.logprobs is None and len(told) == len(ids) - 1
    for token, entries, one in zip(ids[1:], told, said.prompt_logprobs, strict=True):
        assert entries[str(token)]["logprob"] == pytest.approx(one.logprob)
        best = one.top[0][0]
        assert set(entries) == {str(token), str(best)} and entries[str(best)]["rank"] == 1
    answer = client.chat.completions.create(messages=HELLO, extra_body=more, n=2, **GREEDY)
    assert answer.usage is not None and len(answer.model_extra["prompt_logprobs"]) == answer.usage.prompt_tokens


def test_a_prompt_is_scored_without_an_answer(client: openai.OpenAI, engine: Engine) -> None:
    """``max_tokens`` 0 with ``echo``, as lm-eval asks: what the same prompt's echo has with an answer, and no more."""
    more: dict[str, Any] = {"model": NAME, "temperature": 0, "echo": True, "logprobs": 2}
    for prompts in ([PROMPT], [PROMPT, "Once upon a time"]):
        answer = client.completions.create(prompt=prompts, max_tokens=0, **more)
        longer = client.completions.create(prompt=prompts, max_tokens=3, **more)
        assert answer.usage is not None and longer.usage is not None and answer.usage.completion_tokens == 0
        assert answer.usage.total_tokens == answer.usage.prompt_tokens == longer.usage.prompt_tokens
        for prompt, choice, other in zip(prompts, answer.choices, longer.choices, strict=True):
            count = len(engine.tokenizer.encode(prompt, special=True))
            assert (choice.text, choice.finish_reason) == (prompt, "length") and choice.logprobs is not None and other.logprobs is not None
            for field in ("tokens", "text_offset"):
                assert getattr(choice.logprobs, field) == getattr(other.logprobs, field)[:count]
            scores, theirs = choice.logprobs.token_logprobs, other.logprobs.token_logprobs
            assert scores is not None and theirs is not None and scores[0] is None
            assert scores[1:] == pytest.approx(theirs[1:count], abs=1e-4)
            tops, others = choice.logprobs.top_logprobs, other.logprobs.top_logprobs
            assert tops is not None and others is not None and tops[0] is None
            for top, same in zip(tops[1:], others[1:count], strict=True):
                assert top == pytest.approx(same, abs=1e-4)
    chunks = list(client.completions.create(prompt=PROMPT, max_tokens=0, stream=True, **more))
    assert [chunk.choices[0].text for chunk in chunks] == [PROMPT, ""]
    first = chunks[0].choices[0].logprobs
    assert first is not None and first.tokens == client.completions.create(prompt=PROMPT, max_tokens=0, **more).choices[0].logprobs.tokens  # type: ignore[union-attr]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "length"] and chunks[1].choices[0].logprobs is None
    told = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=0, extra_body={"prompt_logprobs": 1})
    assert told.choices[0].text == "" and told.choices[0].model_extra is not None
    assert len(told.choices[0].model_extra["prompt_logprobs"]) == len(engine.tokenizer.encode(PROMPT, special=True))
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt=PROMPT, max_tokens=0)
    assert caught.value.param == "max_tokens"


def test_a_salt_hides_what_was_computed(client: openai.OpenAI, engine: Engine, wait_for: Callable[..., None]) -> None:
    ids = [11, 13] * 20

    def found(salt: str | None, chat: bool = False) -> int:
        body = None if salt is None else {"cache_salt": salt}
        before = engine.stats().prefix_tokens_found
        if chat:
            client.chat.completions.create(messages=HELLO * 4, extra_body=body, **GREEDY)
        else:
            client.completions.create(prompt=ids, extra_body=body, **GREEDY)
        wait_for(lambda: engine.stats().running == 0)
        return engine.stats().prefix_tokens_found - before

    assert [found(salt) > 0 for salt in (None, None, "a", "a", "b", "a", None)] == [False, True, False, True, False, True, True]
    assert [found(salt, chat=True) > 0 for salt in ("c", "c", "d")] == [False, True, False]


def test_what_shapes_the_text_shapes_it(client: openai.OpenAI, engine: Engine) -> None:
    """Bias, penalties, stop tokens and min_tokens, each by what it must do to a text that is known without it."""
    ids = engine.tokenizer.encode(PROMPT, special=True)
    free = [token for delta in direct(engine, ids, ignore_eos=True) for token in delta.tokens]

    def ask(**fields: Any) -> Any:
        return client.completions.create(prompt=ids, extra_body={"ignore_eos": True, **fields}, **GREEDY)

    def tokens(params: dict[str, Any]) -> list[int]:
        return [token for delta in direct(engine, ids, ignore_eos=True, **params) for token in delta.tokens]

    plain = ask().choices[0].text
    assert ask(stop_token_ids=[free[4]]).usage.completion_tokens == free.index(free[4]) + 1
    late = ask(stop_token_ids=[free[4]], min_tokens=9)
    assert late.usage.completion_tokens >= 9 and late.choices[0].text != plain
    forced = ask(logit_bias={str(ids[1]): 100})
    assert forced.choices[0].text.count(engine.tokenizer.decode([ids[1]]).strip()) == 12
    for fields in (
        {"repetition_penalty": 1.6},
        {"logit_bias": {str(free[0]): -100}},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
    ):
        params = {
            name: tuple((int(k), v) for k, v in value.items()) if isinstance(value, dict) else value for name, value in fields.items()
        }
        want = tokens(params)
        assert want != free and ask(**fields).choices[0].text.strip() == engine.tokenizer.decode(want).strip()
    assert ask(top_k=-1).choices[0].text == plain
    with pytest.raises(openai.BadRequestError) as caught:
        ask(logit_bias={"1024": 1})
    assert caught.value.param == "logit_bias" and "0 to 1023" in caught.value.message


def test_the_chosen_token_is_scored_even_when_it_is_not_likely(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=2, seed=4, logprobs=0)
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.tokens and scores.top_logprobs and scores.token_logprobs
    for token, top, logprob in zip(scores.tokens, scores.top_logprobs, scores.token_logprobs, strict=True):
        assert top == {token: logprob}


def test_stop_strings_end_the_text_and_are_not_in_it(client: openai.OpenAI) -> None:
    plain = client.completions.create(prompt=PROMPT, **{**GREEDY, "max_tokens": 40}).choices[0].text
    stop = plain[len(plain) // 2 :][:5]
    answer = client.completions.create(prompt=PROMPT, stop=["never to be seen", stop], **{**GREEDY, "max_tokens": 40})
    assert answer.choices[0].text == plain[: plain.index(stop)] and answer.choices[0].finish_reason == "stop"
    chunks = client.completions.create(prompt=PROMPT, stop=stop, stream=True, **{**GREEDY, "max_tokens": 40})
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_seeds_repeat_and_choices_differ(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> list[str]:
        answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=1.5, **fields)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    one = ask(seed=11)
    assert ask(seed=11) == one
    assert ask(seed=12) != one
    two = ask(seed=11, n=2)
    assert two[0] == one[0] and two[1] != two[0]
    assert two[1:] == ask(seed=12)
    assert ask() != ask()


def test_chat_is_the_template_then_the_engine(client: openai.OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode("<|system|>Be brief.\n<|user|>Tell me a story.\n<|assistant|>", special=False)
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]},
    ]
    answer = client.chat.completions.create(messages=messages, **GREEDY)
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == text_of(direct(engine, ids))
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)


def test_chat_streams_role_text_and_reason(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=HELLO, **GREEDY)
    chunks = list(client.chat.completions.create(messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant" and deltas[0].content == ""
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_chat_goes_on_to_the_end_of_the_context(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "word " * 480}], temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.total_tokens == engine.max_model_len
    assert answer.choices[0].finish_reason == "length"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=2, **GREEDY)
    assert answer.choices[0].logprobs is not None and answer.usage is not None
    scored = answer.choices[0].logprobs.content
    assert scored is not None and len(scored) == answer.usage.completion_tokens
    for one in scored:
        assert len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token and one.top_logprobs[0].logprob == one.logprob
        assert one.bytes is None or bytes(one.bytes).decode() == one.token
    plain = client.chat.completions.create(messages=HELLO, logprobs=True, **GREEDY).choices[0].logprobs
    assert plain is not None and plain.content is not None and [one.top_logprobs for one in plain.content] == [[]] * len(scored)
    chunks = list(client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=2, stream=True, **GREEDY))
    pieces = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs is not None]
    assert [one.token for piece in pieces for one in piece.content or []] == [one.token for one in scored]


def test_several_choices_stream_side_by_side(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 16, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**fields)
    texts = ["", ""]
    for chunk in client.chat.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert whole.usage is not None and whole.usage.completion_tokens > 16


def test_too_long_a_prompt_is_refused_with_the_numbers(client: openai.OpenAI, engine: Engine) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt=[5] * engine.max_model_len, **GREEDY)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    assert "1024 tokens" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "word " * 3000}], **GREEDY)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"


def test_a_prompt_that_no_tokens_could_make_fit_is_refused_uncounted(scene: tuple[Any, str]) -> None:
    """Megabytes are not tokenized to say so, and what follows the first prompt that is too long is not looked at."""
    engine, url = scene
    counted: list[int] = []

    class Counting:
        """The engine's tokenizer, which tells the lengths of what it encodes."""

        def __init__(self, real: Tokenizer) -> None:
            self._real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def encode(self, text: str, *, special: bool) -> list[int]:
            counted.append(len(text))
            return self._real.encode(text, special=special)

    engine.tokenizer = Counting(engine.tokenizer)
    most = TOKEN_CHARACTERS * engine.max_model_len
    with client_of(url) as client:
        for prompt in ("a b " * most, ["a", "b" * (most + 1)], ["a b " * engine.max_model_len, "b"]):
            with pytest.raises(openai.BadRequestError) as caught:
                client.completions.create(prompt=prompt, **GREEDY)
            assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(messages=[{"role": "user", "content": "a" * most}], **GREEDY)
        assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    assert counted == [1, 4 * engine.max_model_len] and engine.submitted == []


def test_an_error_repeats_no_more_of_a_name_than_one_can_read(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "a", "x" * 100_000: 1})
    assert answer.status_code == 400 and len(answer.content) < 1000 and "xxx" in answer.json()["error"]["param"]


def test_bad_tokens_and_empty_prompts_are_refused(client: openai.OpenAI) -> None:
    for prompt in ([5, 1024], [-1]):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(prompt=prompt, echo=True, **GREEDY)
        assert caught.value.param == "prompt" and "0 to 1023" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="", **GREEDY)
    assert caught.value.param == "prompt"


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert caught.value.code == "model_not_found" and caught.value.param == "model" and NAME in caught.value.message


def test_a_field_that_is_not_served_is_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}], **GREEDY)
    assert caught.value.param == "tools" and caught.value.code == "unsupported_parameter"


def test_a_client_that_leaves_frees_its_tokens(url: str, client: openai.OpenAI, engine: Engine, wait_for: Callable[..., None]) -> None:
    long: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    with client.completions.create(stream=True, **long) as stream:
        next(iter(stream))
        assert engine.stats().running == 1
    wait_for(lambda: engine.stats().running == 0 and engine.stats().kv_tokens_used == 0)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**long)
    before = engine.stats().generated_tokens
    wait_for(lambda: engine.stats().running == 0)
    assert engine.stats().generated_tokens - before < 900
    assert httpx.get(f"{url}/health").json()["running"] == 0


def test_health_and_version(url: str, engine: Engine) -> None:
    health = httpx.get(f"{url}/health")
    assert health.status_code == 200
    assert health.json() == {
        "status": "ok",
        "running": 0,
        "waiting": 0,
        "kv_tokens_used": 0,
        "kv_tokens_total": engine.stats().kv_tokens_total,
    }
    assert httpx.get(f"{url}/version").json() == {"version": __version__}


def test_metrics_are_the_engine_s(url: str, engine: Engine, wait_for: Callable[..., None]) -> None:
    """Counters move as requests do; a prompt that comes again is found."""

    def figures() -> dict[str, int]:
        response = httpx.get(f"{url}/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = response.text.splitlines()
        assert lines.count("# TYPE quantkit_kv_cache_tokens gauge") == 1 and lines.count("# TYPE quantkit_steps_total counter") == 1
        return {line.split()[0].removeprefix("quantkit_"): int(line.split()[1]) for line in lines if not line.startswith("#")}

    ids = [7, 9] * 20
    direct(engine, ids)
    wait_for(lambda: engine.stats().running == 0)
    before = figures()
    direct(engine, ids, max_tokens=3, ignore_eos=True)
    wait_for(lambda: engine.stats().running == 0)
    after = figures()
    moved = {name: after[name] - before[name] for name in after if after[name] != before[name] and name != "kv_cache_tokens_kept"}
    assert moved == {
        "prompt_tokens_total": 40,
        "generated_tokens_total": 3,
        "steps_total": 3,
        "prefix_cache_queries_total": 40,
        "prefix_cache_hits_total": 32,
    }
    assert after["kv_cache_tokens"] == engine.stats().kv_tokens_total and after["kv_cache_tokens_kept"] >= 32


# Over a scripted engine.


def raw(url: str, path: str, fields: dict[str, Any], **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json={"model": NAME, **fields}, timeout=30, **more)


@pytest.fixture
def scene(scripted: Any, listen: Callable[[Any], str]) -> tuple[Any, str]:
    return scripted, listen(create_app(scripted, served_model_name=NAME, api_key=None))


def dead() -> RuntimeDied:
    return RuntimeDied("rank 1", "was killed by SIGKILL", "every rank alive")


def test_a_full_queue_is_429_and_takes_nothing(scene: tuple[Any, str]) -> None:
    engine, url = scene
    engine.room = 2
    answer = raw(url, "completions", {"prompt": "Hi", "n": 3})
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error" and answer.json()["error"]["code"] == "queue_full"
    assert sorted(engine.cancelled) == [1, 2]
    with pytest.raises(openai.RateLimitError):
        client_of(url).completions.create(prompt="Hi", **GREEDY)


def test_more_choices_than_ever_fit_are_refused(scene: tuple[Any, str]) -> None:
    engine, url = scene
    for fields, param in (({"prompt": "Hi", "n": 9}, "n"), ({"prompt": ["Hi"] * 9}, "prompt")):
        answer = raw(url, "completions", fields)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
        assert "9 completions" in answer.json()["error"]["message"] and "at most 8" in answer.json()["error"]["message"]
    assert engine.submitted == []


def test_death_in_the_middle_of_a_stream_is_its_last_event(scene: tuple[Any, str]) -> None:
    engine, url = scene
    body = {"model": NAME, "messages": HELLO, "stream": True, "n": 2}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as stream:
        lines = (line for line in stream.iter_lines() if line)
        assert [json.loads(next(lines)[6:])["choices"][0]["index"] for _ in range(2)] == [0, 1]
        engine.say(1, Delta("Hel", (5,), (), None))
        assert json.loads(next(lines)[6:])["choices"][0]["delta"] == {"content": "Hel"}
        engine.failure = dead()
        engine.say(1, dead())
        [last] = list(lines)
    error = json.loads(last[6:])["error"]
    assert error["type"] == "server_error" and "was killed by SIGKILL" in error["message"]
    assert engine.cancelled == [2]


def test_the_official_client_raises_what_a_stream_ends_with(scene: tuple[Any, str]) -> None:
    engine, url = scene
    with client_of(url) as client:
        stream = client.completions.create(prompt="Hi", stream=True, model=NAME)
        engine.say(1, Delta("Hel", (5,), (), None), dead())
        assert next(stream).choices[0].text == "Hel"
        with pytest.raises(openai.APIError, match="SIGKILL"):
            next(stream)


def test_death_is_503_for_the_others(scene: tuple[Any, str], wait_for: Callable[..., None]) -> None:
    engine, url = scene
    assert httpx.get(f"{url}/health").status_code == 200
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(raw(url, "completions", {"prompt": "Hi"})))
    thread.start()
    wait_for(lambda: engine.on_delta)
    engine.failure = dead()
    engine.say(1, dead())
    thread.join()
    answers.append(raw(url, "completions", {"prompt": "Hi"}))
    for answer in answers:
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "server_error" and "SIGKILL" in answer.json()["error"]["message"]
    health = httpx.get(f"{url}/health")
    assert health.status_code == 503 and health.json() == {"status": "failed", "reason": dead().line}


def test_tokenizing_for_one_client_does_not_stop_the_others(scene: tuple[Any, str]) -> None:
    engine, url = scene
    tokenizer, reached, go_on = engine.tokenizer, threading.Event(), threading.Event()

    def encode(text: str, *, special: bool) -> list[int]:
        reached.set()
        assert go_on.wait(10)
        return list(tokenizer.encode(text, special=special))

    engine.tokenizer = SimpleNamespace(encode=encode)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(raw(url, "completions", {"prompt": "word " * 100})))
    thread.start()
    assert reached.wait(10)
    assert httpx.get(f"{url}/health", timeout=10).status_code == 200
    go_on.set()
    thread.join()
    assert answers[0].json()["error"]["code"] == "context_length_exceeded"


def send(url: str, head: str, body: bytes = b"") -> socket.socket:
    """A connection on which a request has been sent by hand."""
    host = urlsplit(url)
    connection = socket.create_connection((host.hostname or "", host.port or 0), timeout=30)
    connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
    return connection


@pytest.mark.parametrize("fields", [{"stream": True, "n": 2}, {"n": 2}])
def test_a_client_that_leaves_before_the_first_token_is_cancelled(
    scene: tuple[Any, str], fields: dict[str, Any], wait_for: Callable[..., None]
) -> None:
    engine, url = scene
    body = json.dumps({"model": NAME, "prompt": "Hi", **fields}).encode()
    connection = send(url, f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {len(body)}", body)
    wait_for(lambda: len(engine.on_delta) == 2)
    assert engine.cancelled == []
    connection.close()
    wait_for(lambda: sorted(engine.cancelled) == [1, 2])
    engine.say(1, Delta("late", (5,), (), None))
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_client_that_leaves_within_its_body_costs_nothing(scene: tuple[Any, str]) -> None:
    engine, url = scene
    send(url, "POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 100", b"{").close()
    assert httpx.get(f"{url}/health").status_code == 200 and engine.submitted == []


def test_a_finished_choice_is_not_cancelled(scene: tuple[Any, str]) -> None:
    engine, url = scene
    body = {"model": NAME, "prompt": "Hi", "stream": True, "n": 2}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as stream:
        engine.say(1, Delta("a", (5, 6), (), "stop"))
        engine.say(2, Delta("b", (7,), (), "length"))
        events = [line[6:] for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]" and [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]] == ["stop", "length"]
    assert engine.cancelled == []


def test_a_body_that_is_too_large_is_413(scene: tuple[Any, str]) -> None:
    engine, url = scene
    fitting = json.dumps({"model": NAME, "prompt": [5], "user": ""}).encode()
    for size, status in ((MAX_BODY + 1, 413), (3 * MAX_BODY, 413)):
        answer = httpx.post(f"{url}/v1/completions", content=fitting.ljust(size), headers={"content-type": "application/json"}, timeout=30)
        assert answer.status_code == status and answer.json()["error"]["code"] == "body_too_large"
    chunked = httpx.post(
        f"{url}/v1/completions", content=iter([b" " * (1 << 20)] * 9), headers={"content-type": "application/json"}, timeout=30
    )
    assert chunked.status_code == 413
    with send(
        url, f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {DRAINED_BODY + 1}"
    ) as connection:
        assert b" 413 " in connection.recv(100)  # refused by its length, before a byte of it has come
    bad = httpx.post(f"{url}/v1/completions", content=b"x".ljust(MAX_BODY), headers={"content-type": "application/json"}, timeout=30)
    assert bad.json()["error"]["code"] == "invalid_json"
    assert engine.submitted == []


def test_only_json_is_taken(scene: tuple[Any, str]) -> None:
    engine, url = scene
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = httpx.post(f"{url}/v1/completions", content=b'{"model":"tiny/llama","prompt":"Hi"}', headers={"content-type": kind})
        assert answer.status_code == 415 and answer.json()["error"]["code"] == "invalid_content_type"
    assert engine.submitted == []


def test_unknown_paths_and_methods_are_refused_in_the_same_shape(scene: tuple[Any, str]) -> None:
    _, url = scene
    for method, path, status in (
        ("GET", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
    ):
        answer = httpx.request(method, url + path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert path in answer.json()["error"]["message"]


def test_no_other_origin_is_invited(scene: tuple[Any, str]) -> None:
    _, url = scene
    answer = httpx.get(f"{url}/v1/models", headers={"origin": "http://example.com"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_api_key_opens_v1_alone(scripted: Any, listen: Callable[[Any], str]) -> None:
    url = listen(create_app(scripted, served_model_name=NAME, api_key="s\u00e9cret"))
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "s\u00e9cret".encode()},
        {"Authorization": "Basic s\u00e9cret".encode()},
    ):
        for method, path in (("GET", "models"), ("POST", "chat/completions"), ("POST", "completions")):
            answer = httpx.request(method, f"{url}/v1/{path}", headers=header)  # type: ignore[arg-type]
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{url}/v1/models", headers={b"Authorization": "Bearer s\u00e9cret".encode()}).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200 and httpx.get(f"{url}/version").status_code == 200
    plain = listen(create_app(scripted, served_model_name=NAME, api_key="abc"))
    assert client_of(plain, "abc").models.list().data[0].id == NAME
    with pytest.raises(openai.AuthenticationError):
        client_of(plain, "abd").models.list()
