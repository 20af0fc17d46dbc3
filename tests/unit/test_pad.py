"""``quantkit pad`` and ``quantize --for-tp``: wider MLPs of zeros, of which equal parts can be cut, and the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_fixtures import config_of, logits_of, random_twin, texts_of
from hypothesis import given
from hypothesis import strategies as st
from quantize_fixtures import two_layers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.arch.spec import padded_size
from quantkit.arch.table import spec_for
from quantkit.checkpoint.padding import appended, spread
from quantkit.checkpoint.reader import open_checkpoint, read_manifest
from quantkit.commands.pad import PadOptions, run
from quantkit.commands.quantize import run as quantize
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.errors import InputError
from quantkit.model.load import load_decoder
from quantkit.plan import equal_split_obstacles, ffn_granules
from quantkit.quant_config import stored_assignment
from quantkit.report import Report
from quantkit.transcode import dense_weight, quantized_linears
from quantkit.verify import verify

WIDTH = 320
"""Of the tiny model's MLPs here: five groups of 64, which no four ranks share evenly."""


def padded(path: Path, out: Path, tp: int = 4, multiple: int | None = None) -> Report:
    return run(PadOptions(str(path), out, tp, multiple))


def logits(path: Path, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    with torch.no_grad():
        return logits_of(load_decoder(open_checkpoint(path), dtype=dtype), texts_of((23, 12)))


def saved(root: Path, config: Mapping[str, Any], values: Mapping[str, Tensor]) -> Path:
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in values.items()}, root / "model.safetensors")
    return root


def narrow(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["intermediate_size"] = WIDTH
    for name, value in tensors.items():
        if ".mlp.down_proj" in name:
            tensors[name] = value[:, :WIDTH].contiguous()
        elif ".mlp." in name:
            tensors[name] = value[:WIDTH].contiguous()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_layers(tmp_path_factory.mktemp("small") / "model", narrow)


def obstacles(path: Path, tp: int) -> tuple[Any, ...]:
    checkpoint = open_checkpoint(path)
    spec = spec_for(checkpoint.config)
    return equal_split_obstacles(spec, stored_assignment(checkpoint.config, spec, checkpoint.tensors), tp, dtype="BF16")


# where the zeros lie


@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 16))
def test_every_channel_lies_once_in_order_among_zeros(size: int, tp: int, granule: int) -> None:
    wide = padded_size(size, tp, granule)
    assert wide % (tp * granule) == 0 and 0 <= wide - size < tp * granule
    for places in (spread(size, wide), appended(size, wide)):
        assert len(places) == wide and places[places >= 0].tolist() == list(range(size))
        assert set(places[places < 0]) <= {-1}
    if wide - size <= size:  # no two zeros side by side
        zero = spread(size, wide) < 0
        assert not (zero[1:] & zero[:-1]).any()


# floats


FLOAT_FAMILIES = ("llama", "phi3", "gpt2", "gpt2-inner", "gemma3", "mixtral", "qwen2-moe", "qwen3-moe-dense-first")


@pytest.mark.parametrize("family", FLOAT_FAMILIES)
def test_a_wider_model_computes_the_same(tmp_path: Path, family: str) -> None:
    config = {**config_of(family), **({} if family.startswith("gpt2") else {"num_attention_heads": 4, "num_key_value_heads": 2})}
    _, twin = random_twin(config)
    source = saved(tmp_path / "model", config, twin.values)
    report = padded(source, tmp_path / "wide", 2, 28)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "wide")
    spec, wide = spec_for(before.config), spec_for(after.config)
    grown = {dim: wide.dims[dim].size for dim in report.data["padding"]}
    assert grown and all(size % 56 == 0 and size > spec.dims[dim].size for dim, size in grown.items())
    assert {dim: list(both) for dim, both in report.data["padding"].items()} == {d: [spec.dims[d].size, n] for d, n in grown.items()}
    for got, want in zip(logits(tmp_path / "wide"), logits(source), strict=True):
        assert (got - want).abs().max() < 1e-12
    for name in before.tensors:  # the same values in the same order, and zeros
        old, new = before.read(name), after.read(name)
        assert np.array_equal(old.reshape(-1)[old.reshape(-1) != 0], new.reshape(-1)[new.reshape(-1) != 0]), name
    manifest = read_manifest(tmp_path / "wide")
    assert manifest is not None and manifest["source"]["padding"] == report.data["padding"]
    assert not verify(tmp_path / "wide", deep=True).defects


def test_transformers_loads_it_and_computes_the_same(tmp_path: Path, small: Path) -> None:
    from transformers import AutoModelForCausalLM

    padded(small, tmp_path / "wide", 4, 64)
    tokens = texts_of((20,))[0].unsqueeze(0)
    with torch.no_grad():
        got, want = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)(tokens).logits for path in (tmp_path / "wide", small))
    assert (got - want).abs().max() < 1e-12


# quantized


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"format": "awq", "group_size": 64}),
        ("rtn", {"format": "gptq", "group_size": 64}),
        ("rtn", {"format": "gptq_v2", "group_size": 32, "bits": 8}),
        ("gptq", {"group_size": 64, "option": ("order=act",), "samples": 2, "seq_len": 64}),
        ("rtn", {"format": "compressed-tensors", "group_size": 64, "sym": False}),
        ("rtn", {"format": "compressed-tensors", "group_size": -1, "sym": False}),
        ("nf4", {"option": ("double_quant=false",)}),
        ("int8", {}),
        ("fp8", {}),
        ("w8a8", {"samples": 2, "seq_len": 64}),
    ],
    ids=str,
)
def test_a_quantized_model_keeps_its_weights(tmp_path: Path, small: Path, method: str, options: dict[str, Any]) -> None:
    source, wide = tmp_path / "quantized", tmp_path / "wide"
    quantize(QuantizeOptions(str(small), source, method=method, device="cpu", **options))
    tp = 4 if method not in ("int8", "fp8", "w8a8") and options.get("group_size") != -1 else 64
    if tp == 64:  # rows and columns divide for any number that the heads allow
        with pytest.raises(InputError, match="equal parts of every MLP as it is"):
            padded(source, wide, 4)
        return
    report = padded(source, wide, tp)
    width = report.data["padding"]["ffn"][1]
    before, after = open_checkpoint(source), open_checkpoint(wide)
    old, new = quantized_linears(before), quantized_linears(after)
    assert old.keys() == new.keys() and not obstacles(wide, tp)
    assert obstacles(source, tp) or options.get("option") == ("order=act",)  # which may be cut anywhere, and slowly
    for path in old:
        was, now = dense_weight(before, old[path]), dense_weight(after, new[path])
        n, k = was.shape
        assert np.array_equal(now[:n, :k], was) and not now[n:].any() and not now[:, k:].any()
        assert now.shape == (width if n == WIDTH else n, width if k == WIDTH else k)
    for got, want in zip(logits(wide), logits(source), strict=True):
        assert (got - want).abs().max() < 1e-12
    assert not verify(wide, deep=True).defects


def test_codes_stay_byte_for_byte(tmp_path: Path, small: Path) -> None:
    source, wide = tmp_path / "quantized", tmp_path / "wide"
    quantize(QuantizeOptions(str(small), source, method="rtn", format="gptq", group_size=64, device="cpu"))
    padded(source, wide)
    old, new = load_file(source / "model.safetensors"), load_file(wide / "model.safetensors")
    up, down = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
    assert new[f"{up}.qweight"].shape[1] == 512 and torch.equal(new[f"{up}.qweight"][:, :WIDTH], old[f"{up}.qweight"])
    assert set(new[f"{up}.qweight"][:, WIDTH:].unique().tolist()) == {0x88888888 - (1 << 32)}
    assert set(new[f"{up}.qzeros"][:, WIDTH // 8 :].unique().tolist()) == {0x77777777}
    assert torch.equal(new[f"{down}.qweight"][: WIDTH // 8], old[f"{down}.qweight"])
    assert set(new[f"{down}.scales"][WIDTH // 64 :].unique().tolist()) == {1.0}
    same = [name for name in old if ".mlp." not in name]
    assert len(same) > 10 and all(torch.equal(old[name], new[name]) for name in same)


def test_a_gguf_file_becomes_floats_that_are_padded(tmp_path: Path, small: Path) -> None:
    from quantkit.commands.convert import ConvertOptions
    from quantkit.commands.convert import run as convert

    convert(ConvertOptions(str(small), tmp_path / "m.gguf", to="gguf"))
    convert(ConvertOptions(str(tmp_path / "m.gguf"), tmp_path / "floats"))
    padded(tmp_path / "m.gguf", tmp_path / "wide", 4, 64)
    for got, want in zip(logits(tmp_path / "wide"), logits(tmp_path / "floats"), strict=True):
        assert (got - want).abs().max() < 1e-12


# quantize --for-tp


@pytest.mark.parametrize("method", ["rtn", "awq,gptq"])
def test_quantize_for_ranks(tmp_path: Path, small: Path, method: str) -> None:
    calibration = {} if method == "rtn" else {"samples": 4, "seq_len": 64}
    options = QuantizeOptions(str(small), tmp_path / "out", method=method, group_size=64, for_tp=4, device="cpu", **calibration)  # type: ignore[arg-type]
    quantize(options)
    names = method.split(",")
    for out in [tmp_path / "out"] if len(names) == 1 else [tmp_path / "out" / name for name in names]:
        assert not obstacles(out, 4) and not verify(out, deep=True).defects
        manifest = read_manifest(out)
        assert manifest is not None and manifest["padding"] == {"ffn": [WIDTH, 512]}
        checkpoint = open_checkpoint(out)
        weights = {path: dense_weight(checkpoint, linear) for path, linear in quantized_linears(checkpoint).items()}
        for path, weight in weights.items():
            if path.endswith(("gate_proj", "up_proj")):
                assert not weight[1 : 2 * (512 - WIDTH) : 2].any() and weight[2 * (512 - WIDTH) :].any()
        got, want = torch.cat(logits(out, torch.float32)), torch.cat(logits(small, torch.float32))
        assert (got.log_softmax(-1) - want.log_softmax(-1)).abs().mean() < 0.5


def test_what_ranks_can_cut_is_quantized_as_ever(tmp_path: Path, small: Path) -> None:
    quantize(QuantizeOptions(str(small), tmp_path / "a", method="rtn", group_size=32, device="cpu"))
    quantize(QuantizeOptions(str(small), tmp_path / "b", method="rtn", group_size=32, for_tp=2, device="cpu"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_width_that_no_group_divides_can_be_padded(tmp_path: Path, small: Path) -> None:
    with pytest.raises(InputError, match="down_proj"):
        quantize(QuantizeOptions(str(small), tmp_path / "out", method="rtn", group_size=128, device="cpu"))
    quantize(QuantizeOptions(str(small), tmp_path / "out", method="rtn", group_size=128, for_tp=2, device="cpu"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 512


def test_the_published_example() -> None:
    """Qwen2-72B on eight ranks (``formats.md`` 11)."""
    assert (padded_size(29568, 8, 128), padded_size(29568, 8, 256)) == (29696, 30720)


# refusals


def test_refusals(tmp_path: Path, small: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for path, tp, multiple, message in (
        (small, 1, None, "--tp: is 1, expected 2 to"),
        (small, 3, 64, "4 heads / 3 ranks is not whole, and only MLPs can be padded"),
        (small, 4, 80, "equal parts of every MLP as it is"),
        (small, 4, 0, "--multiple: is 0"),
    ):
        with pytest.raises(InputError, match=message):
            padded(path, tmp_path / "out", tp, multiple)
    with pytest.raises(InputError, match="--for-tp: was given"):
        quantize(QuantizeOptions(str(small), tmp_path / "out.gguf", method="gguf", for_tp=4))
    with pytest.raises(InputError, match="--for-tp: was given"):
        quantize(QuantizeOptions(str(small), tmp_path / "out.gguf", method="awq", format="q4_k_m", for_tp=4))
    with pytest.raises(InputError, match="4 heads / 8 ranks"):
        quantize(QuantizeOptions(str(small), tmp_path / "out", method="rtn", group_size=32, for_tp=8))
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals_of_quantized_models(tmp_path: Path, small: Path) -> None:
    quantize(QuantizeOptions(str(small), tmp_path / "nf4", method="nf4", device="cpu"))
    with pytest.raises(InputError, match="double-quantized scales"):
        padded(tmp_path / "nf4", tmp_path / "out")
    quantize(QuantizeOptions(str(small), tmp_path / "rtn", method="rtn", group_size=64, device="cpu"))
    with pytest.raises(InputError, match="--multiple: was given, and the model is quantized"):
        padded(tmp_path / "rtn", tmp_path / "out", 4, 64)
    assert not (tmp_path / "out").exists()


def test_granules_do_not_depend_on_the_width(small: Path) -> None:
    from quantkit.method_facts import METHODS, make_scheme

    spec = spec_for(open_checkpoint(small).config)
    where = dict.fromkeys(("bits", "group_size", "format", "sym"), "")
    for group in (32, 64, 128):
        scheme = make_scheme("awq", METHODS["awq"], fmt=None, bits=None, group_size=group, sym=None, options={}, dtype="BF16", where=where)
        assert ffn_granules(spec, dict.fromkeys(spec.all_linears(), scheme), dtype="BF16") == {"ffn": group}
