"""Assignment -> ``quantization_config`` -> assignment for every format, and configs that are not what they should be."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from quantkit.errors import InputError
from quantkit.geometry import Geometry, geometry_of
from quantkit.quant_config import assignment_from_config, leaves_out, quantization_config
from quantkit.scheme import KEEP, LinearScheme
from quantkit.slices import Stored

NAMES = [f"model.layers.{n}.{m}" for n in range(12) for m in ("self_attn.q_proj", "mlp.gate", "mlp.up_proj", "mlp.down_proj")]
ROUTERS = [name for name in NAMES if name.endswith("gate")]
GPTQ = LinearScheme("gptq", "gptq", 4, 128, True)
PACKED = LinearScheme("rtn", "packed", 4, 128, True, "BF16")
SCHEMES = {
    "awq": LinearScheme("awq", "awq", 4, 64),
    "gptq": GPTQ,
    "gptq_v2": LinearScheme("gptq", "gptq_v2", 3, -1),
    "gptq_act": LinearScheme("gptq", "gptq", 4, 32, True, act_order=True),
    "packed": PACKED,
    "packed_rows": replace(PACKED, bits=8, group_size=-1, sym=False),
    "int8": LinearScheme("int8", "int8", 8, -1, True, "BF16", activations="int8_token"),
    "fp8": LinearScheme("fp8", "fp8", 8, -1, True, "BF16", activations="fp8_token"),
    "fp8_block": LinearScheme("fp8", "fp8_block", 8, 128, True, "F32"),
    "nf4": LinearScheme("nf4", "bnb4", 4, 64, True, "F32", "nf4", True),
    "fp4": LinearScheme("fp4", "bnb4", 4, 64, True, "F32", "fp4"),
    "bnb8": LinearScheme("int8", "bnb8", 8, -1, True, "F32", activations="int8_outlier"),
}


class Header:
    def __init__(self, geometry: Geometry, suffix: str) -> None:
        part = geometry.part(suffix)
        self.dtype, self.shape = part.dtype, geometry.stored_shape(part)


def tensors_of(assignment: dict[str, LinearScheme]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, scheme in assignment.items():
        geometry = geometry_of(scheme, 256, 256, dtype="BF16")
        found |= {f"{name}.{part.suffix}": Header(geometry, part.suffix) for part in geometry.parts}
    return found


def round_trip(assignment: dict[str, LinearScheme]) -> None:
    config = json.loads(json.dumps({"quantization_config": quantization_config(assignment, "lm_head")}))
    found = assignment_from_config(config, assignment, tensors_of(assignment))
    expected = {name: s if s == KEEP else replace(s, method=found[name].method) for name, s in assignment.items()}
    assert found == expected
    for name, scheme in assignment.items():
        assert leaves_out(config["quantization_config"], name) == (scheme == KEEP) or name == "lm_head"


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("kept", ["nothing", "head", "routers", "one"])
def test_every_format_says_which_linear_is_stored_how(name: str, kept: str) -> None:
    left = {"nothing": [], "head": ["lm_head"], "routers": ["lm_head", *ROUTERS], "one": ["lm_head", NAMES[3]]}[kept]
    round_trip({linear: KEEP if linear in left else SCHEMES[name] for linear in [*NAMES, "lm_head"]})


@pytest.mark.parametrize("base", [GPTQ, PACKED])
def test_bits_and_groups_may_be_mixed(base: LinearScheme) -> None:
    mixed = dict.fromkeys(NAMES, base)
    mixed |= {name: replace(base, bits=8) for name in NAMES if name.endswith("down_proj")}
    mixed |= {NAMES[0]: replace(base, group_size=32, sym=False), NAMES[4]: KEEP, "lm_head": KEEP}
    round_trip(mixed)


def test_layouts_of_compressed_tensors_may_be_mixed() -> None:
    mixed = {name: SCHEMES["fp8"] if name.endswith("down_proj") else PACKED for name in NAMES} | {"lm_head": KEEP}
    assert quantization_config(mixed, "lm_head")["format"] == "mixed-precision"
    round_trip(mixed)


def test_formats_may_not() -> None:
    with pytest.raises(InputError, match="one artifact cannot be of the formats awq, gptq"):
        quantization_config({"a": SCHEMES["awq"], "b": GPTQ}, "lm_head")


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}}


def ct(**group: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {**GROUP, **group}}}


@pytest.mark.parametrize(
    ("scheme", "quant"),
    [
        (GPTQ, []),
        (GPTQ, {"quant_method": ["gptq"]}),
        (GPTQ, {"quant_method": "exl2"}),
        (GPTQ, {"quant_method": "gptq", "checkpoint_format": "marlin"}),
        (GPTQ, {"quant_method": "gptq", "bits": "4"}),
        (GPTQ, {"quant_method": "gptq", "bits": True}),
        (GPTQ, {"quant_method": "gptq", "group_size": 0}),
        (GPTQ, {"quant_method": "gptq", "dynamic": ["x"]}),
        (GPTQ, {"quant_method": "gptq", "dynamic": {"+:(": {}}}),
        (SCHEMES["awq"], {"quant_method": "awq", "version": "gemv_fast"}),
        (PACKED, {"quant_method": "compressed-tensors"}),
        (PACKED, {"quant_method": "compressed-tensors", "config_groups": {"group_0": 1}}),
        (PACKED, ct(weights=None)),
        (PACKED, ct(targets="Linear")),
        (PACKED, ct(targets=["re:("])),
        (PACKED, ct(targets=["Conv"])),
        (PACKED, ct(weights={**GROUP["weights"], "type": "float"})),  # type: ignore[dict-item]
        (PACKED, ct(input_activations={"num_bits": 8, "dynamic": False, "strategy": "tensor"})),
        (SCHEMES["nf4"], {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}),
        (SCHEMES["fp8_block"], {"quant_method": "fp8", "weight_block_size": [64, 128]}),
        (SCHEMES["fp8_block"], {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}),
    ],
)
def test_what_is_not_read_is_refused_by_name(scheme: LinearScheme, quant: Any) -> None:
    assignment = dict.fromkeys(NAMES[:2], scheme)
    if quant == []:
        quant = ["gptq"]
    with pytest.raises(InputError, match="quantization_config"):
        assignment_from_config({"quantization_config": quant}, assignment, tensors_of(assignment))


EIGHT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("group", "found"),
    [
        ({"weights": {**EIGHT, "symmetric": False}}, "unpacked weights of 8 bits, int, channel, asymmetric"),
        ({"weights": {**EIGHT, "strategy": "tensor", "symmetric": False}}, "unpacked weights of 8 bits, int, tensor, asymmetric"),
        ({"weights": EIGHT, "input_activations": {**TOKEN, "symmetric": False}}, "activations of 8 bits, int, asymmetric"),
        ({"weights": EIGHT, "input_activations": {**TOKEN, "num_bits": 4}}, "activations of 4 bits, int, symmetric"),
        ({"weights": EIGHT, "input_activations": {**TOKEN, "strategy": None}}, "activations quantized per None, dynamic True"),
        ({"weights": EIGHT, "input_activations": {**TOKEN, "dynamic": "local"}}, "activations quantized per token, dynamic local"),
        ({"weights": EIGHT, "input_activations": "int8"}, "input_activations 'int8'"),
        ({"weights": EIGHT, "output_activations": TOKEN}, "output_activations {"),
    ],
)
def test_eight_bits_that_our_linears_would_compute_otherwise_are_refused_in_one_line(group: dict[str, Any], found: str) -> None:
    assignment = dict.fromkeys(NAMES[:2], SCHEMES["int8"])
    tensors = tensors_of(assignment)
    tensors |= {f"{name}.weight_zero_point": tensors[f"{name}.weight_scale"] for name in assignment}
    with pytest.raises(InputError) as refused:
        assignment_from_config({"quantization_config": ct(**group)}, assignment, tensors)
    assert str(refused.value).startswith(f"config.json: quantization_config.config_groups: {found}")
    assert "expected" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("name", ["packed_rows", "int8", "fp8"])
def test_the_grid_of_activations_is_their_own_and_not_the_weights(name: str, kind: str) -> None:
    scheme = replace(SCHEMES[name], activations="fp8_token" if kind == "float" else "int8_token")
    assignment = {"lm_head": KEEP, **dict.fromkeys(NAMES, scheme)}
    assert quantization_config(assignment, "lm_head")["config_groups"]["group_0"]["input_activations"]["type"] == kind
    round_trip(assignment)
