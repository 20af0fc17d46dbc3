"""quantize from end to end on the tiny models: what is written, in which dtype, and what is refused before work begins."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_fixtures import MODELS, two_layers
from safetensors.torch import load_file

from quantkit.arch.table import spec_for
from quantkit.checkpoint.artifact import ArtifactWriter
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.commands import quantize, quantize_run
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.errors import InputError, MachineError
from quantkit.evaluate.perplexity import perplexity
from quantkit.layouts.awq import unpack_words
from quantkit.model.load import load_decoder
from quantkit.quantizers.pipeline import Source
from quantkit.report import Report
from quantkit.text.builtin import builtin_text
from quantkit.text.tokenizer import load_tokenizer
from quantkit.verify import verify

Run = Callable[..., Report]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose search is short: for tests of what is written, not of how good it is."""
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text("method: awq\noptions: {scale_points: 3}\n")
    return path


def options(out: Path, **fields: Any) -> QuantizeOptions:
    defaults: dict[str, Any] = {"path": str(MODELS / "llama"), "group_size": 64, "samples": 4, "seq_len": 64, "device": "cpu"}
    if "recipe" not in fields and "method" not in fields:
        defaults["method"] = "awq"
    if fields.get("method") == "rtn":  # which refuses what it would not use
        del defaults["samples"], defaults["seq_len"]
    return QuantizeOptions(out=out, **{**defaults, **fields})


def run(out: Path, **fields: Any) -> Report:
    return quantize.run(options(out, **fields))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_layers(tmp_path_factory.mktemp("small") / "llama")


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(out.glob("*.safetensors")) for key, value in load_file(path).items()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_an_artifact_is_verified_and_nearly_as_good_as_its_source(tmp_path: Path, name: str, method: str) -> None:
    source = two_layers(tmp_path / "source", name=name)
    report = run(tmp_path / "out", path=str(source), method=method)
    assert verify(tmp_path / "out", deep=True).defects == []
    assert report.data["tensors"] == 14
    assert report.data["bits_per_weight"] == pytest.approx(4 + 20 / 64)
    assert report.data["bytes_after"] == sum(value.nbytes for value in tensors_of(tmp_path / "out").values())
    assert report.data["bytes_before"] == sum(value.nbytes for value in tensors_of(source).values())
    ids = load_tokenizer(source).encode(builtin_text("held-out"), special=False)[:512]
    figures = [
        perplexity(load_decoder(open_checkpoint(path), dtype=torch.float32, parity=True), ids, window=128, stride=128).value
        for path in (source, tmp_path / "out")
    ]
    assert figures[1] == pytest.approx(figures[0], rel=0.12)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_what_is_not_packed_keeps_its_dtype(tmp_path: Path, name: str, quick: Path) -> None:
    source = two_layers(tmp_path / "source", name=name)
    run(tmp_path / "out", path=str(source), recipe=quick)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    packed = {key.rpartition(".")[0] for key in after if key.endswith(".qweight")}
    for key, value in after.items():
        suffix = key.rpartition(".")[2]
        expected = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}.get(suffix)
        assert value.dtype == (expected or before[key].dtype) == (expected or torch.bfloat16), key
    untouched = [key for key in before if "layers" not in key or key.endswith(("q_norm.weight", "k_norm.weight"))]
    untouched += [key for key in before if name == "gemma3" and ("post_attention_layernorm" in key or "post_feedforward" in key)]
    assert untouched and all(torch.equal(before[key], after[key]) for key in untouched)
    assert {key for key in before if key.rpartition(".")[0] not in packed} == {key for key in after if key.rpartition(".")[0] not in packed}
    assert name != "qwen2" or {"model.layers.0.self_attn.v_proj.bias", "model.layers.1.self_attn.q_proj.bias"} <= set(after)


def test_a_bias_keeps_a_dtype_of_its_own(tmp_path: Path, quick: Path) -> None:
    def widen(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if key.endswith(".bias"):
                tensors[key] = tensors[key].float()

    source = two_layers(tmp_path / "source", widen, "qwen2")
    run(tmp_path / "out", path=str(source), recipe=quick)
    assert tensors_of(tmp_path / "out")["model.layers.0.self_attn.v_proj.bias"].dtype == torch.float32


def test_config_manifest_and_files_are_what_the_format_says(tmp_path: Path, small: Path, quick: Path) -> None:
    run(tmp_path / "out", path=str(small), recipe=quick, override=("layers.1.*down_proj:keep",))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"],
    }
    assert config == json.loads((small / "config.json").read_text())
    manifest = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert manifest["recipe"]["overrides"][0]["pattern"] == "layers.1.*down_proj"
    assert manifest["calibration"]["shape"] == [4, 64] and manifest["calibration"]["source"] == "builtin"
    assert set(manifest["blocks"]) == {"0", "1"} and set(manifest["blocks"]["0"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert 0 < manifest["blocks"]["0"]["o"]["output_error"] < 0.3
    assert "down" not in manifest["blocks"]["1"]
    assert str(tmp_path) not in (tmp_path / "out" / "quantkit.json").read_text(), "no path is part of an artifact"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()


def test_a_kept_linear_in_floats_still_follows_what_was_folded(tmp_path: Path, small: Path) -> None:
    report = run(tmp_path / "out", path=str(small), override=("v_proj:keep", "gate_proj:keep"))
    assert verify(tmp_path / "out", deep=True).defects == []
    assert any("vLLM and SGLang fuse them" in warning for warning in report.warnings)
    before, after = tensors_of(small), tensors_of(tmp_path / "out")
    key = "model.layers.0.self_attn.v_proj.weight"
    assert after[key].dtype == torch.bfloat16 and not torch.equal(before[key], after[key])


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_symmetric_zeros_are_eight_on_disk(tmp_path: Path, small: Path, method: str) -> None:
    run(tmp_path / "out", path=str(small), method=method, sym=True)
    zeros = [unpack_words(value) for key, value in tensors_of(tmp_path / "out").items() if key.endswith("qzeros")]
    assert len(zeros) == 14 and all(bool((value == 8).all()) for value in zeros)


def test_a_group_of_minus_one_is_one_scale_per_row(tmp_path: Path, small: Path, quick: Path) -> None:
    done = run(tmp_path / "out", path=str(small), recipe=quick, group_size=-1)
    assert any("group size -1 runs here; other runtimes" in warning for warning in done.warnings)
    assert tensors_of(tmp_path / "out")["model.layers.0.mlp.down_proj.scales"].shape == (1, 256)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["group_size"] == -1
    assert verify(tmp_path / "out", deep=True).defects == []


def test_two_runs_write_the_same_bytes_in_one_file_or_many(tmp_path: Path, small: Path, quick: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, path=str(small), recipe=quick)
    assert (tmp_path / "a" / "SHA256SUMS").read_bytes() == (tmp_path / "b" / "SHA256SUMS").read_bytes()
    run(tmp_path / "many", path=str(small), recipe=quick, max_shard_size=200_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert verify(tmp_path / "many", deep=True).defects == []
    one, many = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)


def test_one_block_is_read_at_a_time(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, quick: Path) -> None:
    seen: list[str] = []
    fill, commit = Checkpoint.fill, ArtifactWriter.commit

    def filling(self: Checkpoint, out: Any, name: str, index: Any, view: Any = None) -> None:
        seen.append(name.split(".")[2] if ".layers." in name else "outer")
        fill(self, out, name, index, view)

    def committing(self: ArtifactWriter, unit: str, *args: Any, **kwargs: Any) -> None:
        commit(self, unit, *args, **kwargs)
        seen.append(f"committed {unit}")

    monkeypatch.setattr(Checkpoint, "fill", filling)
    monkeypatch.setattr(ArtifactWriter, "commit", committing)
    run(tmp_path / "out", path=str(small), recipe=quick)
    order = [item for place, item in enumerate(seen) if place == 0 or seen[place - 1] != item]
    assert order == ["0", "outer", "0", "committed block-00000", "1", "committed block-00001", "outer", "committed outer"]


def test_activations_near_the_end_of_float16_are_said(tmp_path: Path, quick: Path) -> None:
    def loud(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] *= 2.0**20

    report = run(tmp_path / "out", path=str(two_layers(tmp_path / "source", loud)), recipe=quick)
    assert any("float16 kernels (limit 65504) may overflow" in warning for warning in report.warnings)
    assert report.data["peak_activation"] > 3e4
    quiet = run(tmp_path / "quiet", path=str(two_layers(tmp_path / "plain")), recipe=quick)
    assert not any("float16" in warning for warning in quiet.warnings) and 0 < quiet.data["peak_activation"] < 3e4


def test_builtin_text_comes_with_a_warning_and_real_text_without(tmp_path: Path, small: Path, quick: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(builtin_text("held-out"))
    assert any("built-in English text" in warning for warning in run(tmp_path / "a", path=str(small), recipe=quick).warnings)
    assert run(tmp_path / "b", path=str(small), recipe=quick, calib=str(text)).warnings == ()
    assert run(tmp_path / "c", path=str(small), method="rtn").warnings == ()


def test_a_model_calibrates_itself(tmp_path: Path, small: Path, quick: Path) -> None:
    report = run(tmp_path / "out", path=str(small), recipe=quick, calib="self")
    assert report.data["calibration"]["source"] == "self"
    assert verify(tmp_path / "out", deep=True).defects == []


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_artifact(tmp_path: Path, small: Path, after: int, quick: Path) -> None:
    run(tmp_path / "straight", path=str(small), recipe=quick)

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantize", after):
            raise Stop

    with pytest.raises(Stop):
        quantize.run(options(tmp_path / "out", path=str(small), recipe=quick), stop)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", path=str(small), recipe=quick, resume=True)
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (tmp_path / "straight" / "SHA256SUMS").read_bytes()


def test_a_dry_run_says_what_would_be_and_writes_nothing(tmp_path: Path, small: Path) -> None:
    report = run(tmp_path / "out", path=str(small), dry_run=True, override=("v_proj:keep",))
    assert not list(tmp_path.iterdir())
    done = run(tmp_path / "out", path=str(small), method="rtn", override=("v_proj:keep",))
    assert report.data["bytes_after"] == done.data["bytes_after"]
    assert report.data["assignment"]["model.layers.0.self_attn.v_proj"]["layout"] == "plain"
    assert any("fuse" in warning for warning in report.warnings)


def quantized(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["quantization_config"] = {"quant_method": "fp8"}


def incomplete(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.input_layernorm.weight"]


def transposed(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].T.contiguous()


def whole_numbers(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].to(torch.int8)


def biased(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(256)


def infinite(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantized, "is already quantized"),
        (incomplete, r"model\.layers\.1\.input_layernorm\.weight: is missing"),
        (transposed, r"down_proj\.weight: has shape \[512, 256\], expected \[256, 512\] from config.json"),
        (whole_numbers, r"down_proj\.weight: is I8, expected BF16 or F16 or F32 or F64"),
        (biased, r"q_proj\.bias: is no tensor of this model"),
        (infinite, r"model\.layers\.1\.mlp\.down_proj: holds 1 values that are not finite"),
    ],
)
def test_a_source_that_cannot_be_quantized_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    source = two_layers(tmp_path / "source", change)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", path=str(source), method="rtn")
    assert not (tmp_path / "out").exists()


def test_the_output_is_asked_for_before_calibration(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_run, "calibration_of", lambda *args: pytest.fail("calibrated first"))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists, expected a path that does not exist"):
        run(tmp_path / "out", path=str(small))
    with pytest.raises(InputError, match="is where the source lies"):
        run(small, path=str(small), overwrite=True)
    assert (small / "model.safetensors").is_file()


def test_a_disk_too_small_for_artifact_and_resume_point_is_said_first(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def free(directory: Path, nbytes: int, where: str, reason: str | None = None) -> None:
        asked.append(nbytes)
        raise MachineError(where, "too small")

    monkeypatch.setattr("quantkit.fs.require_free", free)
    with pytest.raises(MachineError, match="too small"):
        run(tmp_path / "out", path=str(small))
    states = 4 * 64 * spec_for(open_checkpoint(small).config).dims["hidden"].size * 4
    assert asked == [2 * (run(tmp_path / "x", path=str(small), dry_run=True).data["bytes_after"] + states)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "gptx"}, "--method: 'gptx' is unknown"),
        ({"format": "gguf"}, "--format: 'gguf' cannot hold what method awq makes"),
        ({"device": "tpu"}, "--device: is 'tpu'"),
        ({"samples": 100_000}, "calibration text"),
        ({"seq_len": 2000}, "--seq-len: is 2000, expected at most 1024"),
        ({"override": ("down_proj:group_size=32",)}, "holds one bit width and group size"),
        ({"override": ("down_proj:bits=8",)}, "8 bits in the awq format"),
        ({"method": "rtn", "calib": "builtin"}, "--calib: was given, and method rtn uses no calibration"),
        ({"method": "rtn", "samples": 4}, "--samples: was given, and method rtn"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(tmp_path: Path, small: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", path=str(small), **fields)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "override", "reads", "most"), [("rtn", (), 14, 1), ("gptq", (), 14, 3), ("gptq", ("(mlp|q_proj):method=rtn",), 16, 3)]
)
def test_only_the_weights_that_are_worked_on_are_in_memory(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, method: str, override: tuple[str, ...], reads: int, most: int
) -> None:
    """One after the other without statistics; with GPTQ those of one input, q, k and v at most."""
    read, counts, really = list[weakref.ref[torch.Tensor]](), list[int](), Source.weight

    def weight(self: Source, layer: int, role: str) -> torch.Tensor:
        found = really(self, layer, role)
        read.append(weakref.ref(found))
        counts.append(sum(ref() is not None for ref in read))
        return found

    monkeypatch.setattr(Source, "weight", weight)
    run(tmp_path / "out", path=str(small), method=method, override=override)
    assert verify(tmp_path / "out", deep=True).defects == []
    assert (len(counts), max(counts)) == (reads, most)
