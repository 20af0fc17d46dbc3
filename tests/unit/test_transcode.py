"""Quantized sources of convert: every layout as floats, and integers in another format without a change."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_fixtures import GPT2, PHI3, artifact
from quantize_fixtures import MODELS
from safetensors.torch import load_file, save_file

from quantkit import fs
from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import read_manifest
from quantkit.commands.convert import ConvertOptions, run
from quantkit.errors import InputError, MachineError
from quantkit.report import Report
from quantkit.scheme import KEEP, LinearScheme
from quantkit.verify import verify

AWQ = LinearScheme("awq", "awq", group_size=32)
GPTQ = LinearScheme("gptq", "gptq", group_size=32, sym=True)
PACKED = LinearScheme("rtn", "packed", group_size=32)
LAYOUTS: dict[str, LinearScheme] = {
    "awq": AWQ,
    "gptq": GPTQ,
    "gptq-act-order": replace(GPTQ, act_order=True),
    "gptq_v2-3-bits": replace(GPTQ, layout="gptq_v2", bits=3, sym=False),
    "gptq-rows-8-bits": replace(GPTQ, bits=8, group_size=-1),
    "packed": PACKED,
    "packed-symmetric-bf16": replace(PACKED, sym=True, scale_dtype="BF16"),
    "int8": LinearScheme("w8a8", "int8", 8, -1, True, "BF16", activations="int8_token"),
    "fp8": LinearScheme("fp8", "fp8", 8, -1, True, "BF16", activations="fp8_token"),
    "fp8-block": LinearScheme("fp8", "fp8_block", 8, 128, True, "F32"),
    "nf4": LinearScheme("nf4", "bnb4", 4, 64, True, "F32", code="nf4"),
    "nf4-nested": LinearScheme("nf4", "bnb4", 4, 64, True, "F32", code="nf4", double_quant=True),
    "fp4": LinearScheme("fp4", "bnb4", 4, 64, True, "F32", code="fp4"),
    "int8-bnb": LinearScheme("int8", "bnb8", 8, -1, True, "F32", activations="int8_outlier"),
}


def convert(path: Path, out: Path, **options: Any) -> Report:
    return run(ConvertOptions(str(path), out, **options))


@contextmanager
def refused(match: str, hint: str = "") -> Iterator[None]:
    """InputError whose line matches, and whose hint does."""
    with pytest.raises(InputError, match=match) as caught:
        yield
    assert re.search(hint, caught.value.hint or ""), caught.value.hint


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_bytes())
    return found


def change_config(path: Path, **changes: Any) -> None:
    (path / "config.json").write_text(json.dumps(config_of(path) | changes))


def weights_of(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def gemv(root: Path) -> dict[str, Any]:
    """An AWQ gemv artifact, which no writer of ours makes: an AWQ one with its linears packed again."""
    from quantkit.geometry import geometry_of
    from quantkit.layouts.registry import codec

    weights = artifact(root, AWQ)
    tensors = load_file(root / "model.safetensors")
    for path, (geometry, _) in weights.items():
        parts = {part.suffix: tensors.pop(f"{path}.{part.suffix}") for part in geometry.parts}
        other = geometry_of(replace(AWQ, layout="awq_gemv"), geometry.n, geometry.k, dtype="F16")
        packed = codec("awq_gemv").pack(codec("awq").unpack(parts, geometry), other)
        tensors |= {f"{path}.{suffix}": value for suffix, value in packed.items()}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    change_config(root, quantization_config=config_of(root)["quantization_config"] | {"version": "gemv"})
    return weights


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in (*LAYOUTS, "gemv")), ("gptq", None), ("fp8", None), ("nf4-nested", None)]
)
def test_every_layout_as_floats(tmp_path: Path, name: str, dtype: str | None) -> None:
    weights = gemv(tmp_path / "q") if name == "gemv" else artifact(tmp_path / "q", LAYOUTS[name])
    report = convert(tmp_path / "q", tmp_path / "out", dtype=dtype)
    found, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "q" / "model.safetensors")
    kind, changed = (torch.bfloat16 if dtype is None else torch.float32), 0
    for path, (_, dense) in weights.items():
        assert torch.equal(found.pop(f"{path}.weight"), dense.to(kind)), path
        changed += int((dense.to(kind).float() != dense).sum())
    assert {path: value.dtype for path, value in found.items()} == dict.fromkeys(found, kind)
    assert all(torch.equal(value.float(), source[key].float()) for key, value in found.items())
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert report.data["exact"] is (changed == 0)
    label = next(label for label in report.data["changes"] if label != "BF16")
    assert report.data["changes"][label]["changed"] == changed
    assert report.data["changes"][label]["tensors"] == len(weights) == 14
    assert label == {
        "gemv": "awq_gemv, 4 bits",
        "gptq": "gptq, 4 bits",
        "gptq_v2-3-bits": "gptq_v2, 3 bits",
        "nf4-nested": "nf4, 4 bits",
        "int8-bnb": "bnb8, 8 bits",
    }.get(name, label)


@pytest.mark.parametrize("config", [GPT2, PHI3], ids=["transposed", "fused"])
@pytest.mark.parametrize("name", ["gptq", "awq", "packed", "int8", "fp8-block", "nf4-nested", "int8-bnb"])
def test_fused_and_transposed_weights_stay_as_they_are_stored(tmp_path: Path, config: Mapping[str, Any], name: str) -> None:
    weights = artifact(tmp_path / "q", LAYOUTS[name], config)
    convert(tmp_path / "q", tmp_path / "out", dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for path, (_, dense) in weights.items():
        assert torch.equal(found[f"{path}.weight"], dense.T if config is GPT2 else dense), path
    assert verify(tmp_path / "out", deep=True).defects == []
    spec = spec_for(config)
    assert set(weights) == {path for layer in range(2) for path in spec.block_modules(layer)}


@pytest.mark.parametrize("name", [*LAYOUTS, "gemv"])
def test_an_unknown_architecture_is_read_by_names(tmp_path: Path, name: str) -> None:
    weights = gemv(tmp_path / "q") if name == "gemv" else artifact(tmp_path / "q", LAYOUTS[name])
    change_config(tmp_path / "q", model_type="strange")
    convert(tmp_path / "q", tmp_path / "out", dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[f"{path}.weight"], dense) for path, (_, dense) in weights.items())
    assert len(found) == len(weights) + 3 + 4
    with pytest.raises(InputError, match="'strange' is not in the architecture table"):
        convert(tmp_path / "q", tmp_path / "other", to="gptq")


EXACT = [
    (GPTQ, "compressed-tensors", "gptq"),
    (GPTQ, "awq", "gptq"),
    (GPTQ, "gptq_v2", "gptq"),
    (AWQ, "gptq_v2", "awq"),
    (AWQ, "compressed-tensors", "awq"),
    (replace(AWQ, group_size=-1, scale_dtype="BF16"), "gptq_v2", "awq"),
    (replace(GPTQ, bits=3), "compressed-tensors", "gptq"),
    (replace(GPTQ, bits=8, group_size=-1), "compressed-tensors", "gptq"),
    (replace(GPTQ, layout="gptq_v2", bits=2, sym=False), "compressed-tensors", "gptq_v2"),
    (replace(GPTQ, layout="gptq_v2", sym=False, scale_dtype="BF16"), "awq", "gptq_v2"),
    (replace(GPTQ, act_order=True), "gptq_v2", "gptq"),
    (replace(PACKED, sym=True, scale_dtype="BF16"), "gptq", "compressed-tensors"),
    (replace(PACKED, bits=8), "gptq_v2", "compressed-tensors"),
    (PACKED, "awq", "compressed-tensors"),
]


@pytest.mark.parametrize(("scheme", "to", "back"), EXACT, ids=[f"{s.layout}{s.bits}-{to}" for s, to, _ in EXACT])
def test_there_and_back_every_byte_is_the_same(tmp_path: Path, scheme: LinearScheme, to: str, back: str) -> None:
    artifact(tmp_path / "q", scheme)
    report = convert(tmp_path / "q", tmp_path / "there", to=to)
    assert dict(report.facts)["values"] == "exact: 14 linears, the same codes, scales and zero points"
    assert (report.data["exact"], report.data["linears"]) == (True, 14)
    convert(tmp_path / "there", tmp_path / "back", to=back)
    assert weights_of(tmp_path / "there") != weights_of(tmp_path / "q")
    assert weights_of(tmp_path / "back") == weights_of(tmp_path / "q")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "q" / "config.json").read_bytes()
    for name in ("q", "there"):
        convert(tmp_path / name, tmp_path / f"{name}-floats", dtype="float32")
    assert weights_of(tmp_path / "q-floats") == weights_of(tmp_path / "there-floats")
    found = verify(tmp_path / "there", deep=True)
    assert found.defects == [] and found.kind == "artifact"
    manifest = read_manifest(tmp_path / "there")
    assert manifest is not None and manifest["conversion"] == {"exact": True, "to": to, "linears": 14}
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_and_compressed_tensors_have_the_same_words(tmp_path: Path, bits: int) -> None:
    """formats.md 8: packed words, scales and zero-point words are each other's transposes."""
    weights = artifact(tmp_path / "q", replace(GPTQ, layout="gptq_v2", bits=bits, sym=False))
    convert(tmp_path / "q", tmp_path / "out", to="compressed-tensors")
    ours, theirs = load_file(tmp_path / "q" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for path, (geometry, _) in weights.items():
        for one, two in (("weight_packed", "qweight"), ("weight_scale", "scales"), ("weight_zero_point", "qzeros")):
            assert torch.equal(theirs[f"{path}.{one}"], ours[f"{path}.{two}"].T), path
        assert theirs[f"{path}.weight_shape"].tolist() == [geometry.n, geometry.k]


def test_a_symmetric_awq_artifact_becomes_symmetric(tmp_path: Path) -> None:
    """AWQ does not say so; runtimes load GPTQ only if it does, and pack-quantized stores no zero points then."""
    artifact(tmp_path / "gptq", GPTQ)
    convert(tmp_path / "gptq", tmp_path / "awq", to="awq")
    assert convert(tmp_path / "awq", tmp_path / "packed", to="compressed-tensors").warnings == ()
    assert config_of(tmp_path / "packed")["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] is True
    assert not any("zero_point" in name for name in load_file(tmp_path / "packed" / "model.safetensors"))
    artifact(tmp_path / "asym", AWQ)
    report = convert(tmp_path / "asym", tmp_path / "out", to="gptq_v2")
    assert report.warnings == ("asymmetric GPTQ runs here and in transformers; vLLM and SGLang load symmetric GPTQ only",)


def test_gemv_becomes_gemm(tmp_path: Path) -> None:
    gemv(tmp_path / "gemv")
    artifact(tmp_path / "gemm", AWQ)
    convert(tmp_path / "gemv", tmp_path / "out", to="awq")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "gemm")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "gemm")


@pytest.mark.parametrize("config", [GPT2, PHI3], ids=["transposed", "fused"])
def test_other_architectures_go_there_and_back(tmp_path: Path, config: Mapping[str, Any]) -> None:
    """What is kept in floats stays byte for byte as well, transposed or not."""
    kept = next(iter(spec_for(config).block_modules(1)))
    artifact(tmp_path / "q", GPTQ, config, others={kept: KEEP})
    convert(tmp_path / "q", tmp_path / "there", to="compressed-tensors")
    convert(tmp_path / "there", tmp_path / "back", to="gptq")
    assert weights_of(tmp_path / "back") == weights_of(tmp_path / "q")
    assert config_of(tmp_path / "back") == config_of(tmp_path / "q")
    assert verify(tmp_path / "there", deep=True).defects == []


def test_linears_of_several_widths(tmp_path: Path) -> None:
    others = {f"model.layers.{n}.mlp.down_proj": replace(GPTQ, bits=8, group_size=64) for n in range(2)}
    artifact(tmp_path / "q", GPTQ, others=others)
    report = convert(tmp_path / "q", tmp_path / "there", to="compressed-tensors")
    assert [(row["from"], row["linears"]) for row in report.data["conversions"]] == [("gptq, 4 bits", 12), ("gptq, 8 bits", 2)]
    convert(tmp_path / "there", tmp_path / "back", to="gptq")
    assert weights_of(tmp_path / "back") == weights_of(tmp_path / "q")
    with refused(r"layers.0.mlp.down_proj: has 8 bits, and awq holds 4", "compressed-tensors or gptq can hold it"):
        convert(tmp_path / "q", tmp_path / "awq", to="awq")
    mixed = {f"model.layers.{n}.mlp.down_proj": replace(GPTQ, group_size=64) for n in range(2)}
    artifact(tmp_path / "groups", GPTQ, others=mixed)
    with refused("one bit width and group size", "^--to compressed-tensors can mix$"):
        convert(tmp_path / "groups", tmp_path / "awq", to="awq")


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
def test_act_order_stays_gptq_unless_its_groups_are_in_order(tmp_path: Path, to: str) -> None:
    artifact(tmp_path / "q", replace(GPTQ, act_order=True))
    with refused(r"q_proj: has groups scattered over its inputs \(act-order\)", "quantkit quantize"):
        convert(tmp_path / "q", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    artifact(tmp_path / "plain", GPTQ)
    change_config(tmp_path / "plain", quantization_config=config_of(tmp_path / "plain")["quantization_config"] | {"desc_act": True})
    convert(tmp_path / "plain", tmp_path / "there", to=to)
    convert(tmp_path / "there", tmp_path / "back", to="gptq")
    assert weights_of(tmp_path / "back") == weights_of(tmp_path / "plain")


def test_a_zero_point_of_zero_needs_the_second_version(tmp_path: Path) -> None:
    artifact(tmp_path / "q", AWQ)
    with refused(r"has a zero point of 0, which gptq \(v1\) cannot hold", "^--to gptq_v2 can hold it$"):
        convert(tmp_path / "q", tmp_path / "out", to="gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]
    artifact(tmp_path / "ones", AWQ, least_zero=1)
    convert(tmp_path / "ones", tmp_path / "v1", to="gptq")
    convert(tmp_path / "v1", tmp_path / "back", to="awq")
    assert weights_of(tmp_path / "back") == weights_of(tmp_path / "ones")


def test_a_wrong_version_label_is_found(tmp_path: Path) -> None:
    artifact(tmp_path / "q", GPTQ)
    change_config(tmp_path / "q", quantization_config=config_of(tmp_path / "q")["quantization_config"] | {"checkpoint_format": "gptq_v2"})
    with refused("is symmetric by config.json and has zero points from 7 to 7, expected 8 everywhere", "checkpoint_format"):
        convert(tmp_path / "q", tmp_path / "out", to="compressed-tensors")


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-block", "nf4-nested", "fp4", "int8-bnb"])
@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_other_grids_are_not_integers(tmp_path: Path, name: str, to: str) -> None:
    artifact(tmp_path / "q", LAYOUTS[name])
    again = re.escape(f"quantkit convert {tmp_path / 'q'} FLOATS, and quantkit quantize FLOATS OUT --method gptq --format {to}")
    with refused(f"q_proj: is .* bits, which is not exactly convertible to {to}", again):
        convert(tmp_path / "q", tmp_path / "out", to=to)


@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
def test_what_is_not_quantized_is_for_quantize(tmp_path: Path, to: str) -> None:
    source = MODELS / "llama"
    with refused("is not quantized, ", f"^quantkit quantize {source} OUT --method {'awq' if to == 'awq' else 'gptq'} --format {to}$"):
        convert(source, tmp_path / "out", to=to)
    artifact(tmp_path / "q", AWQ)
    with pytest.raises(InputError, match=f"--dtype: is given with --to {to}, which keeps every value"):
        convert(tmp_path / "q", tmp_path / "out", to=to, dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scheme", "to"), [(AWQ, "awq"), (GPTQ, "gptq"), (PACKED, "compressed-tensors")])
def test_the_same_format_is_no_conversion(tmp_path: Path, scheme: LinearScheme, to: str) -> None:
    artifact(tmp_path / "q", scheme)
    with pytest.raises(InputError, match=f"--to: .* is {to} already"):
        convert(tmp_path / "q", tmp_path / "out", to=to)


def test_packed_weights_with_quantized_activations_stay_where_they_are(tmp_path: Path) -> None:
    artifact(tmp_path / "q", replace(PACKED, sym=True, activations="int8_token"))
    with pytest.raises(InputError, match="quantizes its activations too, which gptq cannot say"):
        convert(tmp_path / "q", tmp_path / "out", to="gptq")


def test_parts_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    artifact(tmp_path / "q", LAYOUTS["int8-bnb"])
    whole = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"

    def broken(tensors: Mapping[str, torch.Tensor], match: str) -> None:
        save_file(dict(tensors), tmp_path / "q" / "model.safetensors")
        with refused(match):
            convert(tmp_path / "q", tmp_path / "out", overwrite=True)

    broken({**whole, f"{name}.weight_format": torch.tensor(2, dtype=torch.uint8)}, rf"{name}.weight_format: is 2, a layout of old GPUs")
    broken({**whole, f"{name}.SCB": whole[f"{name}.SCB"][:-1]}, rf"{name}.SCB: is F32 \[191\], expected F32 \[192\]")
    broken({**whole, "lm_head.g_idx": torch.zeros(1)}, "lm_head.g_idx: is part of no quantized linear")


def test_a_shape_that_config_json_does_not_have(tmp_path: Path) -> None:
    artifact(tmp_path / "q", PACKED)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_shape"
    save_file({**tensors, name: torch.tensor([128, 192])}, tmp_path / "q" / "model.safetensors")
    with pytest.raises(InputError, match=rf"{name}: holds \[128, 192\], expected \[192, 128\]"):
        convert(tmp_path / "q", tmp_path / "out", to="awq")


def test_an_unfinished_conversion_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact(tmp_path / "q", AWQ)
    convert(tmp_path / "q", tmp_path / "whole", to="gptq_v2")

    def full(*_: object, **__: object) -> None:
        raise MachineError("disk", "is full")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "publish", full)
        with pytest.raises(MachineError):
            convert(tmp_path / "q", tmp_path / "out", to="gptq_v2")
    with pytest.raises(InputError, match="to: was 'gptq_v2' when the work began"):
        convert(tmp_path / "q", tmp_path / "out", to="compressed-tensors")
    assert convert(tmp_path / "q", tmp_path / "out", to="gptq_v2").data["resumed_units"] == 3
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (tmp_path / "whole" / "SHA256SUMS").read_bytes()


def test_the_method_that_made_it_is_remembered(tmp_path: Path) -> None:
    artifact(tmp_path / "q", GPTQ)
    convert(tmp_path / "q", tmp_path / "there", to="compressed-tensors")
    convert(tmp_path / "there", tmp_path / "back", to="awq")
    manifest = read_manifest(tmp_path / "back")
    assert manifest is not None
    assert manifest["assignment"]["model.layers.0.self_attn.q_proj"]["method"] == "gptq"
