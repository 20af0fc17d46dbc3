"""Every field of a request is honoured or refused by name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_type_hints

import pytest

from quantkit.runtime.sampler import SamplingParams
from quantkit.server.protocol import (
    MAX_CHOICES,
    UNSERVED,
    ApiError,
    ChatRequest,
    CompletionRequest,
    chat_turns,
    check_tokens,
    parse_chat,
    parse_completion,
    sampling,
    token_limit,
)

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hi", **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": HELLO, **fields}).encode())


def refused(call: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(**fields)
    error = caught.value
    assert error.status == 400 and error.type == "invalid_request_error"
    assert error.body == {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    return error


def test_a_bare_completion_is_sampled_as_openai_does() -> None:
    request = completion()
    assert request.prompt == ["Hi"] and request.n == 1 and not request.stream and not request.echo
    limit = token_limit(request, 10, 100)
    assert sampling(request, limit, 0) == SamplingParams(max_tokens=16)
    assert SamplingParams(max_tokens=1).temperature == 1.0


def test_a_bare_chat_may_use_the_rest_of_the_context() -> None:
    request = chat()
    assert sampling(request, token_limit(request, 10, 100), 0) == SamplingParams(max_tokens=90)


FIELDS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
    "seed": 3,
    "ignore_eos": True,
    "presence_penalty": 1.5,
    "frequency_penalty": -2,
    "repetition_penalty": 1.25,
    "min_tokens": 2,
    "prompt_logprobs": 3,
}


@pytest.mark.parametrize("call", [completion, chat])
def test_every_sampling_field_arrives(call: Any) -> None:
    more = {"stop": ["a", "b"], "stop_token_ids": [4, 7], "logit_bias": {"5": -1.5, "17": 100}}
    request = call(**FIELDS, **more, max_tokens=5, user="someone")
    params = sampling(request, token_limit(request, 1, 100), 0)
    assert {name: getattr(params, name) for name in FIELDS} == FIELDS
    assert params.stop == ("a", "b") and params.max_tokens == 5
    assert params.stop_ids == (4, 7) and params.logit_bias == ((5, -1.5), (17, 100.0))
    arrived = {*FIELDS, "stop", "max_tokens", "stop_ids", "logit_bias", "logprobs"}
    assert {field.name for field in dataclasses.fields(SamplingParams)} == arrived, "a parameter that no request reaches"


def test_an_echo_with_logprobs_scores_the_prompt() -> None:
    assert sampling(completion(echo=True, logprobs=2), 4, 0).prompt_logprobs == 2
    assert sampling(completion(echo=True, logprobs=2, prompt_logprobs=4), 4, 0).prompt_logprobs == 4
    assert sampling(completion(echo=True, logprobs=0), 4, 0).prompt_logprobs == 0
    assert sampling(completion(echo=True), 4, 0).prompt_logprobs is None is sampling(completion(logprobs=2), 4, 0).prompt_logprobs


@pytest.mark.parametrize("call", [completion, chat])
def test_null_is_the_same_as_nothing(call: Any) -> None:
    names = {*type(call()).model_fields, *UNSERVED[type(call())]} - {"model", "prompt", "messages"}
    assert call(**dict.fromkeys(names)) == call()


def test_a_seed_counts_up_with_the_choices() -> None:
    request = completion(seed=5, n=3)
    assert [sampling(request, 1, index).seed for index in range(3)] == [5, 6, 7]
    for extreme in (-(2**63), 2**63 - 1):
        seeds = [sampling(completion(seed=extreme, n=2), 1, index).seed for index in range(2)]
        assert len(set(seeds)) == 2 and None not in seeds
    assert sampling(completion(), 1, 1).seed is None


def test_logprobs_of_both_endpoints() -> None:
    assert sampling(completion(), 1, 0).logprobs is None
    assert sampling(completion(logprobs=0), 1, 0).logprobs == 0
    assert sampling(completion(logprobs=5), 1, 0).logprobs == 5
    assert sampling(chat(logprobs=False), 1, 0).logprobs is None
    assert sampling(chat(logprobs=True), 1, 0).logprobs == 0
    assert sampling(chat(logprobs=True, top_logprobs=20), 1, 0).logprobs == 20
    assert refused(chat, top_logprobs=3).param == "top_logprobs"


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: Any, parsed: Any) -> None:
    assert completion(prompt=prompt).prompt == parsed


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [[1], "a"], [True], [1.5], {"text": "a"}, 3, [[1, [2]]]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    error = refused(completion, prompt=prompt)
    assert (error.param, error.code) == ("prompt", "invalid_type")


@pytest.mark.parametrize(("stop", "parsed"), [("x", ("x",)), (["x"], ("x",)), ([], ()), (["a", "b", "c", "d"], ("a", "b", "c", "d"))])
def test_stop_strings(stop: Any, parsed: tuple[str, ...]) -> None:
    assert completion(stop=stop).stop == parsed


@pytest.mark.parametrize("stop", ["", [""], [1], {"a": 1}, ["a"] * 5])
def test_other_stops_are_refused(stop: Any) -> None:
    assert refused(chat, stop=stop).param == "stop"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": MAX_CHOICES + 1}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"cache_salt": ""}, "cache_salt", "invalid_value"),
        ({"cache_salt": "x" * 257}, "cache_salt", "invalid_value"),
        ({"cache_salt": 5}, "cache_salt", "invalid_type"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
        ({"min_p": 2}, "min_p", "invalid_value"),
        ({"ignore_eos": 1}, "ignore_eos", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "invalid_value"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "unknown_parameter"),
        ({"user": 5}, "user", "invalid_type"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"logit_bias": {"50": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"50": True}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1e3": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "invalid_value"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"repetition_penalty": 101}, "repetition_penalty", "invalid_value"),
        ({"stop_token_ids": 5}, "stop_token_ids", "invalid_type"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_type"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", "invalid_value"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "unsupported_parameter"),
        ({"temprature": 0.1}, "temprature", "unknown_parameter"),
        ({"temprature": None}, "temprature", "unknown_parameter"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 7}, "model", "invalid_type"),
    ],
)
@pytest.mark.parametrize("call", [completion, chat])
def test_a_wrong_field_is_named(call: Any, fields: dict[str, Any], param: str, code: str) -> None:
    error = refused(call, **fields)
    assert (error.param, error.code) == (param, code)
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"messages": HELLO}, "messages"),
        ({"max_completion_tokens": 4}, "max_completion_tokens"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
    ],
)
def test_fields_of_completions_that_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refused(completion, **fields).param == param


def test_what_asks_for_nothing_is_taken() -> None:
    assert completion(best_of=2, n=2).n == 2
    assert completion(suffix="", logit_bias={}, stop_token_ids=[]) == completion()
    taken = chat(
        tools=[], tool_choice="none", functions=[], function_call="none", logit_bias={}, modalities=["text"], reasoning_effort="none"
    )
    assert taken == chat()
    assert chat(response_format={"type": "text"}, store=False).response_format is not None
    kept = chat(metadata={"a": "b"}, service_tier="auto", safety_identifier="x", prompt_cache_key="y", user="z")
    assert sampling(kept, 1, 0) == sampling(chat(), 1, 0)


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.type"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"store": True}, "store"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [*HELLO, {"role": "robot", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bob"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "messages[0].extra"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [TOOL]}]}, "messages[0].tool_calls"),
        ({"prompt": "x"}, "prompt"),
        ({"best_of": 1}, "best_of"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_fields_of_chat_that_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refused(chat, **fields).param == param


@pytest.mark.parametrize("call", [completion, chat])
def test_tokens_that_the_model_does_not_have_are_refused(call: Any) -> None:
    for fields in ({"stop_token_ids": [3, 9]}, {"logit_bias": {"9": 1}}):
        check_tokens(call(**fields), 10)
        assert refused(check_tokens, request=call(**fields), vocabulary=9).param == next(iter(fields))


def test_messages_reach_the_template_as_plain_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "c",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    request = chat(messages=[{"role": "system", "content": parts}, answer, {"role": "tool", "content": "d", "tool_call_id": "7"}])
    assert chat_turns(request) == [
        {"role": "system", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d", "tool_call_id": "7"},
    ]


def test_no_field_of_openai_is_unknown_here() -> None:
    """The official client's own types say which fields there are: each is either served or refused with a reason."""
    types = pytest.importorskip("openai.types")
    for owner, params in (
        (CompletionRequest, types.completion_create_params.CompletionCreateParamsStreaming),
        (ChatRequest, types.chat.completion_create_params.CompletionCreateParamsStreaming),
    ):
        names = set(get_type_hints(params))
        assert {"model", "stream"} < names
        assert names <= {*owner.model_fields, *UNSERVED[owner]}, names - {*owner.model_fields, *UNSERVED[owner]}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b"null", b"\xff", b"[" * 100_000, b'{"model":"m","prompt":"\\ud800"}', b'{"temperature":NaN}']
)
@pytest.mark.parametrize("parse", [parse_completion, parse_chat])
def test_what_is_no_json_object_is_refused(parse: Any, body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_json", None)


def test_token_limits_say_the_numbers() -> None:
    assert token_limit(completion(max_tokens=90), 10, 100) == 90
    assert token_limit(completion(), 95, 100) == 5
    assert token_limit(chat(max_completion_tokens=3), 10, 100) == 3
    assert token_limit(chat(max_tokens=3, max_completion_tokens=3), 10, 100) == 3
    for call, limit, param in (
        (completion, {"max_tokens": 91}, "max_tokens"),
        (chat, {"max_tokens": 91}, "max_tokens"),
        (chat, {"max_completion_tokens": 91}, "max_completion_tokens"),
    ):
        error = refused(token_limit, request=call(**limit), prompt=10, context=100)
        assert (error.param, error.code) == (param, "context_length_exceeded")
        assert all(number in error.message for number in ("91", "10", "90", "100"))
    for call, limit in ((completion, {"max_tokens": 5}), (chat, {"max_completion_tokens": 5}), (completion, {})):
        error = refused(token_limit, request=call(min_tokens=17, **limit), prompt=10, context=100)
        assert error.param == "min_tokens" and "17" in error.message
    silent = completion(max_tokens=0, echo=True, logprobs=1)
    assert token_limit(silent, 99, 100) == 0 and sampling(silent, 0, 0) == sampling(completion(echo=True, logprobs=1), 1, 0)
    assert token_limit(completion(max_tokens=0, prompt_logprobs=0), 1, 100) == 0
    assert refused(token_limit, request=completion(max_tokens=0, echo=True, min_tokens=1), prompt=1, context=100).param == "min_tokens"
    for request, param in ((completion(), "prompt"), (chat(), "messages")):
        error = refused(token_limit, request=request, prompt=100, context=100)
        assert (error.param, error.code) == (param, "context_length_exceeded")
        assert "100 tokens" in error.message
