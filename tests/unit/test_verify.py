"""verify: one test per defect, over artifacts that are sound but for it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_fixtures import MODELS, two_layers
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands import quantize
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.commands.verify import VerifyOptions, run
from quantkit.errors import InputError
from quantkit.shard import shard_checkpoint
from quantkit.verify import Verification, verify

DOWN, NORM = "model.layers.1.mlp.down_proj", "model.layers.0.input_layernorm.weight"
Tensors = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = two_layers(tmp_path_factory.mktemp("qwen2") / "source", name="qwen2")
    out = tmp_path_factory.mktemp("artifact") / "out"
    quantize.run(QuantizeOptions(str(source), out, method="rtn", group_size=64, override=("layers.0.*down:keep",)))
    return out


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("symmetric") / "out"
    source = two_layers(tmp_path_factory.mktemp("llama") / "source")
    quantize.run(QuantizeOptions(str(source), out, method="rtn", group_size=128, sym=True, max_shard_size=300_000))
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, artifact: Path) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    shard_checkpoint(open_checkpoint(artifact), out, 3, overwrite=False)
    return out


def seal(root: Path) -> Path:
    """Write SHA256SUMS anew, so that only what the bytes mean is wrong."""
    (root / "SHA256SUMS").unlink(missing_ok=True)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(root.iterdir())]
    (root / "SHA256SUMS").write_text("".join(lines))
    return root


def copy(source: Path, root: Path) -> Path:
    return Path(shutil.copytree(source, root / "copy"))


def with_tensors(source: Path, root: Path, change: Callable[[Tensors], None], file: str = "model.safetensors") -> Path:
    out = copy(source, root)
    tensors = load_file(out / file)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / file, metadata={"format": "pt"})
    return seal(out)


def with_json(source: Path, root: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    out = copy(source, root)
    data = json.loads((out / name).read_text())
    change(data)
    (out / name).write_text(json.dumps(data))
    return seal(out)


def lines(found: Verification) -> list[str]:
    return [f"{defect.check}: {defect.line}" for defect in found.defects]


@pytest.mark.parametrize("name", ["artifact", "symmetric", "shards"])
def test_what_is_sound_passes(request: pytest.FixtureRequest, name: str) -> None:
    root = request.getfixturevalue(name)
    report = run(VerifyOptions(str(root), deep=True))
    assert report.failed is None and report.warnings == () and report.data["ok"] is True
    assert {row[1] for row in report.tables[0].rows} == {"ok"}
    checks = {check["check"] for check in report.data["checks"]}
    assert checks == (
        {"hashes", "parent", "ranks", "values"} if name == "shards" else {"headers", "hashes", "tensors", "config", "manifest", "values"}
    )
    unpacked = {"artifact": 13, "symmetric": 14, "shards": 3 * 13}[name]
    looked_at = {check["check"]: check["looked_at"] for check in report.data["checks"]}
    # A rank may own nothing of a linear, so shards may hold fewer.
    assert int(looked_at["values"].split()[0]) == unpacked or name == "shards"
    json.dumps(report.data)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_a_checkpoint_without_sums_passes_with_a_warning(name: str) -> None:
    report = run(VerifyOptions(str(MODELS / name), deep=True))
    assert report.failed is None
    assert report.warnings == ("no SHA256SUMS: nothing says what the bytes of this checkpoint should be",)


def test_the_shallow_check_needs_no_torch(artifact: Path, shards: Path) -> None:
    code = (
        "import sys\nfrom quantkit.verify import verify\n"
        f"assert not verify({str(artifact)!r}, deep=False).defects\nassert not verify({str(shards)!r}, deep=False).defects\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


def changed_byte(out: Path) -> None:
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (changed_byte, "hashes: model.safetensors: was changed: its sha256 is"),
        (lambda out: (out / "tokenizer.json").unlink(), "hashes: tokenizer.json: is missing, expected a file of sha256"),
        (lambda out: (out / "modeling.py").write_text(""), "hashes: modeling.py: is not in SHA256SUMS"),
        (lambda out: (out / "chat_template.jinja").write_text(""), "hashes: chat_template.jinja: is not in SHA256SUMS"),
        (lambda out: (out / "SHA256SUMS").unlink(), "hashes: SHA256SUMS: is missing"),
    ],
)
def test_bytes_that_are_not_those_that_were_written(artifact: Path, tmp_path: Path, damage: Callable[[Path], Any], expected: str) -> None:
    out = copy(artifact, tmp_path)
    damage(out)
    found = verify(out, deep=False)
    assert len(found.defects) == 1 and lines(found)[0].startswith(expected)
    assert run(VerifyOptions(str(out))).failed == found.defects[0].line


def test_a_readme_beside_the_artifact_does_no_harm(artifact: Path, tmp_path: Path) -> None:
    out = copy(artifact, tmp_path)
    (out / "README.md").write_text("# mine")
    (out / ".cache").mkdir()
    found = verify(out, deep=False)
    assert not found.defects and len(found.warnings) == 2


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name])

    return change


def add(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop(NORM), f"tensors: {NORM}: is missing, expected BF16 or F16 or F32 or F64 [256]"),
        (drop(f"{DOWN}.qzeros"), f"tensors: {DOWN}.qzeros: is missing, expected I32 [8, 32]"),
        (drop("model.layers.0.self_attn.q_proj.bias"), "tensors: model.layers.0.self_attn.q_proj.bias: is missing"),
        (add("model.layers.9.mlp.x.weight"), "tensors: model.layers.9.mlp.x.weight: is no tensor of this model"),
        (put(NORM, lambda x: x[:-1]), f"tensors: {NORM}: has shape [255], expected [256] from config.json"),
        (
            put(f"{DOWN}.scales", lambda x: x.float()),
            f"manifest: quantkit.json: assignment: {DOWN}: scale_dtype is 'F16', expected 'F32' as in the files",
        ),
        (put(f"{DOWN}.qweight", lambda x: x.T), f"tensors: {DOWN}.qweight: has shape [32, 512], expected [512, 32] from config.json"),
        (put(NORM, lambda x: x.to(torch.int16)), f"tensors: {NORM}: is I16, expected BF16 or F16 or F32 or F64"),
    ],
)
def test_tensors_that_do_not_follow_the_config(artifact: Path, tmp_path: Path, change: Callable[[Tensors], None], expected: str) -> None:
    found = verify(with_tensors(artifact, tmp_path, change), deep=True)
    assert any(line.startswith(expected) for line in lines(found))
    assert {defect.check for defect in found.defects} <= {"tensors", "manifest"}


def test_a_rotary_table_of_an_old_checkpoint_is_let_be(tmp_path: Path) -> None:
    out = copy(MODELS / "llama", tmp_path)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    save_file(tensors, out / "model.safetensors")
    assert not verify(out, deep=True).defects


def layers(count: int) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(num_hidden_layers=count, layer_types=["full_attention"] * count)


def config(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["quantization_config"].update(changes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (config(group_size=128), f"tensors: {DOWN}.scales: has shape [8, 256], expected [4, 256] from config.json"),
        (config(group_size=96), "tensors: model.layers.0.self_attn.q_proj: 256 input features do not divide into groups of 96"),
        (
            config(modules_to_not_convert=None),
            "config: model.layers.0.mlp.down_proj: is not packed, and the config does not leave it out",
        ),
        (config(modules_to_not_convert=["down_proj"]), f"config: {DOWN}: is packed, and the config leaves it out"),
        (config(modules_to_not_convert=[3]), "config: config.json: quantization_config.modules_to_not_convert: is [3]"),
        (config(zero_point=False), "config: config.json: quantization_config.zero_point: is not true"),
        (layers(3), "tensors: model.layers.2.input_layernorm.weight: is missing"),
        (layers(1), "tensors: model.layers.1.input_layernorm.weight: is no tensor of this model"),
        (lambda data: data.update(tie_word_embeddings=False), "tensors: lm_head.weight: is missing"),
        (lambda data: data.update(hidden_size=128), "tensors: model.embed_tokens.weight: has shape [1024, 256], expected [1024, 128]"),
    ],
)
def test_a_config_that_does_not_follow_the_files(
    artifact: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    found = verify(with_json(artifact, tmp_path, "config.json", change), deep=True)
    assert any(line.startswith(expected) for line in lines(found)), lines(found)


def test_a_quantization_config_over_floats_is_a_defect(tmp_path: Path) -> None:
    quant = {"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": ["model"]}
    out = copy(MODELS / "llama", tmp_path)
    data = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**data, "quantization_config": quant}))
    assert lines(verify(out, deep=False)) == [
        "config: config.json: quantization_config: is there, and no linear is quantized, expected packed linears"
    ]


def assignment(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["assignment"][name].update(changes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data.update(schema=9), "manifest: quantkit.json: schema: is 9, expected 1"),
        (lambda data: data.pop("assignment"), "manifest: quantkit.json: assignment: is missing or malformed"),
        (lambda data: data.update(assignment=[1]), "manifest: quantkit.json: assignment: is missing or malformed"),
        (assignment(DOWN, group_size=32), f"manifest: quantkit.json: assignment: {DOWN}: group_size is 32, expected 64 as in the files"),
        (
            assignment(DOWN, layout="plain"),
            f"manifest: quantkit.json: assignment: {DOWN}: layout is 'plain', expected 'awq' as in the files",
        ),
        (lambda data: data["assignment"].pop(DOWN), f"manifest: quantkit.json: assignment: lacks '{DOWN}'"),
        (lambda data: data["assignment"].update(other=data["assignment"][DOWN]), "manifest: quantkit.json: assignment: has 'other'"),
        (lambda data: data["totals"].update(bytes_after=1), "manifest: quantkit.json: totals.bytes_after: is 1"),
        (lambda data: data["totals"].update(quantized_weights=1), "manifest: quantkit.json: totals.quantized_weights: is 1"),
        (lambda data: data["totals"].update(quantized_bytes="x"), "manifest: quantkit.json: totals.quantized_bytes: is 'x'"),
    ],
)
def test_a_manifest_that_does_not_follow_the_files(
    artifact: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    found = verify(with_json(artifact, tmp_path, "quantkit.json", change), deep=False)
    assert len(found.defects) == 1 and lines(found)[0].startswith(expected)


def scale_of(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{DOWN}.scales"][1, 2] = value

    return change


def words(name: str, word: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].fill_(word)

    return change


def nothing_left(tensors: Tensors) -> None:
    tensors[f"{DOWN}.qweight"].fill_(0x33333333)
    tensors[f"{DOWN}.qzeros"].fill_(0x33333333)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (scale_of(float("nan")), f"values: {DOWN}.scales: 1 scales are not finite, expected finite scales"),
        (scale_of(float("inf")), f"values: {DOWN}.scales: 1 scales are not finite"),
        (scale_of(0.0), f"values: {DOWN}.scales: 1 scales are not positive"),
        (scale_of(-0.5), f"values: {DOWN}.scales: 1 scales are not positive"),
        (scale_of(65504.0), f"values: {DOWN}.scales: 1 scales are 65504, the last float16"),
        (words(f"{DOWN}.qweight", 0x11111111), f"values: {DOWN}: every code is 1, expected codes that differ"),
        (nothing_left, f"values: {DOWN}: every weight is zero"),
        (put(NORM, lambda x: x * float("nan")), f"values: {NORM}: 256 values are not finite"),
        (put("model.embed_tokens.weight", lambda x: x * float("inf")), "values: model.embed_tokens.weight: "),
        (
            put("model.layers.0.self_attn.q_proj.bias", lambda x: x * float("nan")),
            "values: model.layers.0.self_attn.q_proj.bias: 256 values",
        ),
    ],
)
def test_values_that_cannot_be_meant(artifact: Path, tmp_path: Path, change: Callable[[Tensors], None], expected: str) -> None:
    out = with_tensors(artifact, tmp_path, change)
    assert not verify(out, deep=False).defects
    found = verify(out, deep=True)
    assert found.defects and all(line.startswith(expected) or line.endswith("expected finite values") for line in lines(found)), lines(
        found
    )
    assert lines(found)[0].startswith(expected)


def test_what_is_odd_and_may_be_meant_is_a_warning(artifact: Path, tmp_path: Path) -> None:
    def odd(tensors: Tensors) -> None:
        tensors[f"{DOWN}.qweight"][:64] = 0x22222222
        tensors[f"{DOWN}.scales"][1, :3] = 1e-5
        tensors["model.layers.0.mlp.down_proj.weight"].zero_()

    found = verify(with_tensors(artifact, tmp_path, odd), deep=True)
    assert not found.defects
    assert found.warnings == [
        f"{DOWN}: 256 of 2048 groups hold one code only",
        f"{DOWN}: 3 scales are subnormal float16, which loses precision",
        "model.layers.0.mlp.down_proj.weight: every value is zero",
    ]


def test_symmetric_means_that_every_zero_is_eight(symmetric: Path, tmp_path: Path) -> None:
    file = next(path.name for path in sorted(symmetric.glob("*.safetensors")) if f"{DOWN}.qzeros" in load_file(path))

    def off(tensors: Tensors) -> None:
        tensors[f"{DOWN}.qzeros"][0, 0] = 0x77777777

    found = verify(with_tensors(symmetric, tmp_path, off, file), deep=True)
    assert lines(found) == [f"values: {DOWN}.qzeros: 8 zero points are not 8, expected 8 everywhere: the manifest says symmetric"]


def test_words_that_do_not_pack_again_are_a_defect(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No AWQ word can fail this, whatever its bits: the check is of the codec, so the codec is what is broken here."""
    from quantkit.layouts import awq

    monkeypatch.setattr(awq, "NIBBLE_OF_ELEMENT", (0, 4, 1, 5, 2, 6, 3, 3))
    found = verify(artifact, deep=True)
    assert any(line.endswith("does not pack again to the same bytes, expected bytes of the layout") for line in lines(found))


def test_siblings_that_runtimes_fuse_are_named(tmp_path: Path) -> None:
    source = two_layers(tmp_path / "source")
    quantize.run(QuantizeOptions(str(source), tmp_path / "out", method="rtn", override=("up_proj:keep",)))
    found = verify(tmp_path / "out", deep=False)
    assert not found.defects
    assert found.warnings == [
        "block 0: some of gate_proj/up_proj are quantized and some are not; vLLM and SGLang fuse them and refuse that"
    ]


def index_name(data: dict[str, Any], name: str) -> None:
    data["weight_map"][NORM] = name


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "absent.safetensors"])
def test_a_hostile_or_broken_index_is_an_input_error(symmetric: Path, tmp_path: Path, name: str) -> None:
    out = with_json(symmetric, tmp_path, "model.safetensors.index.json", lambda data: index_name(data, name))
    with pytest.raises(InputError) as caught:
        run(VerifyOptions(str(out)))
    assert caught.value.exit_code == 2 and "\n" not in caught.value.line


def test_a_truncated_file_is_an_input_error(symmetric: Path, tmp_path: Path) -> None:
    out = copy(symmetric, tmp_path)
    file = next(out.glob("model-00002-*"))
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(InputError, match="it is truncated"):
        run(VerifyOptions(str(out)))


@pytest.mark.parametrize("line", ["x\n", f"{'0' * 64}  ../config.json\n", f"{'0' * 64}  a/b\n"])
def test_hostile_sums_are_an_input_error(artifact: Path, tmp_path: Path, line: str) -> None:
    out = copy(artifact, tmp_path)
    (out / "SHA256SUMS").write_text(line)
    with pytest.raises(InputError, match="SHA256SUMS"):
        run(VerifyOptions(str(out)))


def test_a_link_that_leaves_is_an_input_error(artifact: Path, tmp_path: Path) -> None:
    out = copy(artifact, tmp_path)
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="is a link that leaves the directory"):
        run(VerifyOptions(str(out)))


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("quantkit.json", "[]"), ("config.json", '{"model_type": "bert"}')])
def test_json_that_cannot_be_used_is_an_input_error(artifact: Path, tmp_path: Path, name: str, text: str) -> None:
    out = copy(artifact, tmp_path)
    (out / name).write_text(text)
    with pytest.raises(InputError):
        run(VerifyOptions(str(out)))


def test_no_such_model_is_an_input_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError):
            run(VerifyOptions(str(path)))


def test_a_changed_rank_is_found_by_its_hash(shards: Path, tmp_path: Path) -> None:
    out = copy(shards, tmp_path)
    data = bytearray((out / "rank-1-of-3.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "rank-1-of-3.safetensors").write_bytes(data)
    assert [line[:45] for line in lines(verify(out, deep=False))] == ["hashes: rank-1-of-3.safetensors: was changed:"]


@pytest.mark.parametrize("damage", ["absent", "swapped", "shape"])
def test_a_rank_that_is_not_of_the_plan(shards: Path, tmp_path: Path, damage: str) -> None:
    out = copy(shards, tmp_path)
    file = out / "rank-1-of-3.safetensors"
    if damage == "absent":
        file.unlink()
    elif damage == "swapped":
        shutil.copy(out / "rank-2-of-3.safetensors", file)
    else:
        tensors = load_file(file)
        tensors[f"{DOWN}.scales"] = tensors[f"{DOWN}.scales"][:, :-8].contiguous()
        save_file(tensors, file)
    found = verify(seal(out), deep=True)
    assert [defect.check for defect in found.defects] == ["ranks"]
    assert "rank-1-of-3.safetensors" in found.defects[0].where


def test_the_parents_hash_is_compared_with_the_copy_of_its_sums(shards: Path, tmp_path: Path) -> None:
    out = copy(shards, tmp_path)
    recorded = json.loads((out / "quantkit.json").read_text())["parent"]["sha256"]
    assert verify(out, deep=False).checks["parent"] == f"sha256 {recorded}"
    sums = out / "parent.SHA256SUMS"
    sums.write_text(sums.read_text().replace("0", "1"))
    found = verify(seal(out), deep=False)
    assert lines(found) == [f"parent: {sums}: was changed, expected sha256 {recorded} as in quantkit.json"]
    sums.unlink()
    found = verify(out, deep=False)
    assert [defect.check for defect in found.defects] == ["hashes", "parent"] and "parent.SHA256SUMS" in found.defects[1].line
    assert found.checks["ranks"] and run(VerifyOptions(str(out))).failed


def test_values_of_a_rank_are_looked_at(shards: Path, tmp_path: Path) -> None:
    from quantkit.formats.safetensors import read_header

    out = copy(shards, tmp_path)
    file = out / "rank-2-of-3.safetensors"
    header = read_header(file)
    entry = header.entries[f"{DOWN}.scales"]
    data = bytearray(file.read_bytes())
    data[header.data_start + entry.begin : header.data_start + entry.begin + 2] = b"\x00\x7e"  # a float16 NaN
    file.write_bytes(data)
    found = verify(seal(out), deep=True)
    assert lines(found) == [f"values: rank-2-of-3.safetensors: {DOWN}.scales: 1 scales are not finite, expected finite scales"]


def test_a_shard_directory_that_names_files_outside_is_an_input_error(shards: Path, tmp_path: Path) -> None:
    def escape(data: dict[str, Any]) -> None:
        data["parent"]["weights"] = dict.fromkeys(data["parent"]["weights"], "../../etc/passwd")

    with pytest.raises(InputError, match="file name"):
        run(VerifyOptions(str(with_json(shards, tmp_path, "quantkit.json", escape))))


def test_many_defects_are_counted_and_the_first_are_shown(artifact: Path, tmp_path: Path) -> None:
    def gut(tensors: Tensors) -> None:
        for name in [name for name in tensors if "mlp" in name]:
            del tensors[name]

    report = run(VerifyOptions(str(with_tensors(artifact, tmp_path, gut))))
    assert report.failed is not None and "more)" in report.failed
    assert len(report.data["defects"]) >= 12 and len(report.tables[1].rows) == min(len(report.data["defects"]), 50)
