"""Every method through the command, on two layers of a trained model: what is written, read back, verified, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_fixtures import MODELS, two_layers
from safetensors.torch import load_file, save_file

from quantkit.arch.table import spec_for
from quantkit.checkpoint.artifact import ArtifactWriter
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands.quantize import run
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.errors import InputError
from quantkit.layouts.registry import UnpackingLinear
from quantkit.model.load import load_block, load_decoder
from quantkit.report import Report
from quantkit.scheme import KEEP
from quantkit.verify import expected_tensors, verify

CALIBRATED = frozenset({"awq", "gptq", "w8a8"})
QUICK = {"samples": 6, "seq_len": 64}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_layers(tmp_path_factory.mktemp("small") / "model")


def quantized(source: Path, out: Path, method: str, **options: Any) -> Report:
    calibration = QUICK if any(name in CALIBRATED for name in method.split(",")) else {}
    return run(QuantizeOptions(path=str(source), out=out, method=method, device="cpu", **{**calibration, **options}))


def sums(path: Path) -> str:
    return (path / "SHA256SUMS").read_text()


def weight_error(source: Path, artifact: Path, role: str = "down") -> float:
    """How far the weight that the artifact multiplies by is from the source's, relative, without what AWQ folds."""
    spec = spec_for(open_checkpoint(source).config)
    blocks = [load_block(open_checkpoint(path), spec, 0, dtype=torch.float32, parity=True) for path in (source, artifact)]
    want, got = (block.linears[role].op.weight() for block in blocks)
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("method", "options", "bound"),
    [
        ("rtn", {}, 0.15),
        ("rtn", {"bits": 8}, 0.02),
        ("rtn", {"bits": 3, "sym": True}, 0.4),
        ("rtn", {"bits": 2, "group_size": 32}, 0.5),
        ("rtn", {"format": "compressed-tensors", "bits": 8, "group_size": -1, "sym": True}, 0.02),
        ("gptq", {"group_size": 64}, 0.25),
        ("gptq", {"format": "gptq_v2", "sym": False}, 0.25),
        ("gptq", {"option": ("order=act",), "group_size": 64}, 0.25),
        ("gptq", {"format": "compressed-tensors", "inputs": "float"}, 0.25),
        ("gptq", {"format": "awq", "sym": False}, 0.25),
        ("nf4", {}, 0.12),
        ("nf4", {"option": ("double_quant=false",)}, 0.12),
        ("fp4", {}, 0.2),
        ("int8", {}, 0.02),
        ("fp8", {}, 0.05),
        ("fp8", {"format": "fp8"}, 0.05),
        ("w8a8", {"option": ("alpha=0",), "samples": None, "seq_len": None}, 0.02),
    ],
)
def test_every_method_writes_an_artifact_that_verifies_and_is_close(
    tmp_path: Path, small: Path, method: str, options: dict[str, Any], bound: float
) -> None:
    done = quantized(small, tmp_path / "out", method, **options)
    found = verify(tmp_path / "out", deep=True)
    assert found.defects == [] and found.unpacked == 14
    assert 0 < weight_error(small, tmp_path / "out") < bound
    manifest = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert manifest["totals"]["bytes_after"] == found.tensor_bytes
    assert done.data["tensors"] == 14


def test_an_artifact_of_a_smoothed_model_computes_what_the_model_does(tmp_path: Path, small: Path) -> None:
    quantized(small, tmp_path / "out", "w8a8")
    tokens = torch.arange(5, 45)
    from quantkit.model.decoder import Batch

    batch = Batch(torch.arange(40), (40,), None)
    logits = []
    for path in (small, tmp_path / "out"):
        decoder = load_decoder(open_checkpoint(path), dtype=torch.float32)
        logits.append(decoder.logits(decoder.forward(tokens, batch)))
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.02
    manifest = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert manifest["blocks"]["0"]["q"]["smoothed"] > 1


def test_gptq_sees_what_was_lost_before_it_unless_it_is_told_otherwise(tmp_path: Path, small: Path) -> None:
    for inputs in ("quantized", "float"):
        done = quantized(small, tmp_path / inputs, "gptq", inputs=inputs, bits=3)
        assert ("as quantized so far" in done.data["inputs"]) == (inputs == "quantized")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("quantized", "float"))
    same = "model.layers.0.self_attn.q_proj.qweight"
    other = "model.layers.1.mlp.down_proj.qweight"
    assert torch.equal(first[same], second[same]), "nothing lies before the first linears"
    assert not torch.equal(first[other], second[other])


def test_several_methods_in_one_run_are_those_methods_alone(tmp_path: Path, small: Path) -> None:
    done = quantized(small, tmp_path / "all", "awq,gptq,nf4")
    assert set(done.data["artifacts"]) == {"awq", "gptq", "nf4"}
    for method in ("awq", "gptq", "nf4"):
        quantized(small, tmp_path / method, method)
        assert sums(tmp_path / "all" / method) == sums(tmp_path / method)


def test_activations_in_a_file_give_the_same_bytes(tmp_path: Path, small: Path) -> None:
    for offload in (False, True):
        quantized(small, tmp_path / str(offload), "gptq", offload=offload)
    assert sums(tmp_path / "True") == sums(tmp_path / "False")
    assert not list(tmp_path.rglob("*.scratch"))


@pytest.mark.parametrize("method", ["gptq", "awq,gptq"])
@pytest.mark.parametrize("upstream", [False, True])
def test_a_run_that_was_ended_goes_on_with_the_saved_activations(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, method: str, upstream: bool
) -> None:
    options = {"option": (f"gptq.upstream={str(upstream).lower()}",)}
    quantized(small, tmp_path / "whole", method, **options)
    commit, count = ArtifactWriter.commit, 0

    def ending(self: ArtifactWriter, unit: str, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        commit(self, unit, *args, **kwargs)

    monkeypatch.setattr(ArtifactWriter, "commit", ending)
    with pytest.raises(KeyboardInterrupt):
        quantized(small, tmp_path / "ended", method, **options)
    monkeypatch.setattr(ArtifactWriter, "commit", commit)
    quantized(small, tmp_path / "ended", method, resume=True, **options)
    for artifact in (tmp_path / "whole").rglob("SHA256SUMS") if "," in method else [tmp_path / "whole" / "SHA256SUMS"]:
        assert artifact.read_text() == (tmp_path / "ended" / artifact.relative_to(tmp_path / "whole")).read_text()


def test_mixed_precision_by_rules_is_what_the_config_says(tmp_path: Path, small: Path) -> None:
    quantized(small, tmp_path / "out", "gptq", override=("down_proj:bits=8", "layers.1.self_attn.[qkv]_proj:keep"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bits"] == 4 and {"bits": 8, "group_size": 128, "sym": True, "desc_act": False} in config["dynamic"].values()
    assert any(key.startswith("-:") for key in config["dynamic"])
    assert verify(tmp_path / "out", deep=True).defects == []
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.qweight"].shape == (512 * 8 // 32, 256)
    assert "model.layers.1.self_attn.q_proj.weight" in tensors


def test_a_tied_head_is_untied_when_it_is_quantized(tmp_path: Path, small: Path) -> None:
    quantized(small, tmp_path / "out", "rtn", format="compressed-tensors", override=("lm_head:bits=8",))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head" not in config["quantization_config"]["ignore"]
    assert verify(tmp_path / "out", deep=True).defects == []
    decoder = load_decoder(open_checkpoint(tmp_path / "out"), dtype=torch.float32)
    assert isinstance(decoder.head.op, UnpackingLinear)
    embedding = decoder.embedding.weight
    assert float((decoder.head.op.weight() - embedding).norm() / embedding.norm()) < 0.02


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-MoE with one expert that no token is ever sent to."""
    root = tmp_path_factory.mktemp("experts") / "model"
    root.mkdir()
    config = {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 256,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
        "tie_word_embeddings": True,
    }
    (root / "config.json").write_text(json.dumps(config))
    spec, generator = spec_for(config), torch.Generator().manual_seed(0)
    tensors = {}
    for name, want in expected_tensors(spec, dict.fromkeys([*spec.all_linears(), "lm_head"], KEEP)).items():
        if want.shape is not None and not want.optional:
            tensors[name] = torch.randn(want.shape, generator=generator) * 0.1
    for name, value in tensors.items():
        if "norm.weight" in name:
            value.fill_(1)
        if name.endswith("mlp.gate.weight"):
            value[3] = 0
            value[:3] = value[:3].abs()  # at least two of the three are above the fourth's 0, or below it together
    tensors["model.layers.1.mlp.gate.weight"][3] = -1000 * tensors["model.layers.1.mlp.gate.weight"][:3].mean(0)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "llama" / file, root / file)
    return root


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_experts_are_quantized_routers_are_not_and_starved_ones_are_told(tmp_path: Path, experts: Path, method: str) -> None:
    done = quantized(experts, tmp_path / "out", method, group_size=32)
    assert verify(tmp_path / "out", deep=True).defects == []
    before, after = load_file(experts / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"):
        assert after[name].shape == before[name].shape
        assert torch.equal(after[name], before[name]) == (method == "gptq"), "AWQ folds its scale into what reads the norm"
    assert "model.layers.1.mlp.experts.3.down_proj.qweight" in after
    coverage = done.data["expert_tokens"]["1"]
    assert set(coverage) == {"0", "1", "2", "3"} and 2 * 6 * 64 >= sum(coverage.values()) > 0
    if 0 in coverage.values():
        assert any("too few tokens" in warning for warning in done.warnings)


def test_a_wrong_label_of_the_zero_points_is_found(tmp_path: Path, small: Path) -> None:
    for written, labelled in (("gptq", "gptq_v2"), ("gptq_v2", "gptq")):
        out = tmp_path / written
        quantized(small, out, "gptq", format=written)
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"]["checkpoint_format"] = labelled
        (out / "config.json").write_text(json.dumps(config))
        found = verify(out, deep=True)
        assert any(d.check == "values" and d.where.endswith(".qzeros") for d in found.defects), labelled


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gptq", {"bits": 5}, "5 bits with method gptq"),
        ("awq", {"format": "awq", "bits": 8}, "8 bits in the awq format"),
        ("nf4", {"format": "gptq"}, "'gptq' cannot hold what method nf4 makes"),
        ("nf4", {"sym": False}, "was given with method nf4"),
        ("int8", {"group_size": 64}, "64 with method int8"),
        ("gptq", {"option": ("order=sideways",)}, "order: is 'sideways'"),
        ("gptq", {"option": ("inputs=float", "upstream=true")}, "is true with inputs float"),
        ("awq", {"inputs": "float"}, "awq has no such choice"),
        ("awq,awq", {}, "each once"),
        ("awq", {"override": ("down_proj:method=gptq",)}, "in a model quantized by awq"),
        ("rtn", {"override": ("down_proj:method=magic",)}, "method 'magic' is unknown"),
        ("rtn", {"offload": True}, "has no activations"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, small: Path, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        quantized(small, tmp_path / "out", method, **options)
    assert message in caught.value.line
    assert list(tmp_path.iterdir()) == []
