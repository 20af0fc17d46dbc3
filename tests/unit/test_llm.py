"""A model in this program, ``generate`` and ``chat``: the same texts as the engine's, in order, whatever is asked and refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit import LLM, SamplingParams
from quantkit.commands import chat, generate
from quantkit.commands.chat import ChatOptions
from quantkit.commands.generate import EngineOptions, GenerateOptions
from quantkit.errors import InputError, RuntimeDied

MODELS = Path(__file__).parent.parent / "data" / "models"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
GREEDY = SamplingParams(10, temperature=0, ignore_eos=True)
ENGINE = EngineOptions(device="cpu", dtype="float32", max_num_seqs=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("llm") / "tiny"
    shutil.copytree(MODELS / "llama", root)
    (root / "chat_template.jinja").write_text(TEMPLATE)
    return str(root)


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model, device="cpu", dtype="float32", max_num_seqs=3) as made:
        yield made


def test_importing_quantkit_loads_nothing_heavy() -> None:
    program = (
        "import sys, quantkit; from quantkit import SamplingParams; SamplingParams(3); "
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    with pytest.raises(AttributeError, match="LLMs"):
        getattr(quantkit, "LLMs")  # noqa: B009  a type checker knows that there is none


def test_many_prompts_are_each_as_alone_and_in_order(llm: LLM) -> None:
    """Twenty, of which the engine takes six at a time; texts and tokens mixed, each its own length."""
    texts = ["The capital", "A", "One two three", "def f(x):"] * 5
    prompts: list[str | list[int]] = [text if number % 2 else llm.tokens(text) for number, text in enumerate(texts)]
    params = [SamplingParams(1 + number % 7, temperature=0, ignore_eos=True) for number in range(20)]
    seen: list[tuple[str, int, int]] = []
    got = llm.generate(prompts, params, progress=lambda *said: seen.append(said))
    for text, own, result in zip(texts, params, got, strict=True):
        [alone] = llm.generate(text, own)
        assert result == alone and len(result.token_ids) == own.max_tokens and result.finish_reason == "length"
        assert list(result.prompt_ids) == llm.tokens(text) and result.text == llm.engine.tokenizer.decode(result.token_ids)
    assert seen == [("generate", done, 20) for done in range(21)]
    assert llm.engine.stats().running == llm.engine.stats().waiting == 0


def test_one_list_of_tokens_is_one_prompt(llm: LLM) -> None:
    [text], [ids] = llm.generate(["The capital"], GREEDY), llm.generate(llm.tokens("The capital"), GREEDY)
    assert text == ids and llm.generate([], GREEDY) == []
    assert len(llm.generate("The capital")[0].token_ids) <= 16
    with pytest.raises(InputError, match="3"):
        llm.generate(["a", "b"], [GREEDY] * 3)


def test_logprobs_come_with_the_result(llm: LLM) -> None:
    [got] = llm.generate("The capital", SamplingParams(3, temperature=0, logprobs=2, prompt_logprobs=1))
    assert [one.token for one in got.logprobs] == list(got.token_ids) and all(len(one.top) == 2 for one in got.logprobs)
    assert [one.token for one in got.prompt_logprobs] == list(got.prompt_ids[1:])


def test_a_bad_prompt_is_refused_before_any_runs(llm: LLM) -> None:
    before = llm.engine.stats().steps
    cases: list[tuple[list[int], str]] = [([], "is empty"), ([5] * 2000, "2000 tokens"), ([99999], "does not have")]
    for bad, words in cases:
        with pytest.raises(InputError, match=f"prompt 2: .*{words}"):
            llm.generate([[5], [6], bad], GREEDY)
    assert llm.engine.stats().steps == before


def test_what_raises_in_the_middle_leaves_nothing_running(llm: LLM) -> None:
    def fail(number: int, result: Any) -> None:
        raise KeyboardInterrupt

    long = SamplingParams(900, temperature=0, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.run([([5], GREEDY), ([6], long), ([7], long)], fail)
    assert llm.engine.stats().running == 0


def test_replicas_share_the_prompts_and_say_the_same(model: str, llm: LLM) -> None:
    prompts = [[5 + number, 6, 7] for number in range(12)]
    params = [SamplingParams(12, temperature=1.0, seed=number, ignore_eos=True) for number in range(12)]
    with LLM(model, device="cpu", dtype="float32", dp=2, max_num_seqs=2) as two:
        assert (two.engine.tp, two.engine.dp) == (1, 2) and two.engine.capacity == 132
        assert two.generate(prompts, params) == llm.generate(prompts, params)
        assert all(engine.stats().generated_tokens > 12 for engine in two.engine._engines)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="--dp: is 0, expected at least 1"):
        LLM(model, dp=0)


def test_chat_is_the_template_and_a_stream_can_be_left(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    ids = llm.engine.tokenizer.encode("<user>Hi<assistant>", special=False)
    whole = llm.chat(messages, GREEDY)
    assert list(whole.prompt_ids) == ids == llm.chat_tokens(messages)
    assert "".join(delta.text for delta in llm.stream(ids, GREEDY)) == whole.text
    with contextlib.closing(llm.stream(ids, SamplingParams(900, ignore_eos=True))) as deltas:
        next(deltas)
        assert llm.engine.stats().running == 1
    assert llm.engine.stats().running == 0


def test_a_closed_model_says_so(model: str) -> None:
    with LLM(model, device="cpu", dtype="float32") as closed:
        pass
    with pytest.raises(RuntimeDied, match="closed"):
        closed.generate("a", GREEDY)


# generate


@pytest.fixture
def ask(model: str, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``quantkit generate`` on the model that is loaded already."""
    monkeypatch.setattr(EngineOptions, "start", lambda self, path, progress: contextlib.nullcontext(llm))

    def call(**fields: Any) -> Any:
        return generate.run(GenerateOptions(model, **{"sampling": GREEDY, "engine": ENGINE, **fields}))

    return call


def test_one_prompt_is_printed(ask: Callable[..., Any], llm: LLM) -> None:
    report = ask(prompt="The capital")
    [want] = llm.generate("The capital", GREEDY)
    assert report.text == want.text and report.data["results"][0]["token_ids"] == list(want.token_ids)
    assert report.data["completion_tokens"] == 10 and report.data["tokens_per_second"] > 0
    told = ask(prompt="Hi", chat=True, system="Be brief")
    assert told.text == llm.chat([{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}], GREEDY).text


def test_a_file_of_prompts_becomes_a_file_of_answers(
    ask: Callable[..., Any], llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "FLUSH_SECONDS", 0.0)
    rows: list[dict[str, Any]] = [
        {"prompt": "The capital", "id": 7, "max_tokens": 9},
        {"prompt": [5, 17], "max_tokens": 1, "logprobs": 1, "prompt_logprobs": 0},
        {"messages": [{"role": "user", "content": "Hi"}], "stop_token_ids": [1], "logit_bias": {"5": -100}, "temperature": 0.9, "seed": 3},
    ] * 4
    source, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    source.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    report = ask(prompts=source, out=out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(12)) and report.data["prompts"] == 12
    first, second, third = records[:3]
    assert first["id"] == 7 and len(first["token_ids"]) == 9
    assert first["text"] == llm.generate("The capital", SamplingParams(9, temperature=0, ignore_eos=True))[0].text
    assert len(second["token_ids"]) == len(second["logprobs"]) == 1 and len(second["prompt_logprobs"]) == 2
    shaped = SamplingParams(10, 0.9, seed=3, stop_ids=(1,), logit_bias=((5, -100),), ignore_eos=True)
    assert third["text"] == llm.chat(rows[2]["messages"], shaped).text and third["messages"] == rows[2]["messages"]
    assert report.data["completion_tokens"] == sum(len(record["token_ids"]) for record in records)
    with pytest.raises(InputError, match="exists"):
        ask(prompts=source, out=out)
    ask(prompts=source, out=out, overwrite=True)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["token_ids"] for record in again] == [record["token_ids"] for record in records]


def test_lines_of_text_are_prompts(ask: Callable[..., Any], llm: LLM, tmp_path: Path) -> None:
    source = tmp_path / "p.txt"
    source.write_text("The capital\r\n\nOne two\n")
    lines = [json.loads(line) for line in ask(prompts=source).text.splitlines()]
    assert [line["prompt"] for line in lines] == ["The capital", "One two"]
    assert [line["text"] for line in lines] == [one.text for one in llm.generate(["The capital", "One two"], GREEDY)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: has not one of"),
        ('{"prompt": "a", "messages": []}', "line 2: has not one of"),
        ('{"prompt": "a", "temprature": 1}', "line 2: 'temprature' is unknown"),
        ('{"prompt": "a", "stop_token_ids": [-1]}', "line 2: stop_token_ids: is -1"),
        ('{"prompt": "a", "min_tokens": 11}', "line 2: min_tokens: is 11"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "line 2: logit_bias: is 'x'"),
        ('{"prompt": "a", "logit_bias": {"' + "1" * 5000 + '": 1}}', "line 2: logit_bias: is '1111"),
        ('{"prompt": "a", "id": ["\\ud800"]}', "line 2: has '\\ud800', half of a surrogate pair"),
        ('{"prompt": "a\\udc00"}', "line 2: has '\\udc00', half of a surrogate pair"),
        ('{"prompt": [1.5]}', "line 2: prompt: is list"),
        ('{"messages": "Hi"}', "line 2: messages: is str"),
    ],
)
def test_a_bad_line_is_named(ask: Callable[..., Any], tmp_path: Path, row: str, words: str) -> None:
    source, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    source.write_text(f'{{"prompt": "fine"}}\n{row}\n')
    with pytest.raises(InputError) as caught:
        ask(prompts=source, out=out)
    assert words in caught.value.line and not out.exists()


def test_what_is_asked_must_be_one_thing(ask: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for fields, words in (
        ({}, "has no prompt"),
        ({"prompt": "a", "prompts": tmp_path / "f"}, "has two"),
        ({"prompt": "a", "system": "s"}, "--system: is given without --chat"),
        ({"prompts": tmp_path / "empty"}, "holds no prompt"),
    ):
        with pytest.raises(InputError) as caught:
            ask(**fields)
        assert words in caught.value.line


# chat


@dataclass
class Script:
    """A dialogue that types what it is told, and may press Ctrl-C after so many pieces of an answer."""

    typed: list[str]
    stop_after: int | None = None
    said: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ask(self) -> str | None:
        return self.typed.pop(0) if self.typed else None

    def say(self, text: str) -> None:
        self.said.append(text)
        if self.stop_after is not None and len(self.said) >= self.stop_after:
            self.stop_after = None
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def talk(model: str, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Script, Any, list[str]]]:
    """Runs a conversation; gives what was shown, the report, and the prompts that the model saw."""
    prompts: list[str] = []
    real = llm.stream

    def stream(ids: Any, params: Any) -> Any:
        prompts.append(llm.engine.tokenizer.decode(ids))
        return real(ids, params)

    monkeypatch.setattr(llm, "stream", stream)
    monkeypatch.setattr(EngineOptions, "start", lambda self, path, progress: contextlib.nullcontext(llm))

    def call(*typed: str, stop_after: int | None = None, **fields: Any) -> tuple[Script, Any, list[str]]:
        script = Script(list(typed), stop_after)
        report = chat.run(ChatOptions(model, sampling=SamplingParams(temperature=0), **{"max_tokens": 6, **fields}), script)
        return script, report, prompts

    return call


def test_a_conversation_remembers_until_it_is_reset(talk: Callable[..., Any], llm: LLM) -> None:
    script, report, prompts = talk("One", "", "Two", "/reset", "Three", "/system Other", "Four", "/what", "/exit", "never", system="Sys")
    first = llm.chat([{"role": "system", "content": "Sys"}, {"role": "user", "content": "One"}], SamplingParams(6, temperature=0)).text
    assert prompts == [
        "<system>Sys<user>One<assistant>",
        f"<system>Sys<user>One<assistant>{first}<user>Two<assistant>",
        "<system>Sys<user>Three<assistant>",
        "<system>Other<user>Four<assistant>",
    ]
    assert "".join(script.said).startswith(first + "\n")
    assert report.data["answers"] == 4 and 4 <= report.data["completion_tokens"] <= 24
    assert script.typed == ["never"] and script.notes.count("begun again") == 2 and script.notes.count(chat.HELP) == 2


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(talk: Callable[..., Any], llm: LLM) -> None:
    script, report, prompts = talk("One", "Two", stop_after=3, max_tokens=None)
    assert "stopped" in script.notes and report.data["answers"] == 2
    shown = "".join(script.said[:3])
    assert prompts[1].startswith("<user>One<assistant>" + shown[: len("".join(script.said[:2]))]) and prompts[1].endswith(
        "<user>Two<assistant>"
    )
    assert llm.engine.stats().running == 0


def test_a_message_that_is_too_long_does_not_end_the_conversation(talk: Callable[..., Any]) -> None:
    script, report, prompts = talk("word " * 2000, "Hi")
    assert prompts[-1] == "<user>Hi<assistant>" and report.data["answers"] == 1
    assert any("longest text" in note for note in script.notes)


def test_a_model_without_a_template_cannot_chat() -> None:
    with pytest.raises(InputError, match="chat template"):
        chat.run(ChatOptions(str(MODELS / "qwen2"), engine=ENGINE), Script([]))
