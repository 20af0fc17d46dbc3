"""Recipes: what is in them is what is run; what is not known is refused in one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.commands.assign import check_recipe
from quantkit.commands.quantize_options import QuantizeOptions, effective_recipe
from quantkit.commands.recipe import ValidateOptions, validate
from quantkit.errors import InputError
from quantkit.quantizers.base import methods
from quantkit.recipe import (
    MAX_RECIPE_BYTES,
    Calibration,
    Override,
    Recipe,
    bundled_recipes,
    checked_recipe,
    find_recipe,
    load_recipe,
    parse_override,
    parse_recipe,
)

WHOLE = """
method: awq
bits: 4
group_size: -1
sym: true
format: awq
calibration: {source: self, samples: 3, seq_len: 64}
overrides:
  - {pattern: 'layers\\.0', group_size: 32}
  - {pattern: down_proj, keep: true}
options: {clip: false}
"""


def test_whole_recipe() -> None:
    assert parse_recipe(WHOLE, "r.yaml") == Recipe(
        method="awq",
        bits=4,
        group_size=-1,
        sym=True,
        format="awq",
        calibration=Calibration(source="self", samples=3, seq_len=64),
        overrides=[Override(pattern="layers\\.0", group_size=32), Override(pattern="down_proj", keep=True)],
        options={"clip": False},
    )


@pytest.mark.parametrize(
    "text,line",
    [
        ("", "r.yaml: holds nothing, expected a mapping with a method"),
        ("- awq", "r.yaml: holds list, expected a mapping with a method"),
        ("bits: 4", "r.yaml: method: is missing"),
        ("method: awq\ngroupsize: 64", "r.yaml: groupsize: unknown field, expected one of method, bits, "),
        ("method: awq\ncalibration: {sample: 1}", "r.yaml: calibration.sample: unknown field, expected one of source, samples, seq_len"),
        (
            "method: awq\noverrides: [{pattern: a, bit: 4}]",
            "r.yaml: overrides.0.bit: unknown field, expected one of pattern, method, ",
        ),
        ("method: awq\nbits: '4'", "r.yaml: bits: '4': input should be a valid integer"),
        ("method: awq\nbits: 4.0", "r.yaml: bits: 4.0: input should be a valid integer"),
        ("method: awq\nbits: true", "r.yaml: bits: True: input should be a valid integer"),
        ("method: awq\nbits: 17", "r.yaml: bits: 17: input should be less than or equal to 16"),
        ("method: awq\ngroup_size: 0", "r.yaml: group_size: 0 is no group size"),
        ("method: awq\nsym: 1", "r.yaml: sym: 1: input should be a valid boolean"),
        ("method: [awq]", "r.yaml: method: input should be a valid string"),
        ("method: ../awq", "r.yaml: method: '../awq': "),
        ("method: awq\noverrides: [{pattern: '(', keep: true}]", "r.yaml: overrides.0.pattern: '(' is not a regular expression"),
        ("method: awq\noverrides: [{pattern: a}]", "r.yaml: overrides.0: changes nothing"),
        ("method: awq\noverrides: [{pattern: a, keep: true, bits: 4}]", "r.yaml: overrides.0: keep leaves a linear unquantized"),
        ("method: awq\nbits: 4\nbits: 3", "r.yaml: line 3: the field 'bits' twice"),
        ("method: &a awq\nformat: *a", "r.yaml: line 2: an alias (*name)"),
        ("1: awq", "r.yaml: line 1: the key 1, expected a word"),
        ("method: !!python/object/apply:os.getcwd []", "r.yaml: line 1: could not determine a constructor"),
        ("method: [awq", "r.yaml: line 1: "),
        ("method: awq\n---\nmethod: rtn", "r.yaml: line 2: "),
        ("- " * 30000, "r.yaml: is not YAML (RecursionError)"),
        ("method: awq\x00", "r.yaml: "),
    ],
)
def test_refused_in_one_line(text: str, line: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(text, "r.yaml")
    assert caught.value.line.startswith(line)
    assert "\n" not in caught.value.line
    assert caught.value.exit_code == 2


def test_unknown_option_of_a_method_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("method: awq\noptions: {scale_pionts: 5}\n")
    with pytest.raises(InputError, match=r"r\.yaml: options of awq: unknown option 'scale_pionts', expected one of scale_points, "):
        validate(ValidateOptions(str(path)))
    path.write_text("method: rtn\noptions: {clip: true}\n")
    with pytest.raises(InputError, match=r"r\.yaml: options of rtn: unknown option 'clip', expected no options$"):
        validate(ValidateOptions(str(path)))


@pytest.mark.parametrize(
    "text,what",
    [
        ("method: magic", "method: 'magic' is unknown"),
        ("method: rtn\nformat: gguf", "format: 'gguf' cannot hold what method rtn makes"),
        ("method: rtn\nbits: 3\nformat: awq", "bits: 3 bits in the awq format"),
        ("method: rtn\ngroup_size: 4", "group_size|group-size: is 4"),
        ("method: rtn\noverrides: [{pattern: down, bits: 8}]", "override 'down': 8 bits in the awq format"),
    ],
)
def test_what_no_model_could_be_quantized_by_is_invalid(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=what):
        validate(ValidateOptions(str(path)))


def test_bundled_recipes_are_valid_for_their_methods() -> None:
    assert set(bundled_recipes()) == {"awq-w4-g64", "ci-tiny"}
    for name in bundled_recipes():
        recipe = load_recipe(name)
        chosen = methods()[recipe.method]
        chosen.factory(recipe.options)
        check_recipe(recipe, {name: found.facts for name, found in methods().items()})
        assert validate(ValidateOptions(name)).data["valid"] is True
    recipe = load_recipe("awq-w4-g64")
    assert (recipe.method, recipe.bits, recipe.group_size, recipe.sym) == ("awq", 4, 64, False)


def test_a_file_goes_before_a_bundled_name_and_a_directory_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("ci-tiny") == bundled_recipes()["ci-tiny"]
    Path("ci-tiny").mkdir()
    assert find_recipe("ci-tiny") == bundled_recipes()["ci-tiny"]
    Path("ci-tiny").rmdir()
    Path("ci-tiny").write_text("method: rtn")
    assert load_recipe("ci-tiny").method == "rtn"


def test_no_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe, expected a YAML file or one of awq-w4-g64, ci-tiny"):
        load_recipe("nothing")
    with pytest.raises(InputError, match="is not a file"):
        load_recipe(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_bytes(b"method: awq\n#" + b" " * MAX_RECIPE_BYTES)
    with pytest.raises(InputError, match="is too large for a recipe"):
        load_recipe(path)
    path.write_bytes(b"method: \xff")
    with pytest.raises(InputError, match=r"is not UTF-8 \(byte 8\)"):
        load_recipe(path)


@pytest.mark.parametrize(
    "text,override",
    [
        ("down_proj:keep", Override(pattern="down_proj", keep=True)),
        ("a:bits=8", Override(pattern="a", bits=8)),
        ("a:group-size=-1,sym=true", Override(pattern="a", group_size=-1, sym=True)),
        ("(?:q|k)_proj: group_size = 32 , sym=false", Override(pattern="(?:q|k)_proj", group_size=32, sym=False)),
    ],
)
def test_overrides(text: str, override: Override) -> None:
    assert parse_override(text) == override


@pytest.mark.parametrize(
    "text", ["", "a", ":keep", "a:", "a:bits", "a:bits=x", "a:size=4", "a:keep,bits=4", "a:bits=4,bits=3", "(:keep", "a:bits=99"]
)
def test_bad_overrides(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_override(text)
    assert caught.value.line.startswith(f"--override {text!r}: ")


def test_the_command_line_is_laid_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(WHOLE)
    assert effective_recipe(QuantizeOptions("m", tmp_path, recipe=path)) == parse_recipe(WHOLE, "r.yaml")
    over = QuantizeOptions("m", tmp_path, recipe=path, group_size=64, sym=False, override=("q_proj:keep",), samples=9, calib="t.txt")
    recipe = effective_recipe(over)
    assert (recipe.method, recipe.group_size, recipe.sym, recipe.options) == ("awq", 64, False, {"clip": False})
    assert recipe.calibration == Calibration(source="t.txt", samples=9, seq_len=64)
    assert [o.pattern for o in recipe.overrides] == ["q_proj", "layers\\.0", "down_proj"]


def test_defaults_without_a_recipe(tmp_path: Path) -> None:
    recipe = effective_recipe(QuantizeOptions("m", tmp_path, method="awq"))
    assert recipe.calibration == Calibration(source="builtin", samples=128, seq_len=512)
    assert effective_recipe(QuantizeOptions("m", tmp_path, method="awq", calib="t.txt")).calibration.seq_len == 2048
    with pytest.raises(InputError, match="no method given"):
        effective_recipe(QuantizeOptions("m", tmp_path))


def test_a_bad_value_from_the_command_line_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantize: group_size: 0 is no group size"):
        effective_recipe(QuantizeOptions("m", tmp_path, method="rtn", group_size=0))
    with pytest.raises(InputError, match="quantize: bits: 99"):
        effective_recipe(QuantizeOptions("m", tmp_path, method="rtn", bits=99))
    with pytest.raises(InputError, match="x: bits: 99"):
        checked_recipe({"method": "rtn", "bits": 99}, "x")
