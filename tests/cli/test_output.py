"""What goes where: data on stdout, everything else on stderr; JSON alone with ``--json``; pipes, terminals and signals."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit import __version__, console
from quantkit.commands import version
from quantkit.console import Output
from quantkit.report import Report, Table

Run = Callable[..., Any]
FULL = Report(
    command="version",
    data={"a": 1, "nan": float("nan")},
    facts=(("name", "[bold]llama[/bold]"), ("other", "x\x1b[31my")),
    tables=(Table("Sizes", ("what", "bytes"), (("weights", 12), (":smile:", None))),),
    warnings=("mind [this]",),
    next_steps=("quantkit serve OUT", "quantkit verify OUT"),
)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "run", lambda: FULL)


def test_result_on_stdout_and_the_rest_on_stderr(full: None, quantkit: Run) -> None:
    result = quantkit("version")
    assert result.code == 0
    assert [line.split() for line in result.out.splitlines()[:2]] == [["name", "[bold]llama[/bold]"], ["other", "x\\x1b[31my"]]
    assert re.search(r"^weights +12$", result.out, re.MULTILINE)
    assert re.search(r"^:smile: +-$", result.out, re.MULTILINE)
    assert result.err == "warning: mind [this]\nnext: quantkit serve OUT\n      quantkit verify OUT\n"


def test_quiet_keeps_the_result_alone(full: None, quantkit: Run) -> None:
    result = quantkit("version", "--quiet")
    assert result.out == quantkit("version").out
    assert result.err == ""


def test_json_is_the_data_alone(full: None, quantkit: Run) -> None:
    result = quantkit("version", "--json")
    assert json.loads(result.out) == {"a": 1, "nan": None}
    assert result.err == "warning: mind [this]\n"
    assert quantkit("version", "--json", "-q").err == ""


@pytest.mark.parametrize("flag", ["--json", "--quiet", "--verbose"])
def test_output_options_may_stand_before_the_command(flag: str, full: None, quantkit: Run) -> None:
    def timeless(result: Any) -> tuple[int, str, str]:
        return result.code, result.out, re.sub(r"took [\d.]+ s", "took", result.err)

    assert timeless(quantkit(flag, "version")) == timeless(quantkit("version", flag)) != timeless(quantkit("version"))


def test_a_check_that_says_no_exits_1_after_its_report(quantkit: Run, models: Path) -> None:
    result = quantkit("plan", models / "llama", "--tp", "2", "--gpu-memory", "1KiB", "--json")
    assert result.code == 1
    assert json.loads(result.out)["fits"] is False
    assert re.fullmatch(r"failed: rank \d needs .*\n", result.err)


def test_predictions_that_are_too_far_from_the_base_s_exit_1(quantkit: Run, models: Path) -> None:
    line = ("report", models / "llama", models / "qwen2", "--tokens", "64", "--window", "32", "--json")
    result = quantkit(*line, "--max-kld", "0.05")
    assert result.code == 1
    assert json.loads(result.out)["models"][1]["kld"]["mean"] > 0.05
    assert re.search(r"^failed: .*qwen2: a mean KL divergence of \d\.\d{4}, expected at most 0\.05\n", result.err, re.MULTILINE)
    assert quantkit(*line, "--max-kld", "90").code == 0


def test_facts_that_a_plan_shows_are_in_its_json(quantkit: Run, models: Path) -> None:
    data = json.loads(quantkit("plan", models / "llama", "--tp", "2", "--json").out)
    assert data["plan"]["tp"] == 2
    assert "Ranges per rank" in quantkit("plan", models / "llama", "--tp", "2").out


def test_list_methods(quantkit: Run) -> None:
    methods = json.loads(quantkit("--list-methods", "--json").out)["methods"]
    assert {m["name"] for m in methods} >= {"rtn", "awq"}
    assert all(set(m) == {"name", "summary", "formats", "origin"} for m in methods)
    assert {m["origin"] for m in methods if m["name"] in ("rtn", "awq")} == {"built-in"}
    (gguf,) = (m for m in methods if m["name"] == "gguf")
    assert {"q4_k_m", "iq4_xs", "f16"} <= set(gguf["formats"]) and gguf["origin"] == "built-in"
    shown = quantkit("--list-methods").out
    assert all(text in shown for m in methods for text in (m["name"], m["summary"], m["origin"]))


def test_version(quantkit: Run) -> None:
    assert quantkit("--version").out == f"quantkit {__version__}\n"
    data = json.loads(quantkit("version", "--json").out)
    assert data["quantkit"] == __version__
    assert data == json.loads(quantkit("--version", "--json").out)
    assert data["packages"]["torch"] and data["packages"]["typer"]


def test_recipe_show_prints_the_file(quantkit: Run, tmp_path: Path) -> None:
    text = "# mine\nmethod: rtn\ngroup_size: 64  # [small]\tx\n" + "# " + "long " * 60 + "\n"
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert quantkit("recipe", "show", path).out == text
    assert json.loads(quantkit("recipe", "show", path, "--json").out)["recipe"]["group_size"] == 64


def test_recipe_init_makes_a_valid_recipe(quantkit: Run, tmp_path: Path) -> None:
    for method in ("rtn", "awq"):
        path = tmp_path / f"{method}.yaml"
        assert quantkit("recipe", "init", "--method", method, path).code == 0
        assert ("calibration:" in path.read_text()) == (method == "awq")
        data = json.loads(quantkit("recipe", "validate", path, "--json").out)
        assert (data["valid"], data["recipe"]["method"], data["format"]) == (True, method, "awq")
        assert quantkit("recipe", "show", path).out == path.read_text()


def test_bundled_recipe_by_name(quantkit: Run, models: Path, tmp_path: Path) -> None:
    result = quantkit("quantize", models / "llama", tmp_path / "out", "--recipe", "awq-w4-g64", "--dry-run", "--json")
    recipe = json.loads(result.out)["recipe"]
    assert (recipe["method"], recipe["bits"], recipe["group_size"], recipe["sym"]) == ("awq", 4, 64, False)
    assert recipe["calibration"]["source"] == "builtin"
    assert not (tmp_path / "out").exists()


def test_no_line_is_wrapped_for_a_pipe(spawn: Run, models: Path) -> None:
    wide = spawn("plan", models / "llama", "--tp", "3").out
    assert re.search(r"^equal split .*mlp\.down_proj .*pad intermediate_size to 513 with zeros$", wide, re.MULTILINE)
    narrow = spawn("plan", models / "llama", "--tp", "3", COLUMNS="60").out
    assert max(len(line) for line in narrow.splitlines()) <= 60


def test_a_closed_pipe_is_quiet(command: list[str], environment: dict[str, str], models: Path) -> None:
    for arguments in (["plan", str(models / "llama"), "--tp", "3"], ["--help"], ["version", "--json"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [*command, *arguments], check=False, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_stdout_is_the_machine(command: list[str], environment: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "version"], check=False, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
        )
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_an_ascii_terminal_gets_ascii(spawn: Run, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("# déjà ± \nmethod: rtn\n")
    result = spawn("recipe", "show", path, PYTHONIOENCODING="ascii")
    assert (result.code, result.err) == (0, "")
    assert result.out == "# d\\xe9j\\xe0 \\xb1 \nmethod: rtn\n"


def _in_a_terminal(line: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and everything shown, of a program whose three streams are one terminal of 80 columns."""
    master, terminal = pty.openpty()
    process = subprocess.Popen(line, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # no one holds the other end
            break
        if not chunk:
            break
        shown += chunk
    os.close(master)
    return process.wait(timeout=60), shown.decode()


def test_colour_on_a_terminal_only_and_not_with_no_color(command: list[str], environment: dict[str, str], models: Path) -> None:
    environment = environment | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    line = [*command, "plan", str(models / "llama"), "--tp", "2", "--gpu-memory", "1KiB"]
    code, shown = _in_a_terminal(line, {name: value for name, value in environment.items() if name != "NO_COLOR"})
    assert code == 1
    assert "\x1b[1;31mfailed" in shown
    assert "\x1b[36m" in shown
    code, shown = _in_a_terminal(line, environment | {"NO_COLOR": "1"})
    assert code == 1
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)
    assert "failed: rank" in shown


def test_progress_is_drawn_on_a_terminal(command: list[str], environment: dict[str, str], models: Path, tmp_path: Path) -> None:
    environment = environment | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    code, shown = _in_a_terminal([*command, "shard", str(models / "llama"), str(tmp_path / "a"), "--tp", "2"], environment)
    assert code == 0
    assert re.search(r"shard .*━.* \d+/\d+", shown)
    code, shown = _in_a_terminal([*command, "shard", str(models / "llama"), str(tmp_path / "b"), "--tp", "2", "-q"], environment)
    assert code == 0
    assert "━" not in shown.replace("─", "")


def test_progress_lines_are_terse_and_only_with_verbose(spawn: Run, models: Path, tmp_path: Path) -> None:
    silent = spawn("shard", models / "llama", tmp_path / "a", "--tp", "2")
    assert silent.code == 0
    assert "shard 1/" not in silent.err
    verbose = spawn("shard", models / "llama", tmp_path / "b", "--tp", "2", "--verbose", "--json")
    total = re.search(r"^shard 1/(\d+)$", verbose.err, re.MULTILINE)
    assert total is not None
    assert f"shard {total[1]}/{total[1]}\n" in verbose.err
    assert re.search(r"^quantkit shard took [\d.]+ s$", verbose.err, re.MULTILINE)
    assert json.loads(verbose.out)["tp"] == 2


def test_progress_of_stages_that_come_and_go(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(Output(verbose=True)) as say:
        for stage in ("load", "quan\x1btize"):
            for done in range(4):
                say(stage, done, 3)
    assert capsys.readouterr().err == "load 0/3\nload 3/3\nquan\\x1btize 0/3\nquan\\x1btize 3/3\n"


def test_progress_in_bytes_says_how_fast(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((100.0, 100.5, 101.0, 102.5))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    with console.progress(Output(verbose=True)) as say:
        for done in (0, 1_000_000_000, 2_000_000_000, 3_500_000_000):
            say("weights", done, 3_500_000_000)
    assert capsys.readouterr().err == "weights 0.00/3.50 GB\nweights 2.00/3.50 GB, 2.00 GB/s\nweights 3.50/3.50 GB, 1.40 GB/s\n"


def test_progress_in_bytes_is_drawn_with_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr(drawn, "isatty", lambda: True)
    monkeypatch.setattr(console.sys, "stderr", drawn)
    monkeypatch.setenv("COLUMNS", "100")
    with console.progress(Output()) as say:
        for done in range(0, 3_000_000_001, 500_000_000):
            say("weights", done, 3_000_000_000)
    assert re.search(r"weights .*3\.0/3\.0 GB.* [GT]B/s", drawn.getvalue())


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: int, code: int, command: list[str], environment: dict[str, str], models: Path, tmp_path: Path) -> None:
    line = [*command, "quantize", str(models / "llama"), str(tmp_path / "out"), "--method", "awq", "--group-size", "64", "--samples", "32"]
    process = subprocess.Popen([*line, "-v", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        assert any(line.startswith("quantize 0/") for line in process.stderr), "it ended before it began"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1] in ("interrupted", "terminated")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("closed,code", [(">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), ("2>/dev/full", 0), (">&- 2>/dev/full", 0)])
def test_streams_that_are_closed_or_full_change_no_result(
    command: list[str], environment: dict[str, str], models: Path, tmp_path: Path, closed: str, code: int
) -> None:
    line = shlex.join([*command, "convert", str(models / "llama"), str(tmp_path / "out"), "-v"])
    done = subprocess.run(["sh", "-c", f"{line} {closed}"], check=False, capture_output=True, env=environment, timeout=60)
    assert done.returncode == code, done
    assert b"Traceback" not in done.stderr
    line = shlex.join([*command, "verify", str(tmp_path / "out")])
    done = subprocess.run(["sh", "-c", line], check=False, capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done  # and nothing was written into a file that had taken a stream's place


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_an_error_that_no_one_reads_still_ends_in_its_code(command: list[str], environment: dict[str, str], closed: str) -> None:
    line = shlex.join([*command, "inspect", "nowhere"])
    assert subprocess.run(["sh", "-c", f"{line} {closed}"], check=False, env=environment, timeout=60).returncode == 2


def test_next_steps_can_be_pasted_into_a_shell(quantkit: Run, models: Path, tmp_path: Path) -> None:
    model, whole, cut, back = tmp_path / "a model; it's mine", tmp_path / "w $HOME", tmp_path / "c *", tmp_path / "b"
    shutil.copytree(models / "llama", model)
    shown = [
        quantkit("inspect", model),
        quantkit("plan", model, "--tp", "2"),
        quantkit("plan", model, "--tp", "2", "--method", "awq", "--group-size", "64"),
        quantkit("convert", model, whole),
        quantkit("shard", whole, cut, "--tp", "2"),
        quantkit("inspect", cut),
        quantkit("unshard", cut, back),
    ]
    paths = {str(path) for path in (model, whole, cut, back)} | {f"{whole}-awq"}
    for result in shown:
        assert result.code == 0, result.err
        lines = result.err.splitlines()
        assert lines[0].startswith("next: quantkit ")
        for line in lines:
            words = shlex.split(line.removeprefix("next:"))
            assert words[0] == "quantkit"
            assert any(word in paths or word in ("OUT", "SHARDS") for word in words[2:])
            assert not any(" " in word and word not in paths for word in words)
