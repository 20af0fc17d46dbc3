"""``bench study``: the problems, what is an answer, the modes, and that each mode is asked the same and counted right."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from quantkit import LLM
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands import bench_study
from quantkit.commands.bench_study import BenchStudyOptions, Mode, _all_of, _mode, _Outcome, _Said, run
from quantkit.commands.generate import EngineOptions
from quantkit.errors import InputError, MachineError
from quantkit.evaluate.word_problems import (
    BUILTIN,
    STOPS,
    WORKED,
    Problem,
    answered,
    interval,
    prompt_of,
    read_problems,
    turns_of,
)
from quantkit.runtime.llm import Generated
from quantkit.runtime.params import SamplingParams
from quantkit.shard import shard_checkpoint

LLAMA = Path(__file__).parent.parent / "data" / "models" / "llama"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
ENGINE = EngineOptions(device="cpu", dtype="float32", max_num_seqs=4)


# problems and answers


def test_the_built_in_problems_are_solved_right() -> None:
    """Every step that a solution writes in GSM8K's marks is computed; the last is the answer."""
    problems = read_problems(BUILTIN)
    assert len(problems) == WORKED + 32 and len({problem.question for problem in problems}) == len(problems)
    for problem in problems:
        steps = re.findall(r"<<([\d+*/().-]+)=(\d+)>>(\d+)", problem.answer)
        assert len(steps) == problem.answer.count("<<") > 0
        for left, right, shown in steps:
            assert eval(left) == int(right) == int(shown), problem.question  # noqa: S307  digits and operators alone, see above
        assert problem.value == int(steps[-1][1])


@pytest.mark.parametrize(
    ("text", "value", "marked"),
    [
        ("So 3+4=7.\n#### 7", "7", True),
        ("#### 1,234.50", "1234.50", True),
        ("#### $-5 and more 9", None, True),
        ("#### -5 and more 9", "-5", True),
        ("####$33.", "33", True),
        ("#### the answer is 12", "12", False),
        ("first #### 3 then #### 4", "3", True),
        ("She has 42-9=33 books. That is $1,200!", "1200", False),
        ("It falls to -4 degrees", "-4", False),
        ("From 10-4 it follows", "4", False),
        ("a1b", "1", False),
        ("no number", None, False),
        ("", None, False),
        ("9" * 100, None, False),
    ],
)
def test_the_answer_of_a_text(text: str, value: str | None, marked: bool) -> None:
    if text.startswith("#### $-5"):  # no number after the mark: the last of all
        assert answered(text) == (Decimal(9), False)
        return
    assert answered(text) == (None if value is None else Decimal(value), marked)


def test_numbers_are_compared_as_numbers() -> None:
    assert answered("#### 18.00")[0] == answered("it is 18")[0] == Decimal(18)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (500, 1000, 0.4691, 0.5309)]
)
def test_the_interval_is_wilson_s(right: int, count: int, low: float, high: float) -> None:
    assert interval(right, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_questions_are_asked_behind_worked_examples() -> None:
    one, two = Problem("Q1", "A1\n#### 1", Decimal(1)), Problem("Q2", "A2\n#### 2", Decimal(2))
    assert prompt_of(two, [one]) == "Question: Q1\nAnswer: A1\n#### 1\n\nQuestion: Q2\nAnswer:"
    assert prompt_of(two, []) == "Question: Q2\nAnswer:"
    turns = turns_of(two, [one])
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"] and turns[1]["content"] == one.answer
    assert turns[0]["content"].startswith("Q1\n") and turns[2]["content"].startswith("Q2\n")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: has no question"),
        ('{"question": "q"}', "line 2: has no question or no answer"),
        ('{"question": "q", "answer": 5}', "line 2: has no question or no answer"),
        ('{"question": " ", "answer": "#### 5"}', "line 2: has no question or no answer"),
        ('{"question": "q", "answer": "5"}', "line 2: has an answer without ####"),
        ('{"question": "q", "answer": "#### x"}', "line 2: has an answer without ####"),
    ],
)
def test_a_bad_line_is_named(row: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"question": "q", "answer": "#### 5"}}\n{row}\n')
    with pytest.raises(InputError, match=words):
        read_problems(file)
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no problem"):
        read_problems(file)


# modes


def test_modes_are_named_as_they_are_written() -> None:
    texts = {"tp1": Mode(1, 1), "dp2": Mode(1, 2), "tp2": Mode(2, 1), " tp2dp4 ": Mode(2, 4), "dp1": Mode(1, 1)}
    assert {text: _mode(text) for text in texts} == texts
    assert [mode.name for mode in (Mode(1, 1), Mode(1, 2), Mode(2, 1), Mode(2, 4))] == ["tp1", "dp2", "tp2", "tp2dp4"]
    for text in ("", "tp", "tp0", "dp0", "2", "tp2x", "dp2tp2", "tp99999"):
        with pytest.raises(InputError, match="--modes"):
            _mode(text)


def test_the_modes_that_use_all_devices() -> None:
    names = {devices: [mode.name for mode in _all_of(devices, None)] for devices in (1, 2, 3, 4, 8)}
    assert names[1] == ["tp1"] and names[2] == names[3] == ["tp1", "tp2", "dp2"]
    assert names[4] == ["tp1", "tp4", "dp4", "tp2dp2"] and names[8] == ["tp1", "tp8", "dp8", "tp4dp2"]
    assert [mode.name for mode in _all_of(2, 2)] == ["tp2"] and [mode.name for mode in _all_of(8, 2)] == ["tp2", "tp2dp4"]


def test_modes_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineOptions, "start", lambda *_: pytest.fail("loads a model"))

    def refused(words: str, *modes: str, path: Path = LLAMA, kind: type[Exception] = InputError, **more: Any) -> None:
        with pytest.raises(kind, match=words):
            run(BenchStudyOptions(str(path), modes, engine=ENGINE, **more))

    refused("each once", "tp1", "dp1")
    refused("--shots: is 9", shots=9)
    refused("--limit: is 0", limit=0)
    refused("--same: is given with one mode, tp2", "tp2", same=True)
    file = tmp_path / "file"
    file.touch()
    refused("file: is not a directory", "tp1", out=file)
    shards = tmp_path / "shards"
    shard_checkpoint(open_checkpoint(LLAMA), shards, 2, overwrite=False)
    refused("tp1 on a model that was cut for 2 ranks", "tp1", path=shards)
    refused("--tp: is 2000", "tp2000")
    monkeypatch.setattr("quantkit.runtime.devices.place_for", lambda *_: "cuda")
    monkeypatch.setattr(bench_study, "_gpus", lambda: 2)
    refused("tp2dp2 needs 4 GPUs, 2 are here", "tp2", "tp2dp2", kind=MachineError)


def test_modes_by_default_are_those_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(devices: int, **more: Any) -> list[str]:
        monkeypatch.setattr(bench_study, "CPU_RANKS", devices)
        return [mode.name for mode in bench_study._modes(BenchStudyOptions(str(LLAMA), engine=replace(ENGINE, **more)))]

    assert names(4) == ["tp1", "tp4", "dp4", "tp2dp2"]
    assert names(4096) == ["tp1", "dp4096"], "of what the model cannot be cut for"
    with pytest.raises(InputError, match="--modes: is not given with --executor ray"):
        names(4, executor="ray")


# runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study") / "model"
    shutil.copytree(LLAMA, root)
    (root / "chat_template.jinja").write_text(TEMPLATE)
    return root


PARAMS = SamplingParams(24, temperature=0, stop=STOPS)
SHOTS = 2


def said(llm: LLM, problems: Sequence[Problem]) -> list[Generated]:
    return llm.generate([prompt_of(problem, read_problems(BUILTIN)[:SHOTS]) for problem in problems], PARAMS)


def data_file(path: Path, llm: LLM, count: int) -> list[Problem]:
    """Problems whose answers are, of every second, what the model says."""
    questions = read_problems(BUILTIN)[WORKED:][:count]
    rows = []
    for number, (question, one) in enumerate(zip(questions, said(llm, questions), strict=True)):
        value, _ = answered(one.text)
        rows.append({"question": question.question, "answer": f"#### {value if number % 2 and value is not None else -77}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_problems(path)


def test_ranks_and_replicas_answer_the_same_and_are_counted(model: Path, tmp_path: Path) -> None:
    """One rank in this process; two, two replicas of one, and two of two as processes: in float32 the same answers."""
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    with ENGINE.start(str(model), lambda *_: None) as llm:
        problems = data_file(file, llm, 7)
        want = said(llm, problems)
    right = sum(answered(one.text)[0] == problem.value for one, problem in zip(want, problems, strict=True))
    assert right >= 2, "of problems that are all wrong nothing can be counted"
    modes = ("tp1", "tp2", "dp2", "tp2dp2")
    report = run(BenchStudyOptions(str(model), modes, file, shots=SHOTS, max_tokens=24, out=out, same=True, engine=ENGINE))
    data = report.data
    assert report.failed is None and data["different_answers"] == 0 and (data["questions"], data["max_num_seqs"]) == (7, 4)
    assert [(row["mode"], row["tp"], row["dp"]) for row in data["modes"]] == [("tp1", 1, 1), ("tp2", 2, 1), ("dp2", 1, 2), ("tp2dp2", 2, 2)]
    for row in data["modes"]:
        assert (row["right"], row["requests"]) == (right, 7) and row["accuracy"] == right / 7
        assert row["completion_tokens"] == sum(len(one.token_ids) for one in want)
        assert row["prompt_tokens"] == sum(len(one.prompt_ids) for one in want)
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"] and row["different_answers"] == row["different_verdicts"] == 0
        assert row["tokens_per_second"] == pytest.approx(row["completion_tokens"] / row["seconds"]) and row["load_seconds"] > 0
        assert row["speed_up"] == pytest.approx(data["modes"][0]["seconds"] / row["seconds"])
    assert json.loads((out / "study.json").read_text()) == json.loads(json.dumps(data))
    records = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [record["modes"]["tp2dp2"]["text"] for record in records] == [one.text for one in want]
    assert sum(record["modes"]["dp2"]["right"] for record in records) == right
    assert records[0]["answer"] == "-77" and list(records[0]["modes"]) == list(modes)
    assert "| tp2dp2 |" in (out / "study.md").read_text()


def test_worked_examples_and_the_chat_template_reach_the_model(model: Path, tmp_path: Path) -> None:
    """The modes that are compared where none are named are three on a CPU; here one is, and the report says so."""
    assert [mode.name for mode in bench_study._modes(BenchStudyOptions(str(model), engine=ENGINE))] == ["tp1", "tp2", "dp2"]
    examples = tmp_path / "e.jsonl"
    examples.write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": "1+2?", "answer": "#### 3"}\n')
    told = {}
    for chat in (False, True):
        options = BenchStudyOptions(str(model), ("tp1",), examples=examples, shots=1, limit=3, chat=chat, max_tokens=4, engine=ENGINE)
        told[chat] = run(options)
    first, *_ = read_problems(examples)
    asked = read_problems(BUILTIN)[WORKED:][:3]
    with ENGINE.start(str(model), lambda *_: None) as llm:
        assert told[False].data["modes"][0]["prompt_tokens"] == sum(len(llm.tokens(prompt_of(each, [first]))) for each in asked)
        assert told[True].data["modes"][0]["prompt_tokens"] == sum(len(llm.chat_tokens(turns_of(each, [first]))) for each in asked)
    assert any("one mode" in warning for warning in told[False].warnings)
    assert any("few and easy" in warning for warning in told[True].warnings)
    with pytest.raises(InputError, match="has 2137 tokens, expected at most 1024"):
        run(BenchStudyOptions(str(model), ("tp1",), max_tokens=1000, engine=ENGINE))


def test_answers_that_differ_fail_the_check_that_asks_for_it() -> None:
    problems = [Problem("q", "#### 1", Decimal(1))] * 3
    figures = {
        "load_seconds": 1.0,
        "seconds": 2.0,
        "requests_per_second": 1.0,
        "tokens_per_second": 9.0,
        "dtype": "bfloat16",
        "max_num_seqs": 4,
    }
    shares = {"accuracy": 0.5, "accuracy_low": 0.1, "accuracy_high": 0.9, "marked": 0}

    def outcome(mode: Mode, seconds: float, *texts: str) -> _Outcome:
        answers = [_Said([ord(char) for char in text], [text]) for text in texts]
        right = [answered(text)[0] == 1 for text in texts]
        return _Outcome(mode, answers, right, {**figures, **shares, "mode": mode.name, "seconds": seconds})

    outcomes = [outcome(Mode(1, 1), 2.0, "1", "1", "2"), outcome(Mode(2, 1), 0.5, "1", "3", "2"), outcome(Mode(1, 2), 1.0, "1", "1", "4")]
    for each in outcomes:
        each.data.update(bench_study._beside(each, outcomes[0]))
    assert [each.data["different_answers"] for each in outcomes] == [0, 1, 1]
    assert [each.data["different_verdicts"] for each in outcomes] == [0, 1, 0] and outcomes[1].data["speed_up"] == 4.0
    options = BenchStudyOptions("m", same=True)
    report = bench_study._report(options, problems, [], outcomes)
    assert report.failed == "2 of 3 answers differ between modes" and report.data["different_answers"] == 2
    assert any("bfloat16 shows it" in warning for warning in report.warnings)
    assert bench_study._report(replace(options, same=False), problems, [], outcomes).failed is None
