"""Rules -> assignment -> quantization_config and back; and what a recipe's overrides make of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from quantkit.arch.table import spec_for
from quantkit.commands.assign import assign
from quantkit.commands.quantize_options import QuantizeOptions, effective_recipe
from quantkit.errors import InputError
from quantkit.method_facts import METHODS
from quantkit.quant_config import assignment_from_config, quantization_config
from quantkit.recipe import Recipe, parse_override
from quantkit.scheme import KEEP, LinearScheme, Rule, assignment_to_json, resolve

W4, W4_64 = LinearScheme("awq", "awq", 4, 128), LinearScheme("awq", "awq", 4, 64)
NAMES = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head"]


@dataclass(frozen=True)
class Header:
    """A tensor as its header describes it."""

    dtype: str
    shape: tuple[int, ...]


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 1024,
}


def test_the_first_rule_that_matches_decides() -> None:
    found = resolve([Rule(r"layers\.1\.", KEEP), Rule("up_proj", W4), Rule("", W4_64)], NAMES)
    assert list(found.values()) == [W4, KEEP, W4, W4_64]


def test_what_no_rule_matches_is_kept() -> None:
    assert resolve([Rule("up_proj$", W4)], NAMES)["lm_head"] == KEEP


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression"), ("gate_proj", "matches no linear of the model")])
def test_a_rule_that_can_do_nothing_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve([Rule(pattern, W4)], NAMES)


def test_awq_config_is_what_the_format_says() -> None:
    assignment = {**dict.fromkeys(NAMES, W4), "lm_head": KEEP}
    assert quantization_config(assignment, "lm_head") == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert quantization_config(dict.fromkeys(NAMES, W4), "lm_head")["modules_to_not_convert"] == []
    assert quantization_config(dict.fromkeys(NAMES[:2], W4), "lm_head")["modules_to_not_convert"] == ["lm_head"], "a tied head"


def test_awq_config_holds_one_group_size() -> None:
    with pytest.raises(InputError, match=r"one bit width and group size for all linears, found \[\(4, 64\), \(4, 128\)\]"):
        quantization_config({"a": W4, "b": W4_64}, "lm_head")


def test_symmetric_and_asymmetric_linears_share_a_config() -> None:
    sym = LinearScheme("awq", "awq", 4, 128, True)
    assert quantization_config({"a": W4, "b": sym}, "lm_head")["zero_point"] is True


def test_a_checkpoint_says_which_linears_are_packed() -> None:
    tensors = {
        f"{NAMES[0]}.qweight": Header("I32", (256, 64)),
        f"{NAMES[0]}.scales": Header("F16", (4, 512)),
        f"{NAMES[1]}.weight": Header("F16", (512, 256)),
    }
    config = {"quantization_config": {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}}
    found = assignment_from_config(config, NAMES[:2], tensors)
    assert found == {NAMES[0]: LinearScheme("awq", "awq", 4, 64), NAMES[1]: KEEP}
    assert assignment_from_config({}, NAMES[:1], tensors) == {NAMES[0]: KEEP}
    assert assignment_to_json(found)[NAMES[0]] == asdict(LinearScheme("awq", "awq", 4, 64))


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ([1], "is list, expected an object"),
        ({"quant_method": "hqq"}, "quant_method 'hqq', expected one of awq"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "AWQ version 'gemv_fast', expected gemm or gemv"),
        ({"quant_method": "awq", "bits": 8}, "AWQ of 8 bits, expected 4"),
        ({"quant_method": "awq", "group_size": 0}, "group_size: is 0, expected -1 or a positive"),
        ({"quant_method": "awq", "group_size": "128"}, "group_size: is '128', expected a whole number"),
    ],
)
def test_a_quantization_config_that_is_not_read_is_refused(quant: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        assignment_from_config({"quantization_config": quant}, NAMES, {f"{NAMES[0]}.qweight": Header("I32", (256, 64))})


def recipe(*overrides: str, **fields: Any) -> Recipe:
    return Recipe(method="awq", format="awq", overrides=[parse_override(text) for text in overrides], **fields)


def assigned(*overrides: str, tied: bool = False, **fields: Any) -> dict[str, LinearScheme]:
    return assign(spec_for({**CONFIG, "tie_word_embeddings": tied}), recipe(*overrides, **fields), METHODS, "F16")


def test_the_head_is_kept_and_the_blocks_are_not() -> None:
    found = assigned()
    assert found.pop("lm_head") == KEEP
    assert set(found.values()) == {LinearScheme("awq", "awq", 4, 128, False)}
    assert "lm_head" not in assigned(tied=True)


def test_the_head_is_quantized_only_where_a_pattern_means_it_alone() -> None:
    for tied in (False, True):  # a tied one is untied
        assert assigned("lm_head:group_size=64", tied=tied)["lm_head"] == LinearScheme("rtn", "awq", 4, 64)


def test_overrides_are_honoured_in_order() -> None:
    found = assigned(r"layers\.0.*down:keep", r"down:sym=true", ".*:group_size=64")
    assert found["model.layers.0.mlp.down_proj"] == KEEP
    assert found["model.layers.1.mlp.down_proj"] == LinearScheme("awq", "awq", 4, 128, True)
    assert found["model.layers.1.mlp.up_proj"].group_size == 64
    assert found["lm_head"] == KEEP, "a pattern that matches everything does not mean the head"


@pytest.mark.parametrize(
    ("overrides", "fields", "message"),
    [
        (("down:bits=8",), {}, "override 'down': 8 bits in the awq format, expected 4"),
        ((), {"bits": 8}, "--bits: 8 bits in the awq format"),
        ((), {"group_size": 4}, "--group-size: is 4"),
        ((), {"group_size": 96}, "q_proj: 256 input features do not divide into groups of 96"),
        ((".*:keep",), {}, "leaves every linear unquantized"),
        (("nothing:keep",), {}, "rule 'nothing': matches no linear"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(overrides: tuple[str, ...], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assigned(*overrides, **fields)


def test_a_group_that_does_not_fit_comes_with_one_that_does() -> None:
    with pytest.raises(InputError) as caught:
        assigned(group_size=96)
    assert caught.value.hint == "--group-size 128 divides 256"


def options(**fields: Any) -> QuantizeOptions:
    return QuantizeOptions("model", Path("out"), **fields)


def test_defaults_are_filled_in() -> None:
    found = effective_recipe(options(method="awq"))
    assert (found.bits, found.group_size, found.sym, found.format) == (None, None, None, None), "the method decides"
    (scheme,) = {s for s in assigned().values() if s != KEEP}
    assert scheme == LinearScheme("awq", "awq", 4, 128, False)
    assert (found.calibration.source, found.calibration.samples, found.calibration.seq_len) == ("builtin", 128, 512)
    text = effective_recipe(options(method="awq", calib="mine.txt", samples=7))
    assert (text.calibration.source, text.calibration.samples, text.calibration.seq_len) == ("mine.txt", 7, 2048)


def test_windows_fit_the_model() -> None:
    assert effective_recipe(options(method="awq", calib="mine.txt"), max_positions=1024).calibration.seq_len == 1024
    with pytest.raises(InputError, match="--seq-len: is 2000, expected at most 1024, the positions of the model"):
        effective_recipe(options(method="awq", seq_len=2000), max_positions=1024)


def test_options_lie_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "method: awq\nbits: 4\ngroup_size: 64\nsym: true\ncalibration: {samples: 5}\noverrides: [{pattern: down, keep: true}]\n"
    )
    found = effective_recipe(options(recipe=path, sym=False, samples=9, override=("up:keep",)))
    assert (found.method, found.group_size, found.sym, found.calibration.samples) == ("awq", 64, False, 9)
    assert [o.pattern for o in found.overrides] == ["up", "down"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "--method: no method given"),
        ({"method": "awq", "samples": 0}, "samples"),
        ({"method": "awq", "seq_len": 0}, "seq_len"),
        ({"method": "awq", "bits": 99}, "bits"),
        ({"method": "awq", "group_size": 0}, "group_size"),
        ({"method": "awq", "calib": ""}, "source"),
    ],
)
def test_options_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        effective_recipe(options(**fields))
