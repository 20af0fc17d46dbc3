"""generate and chat as processes of their own: what goes to stdout and what to stderr, signals, and what a model may do to a terminal."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.console import Conversation

Run = Callable[..., Any]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    root = tmp_path / "tiny"
    shutil.copytree(models / "llama", root)
    (root / "chat_template.jinja").write_text(TEMPLATE)
    return root


@pytest.fixture
def chat(command: list[str], environment: dict[str, str], model: Path) -> Callable[..., subprocess.Popen[str]]:
    """A conversation through pipes."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        line = [*command, "chat", str(model), "--device", "cpu", "--temperature", "0", *arguments]
        return subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    return start


def test_answers_go_to_stdout_and_all_else_to_stderr(chat: Run) -> None:
    out, err = chat("--max-tokens", "8").communicate("The capital\n/reset\nThe capital\n/exit\nnever\n", timeout=120)
    answer, again = out.rpartition("answers ")[0].strip("\n"), "begun again"
    half = len(answer) // 2
    assert answer[:half].strip("\n") == answer[half:].strip("\n") != "", "after a reset the same question has the same answer"
    assert err.splitlines()[0].startswith("/reset") and err.splitlines()[1:] == [again]
    assert "2, " in out.splitlines()[-1]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(chat: Run) -> None:
    process = chat()
    process.stdin.write("The capital\n")
    process.stdin.flush()
    began = process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate("/reset\n", timeout=120)
    assert process.returncode == 0, err
    assert "stopped" in err.splitlines() and "begun again" in err.splitlines()
    assert began and "answers  1, " in rest


def test_a_prompt_and_a_file(spawn: Run, model: Path, tmp_path: Path) -> None:
    alone = spawn("generate", model, "The capital", "--max-tokens", "6", "--device", "cpu")
    assert (alone.code, alone.err) == (0, "") and alone.out.endswith("\n")
    prompts, out = tmp_path / "p.txt", tmp_path / "o.jsonl"
    prompts.write_text("The capital\nOne two\n")
    result = spawn("generate", model, "--prompts", prompts, "--out", out, "--max-tokens", "6", "--device", "cpu", "--verbose")
    assert result.code == 0 and "generate 2/2" in result.err.splitlines()
    first, _ = [json.loads(line) for line in out.read_text().splitlines()]
    assert first["text"] + "\n" == alone.out and str(out) in result.out
    assert spawn("generate", model, "--prompts", prompts, "--out", out).code == 2, "it is there"


def test_a_model_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Conversation().say("a\x1b[31mb\n\tc\u202e\r")
    assert capsys.readouterr().out == "a\\x1b[31mb\n\tc\\u202e\\r"
