"""Importance matrices against llama.cpp: its reader on both forms, and the activations of its own graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import pytest
import torch
from decoder_fixtures import MemoryCheckpoint, config_of, random_twin
from gguf_fixtures import config_of as gguf_config_of
from gguf_fixtures import write_gguf, write_model

from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands import quantize_gguf as quantize
from quantkit.commands.quantize_gguf import GgufChoices, GgufOptions
from quantkit.formats.imatrix import Imatrix, ImatrixEntry, encode_dat, encode_gguf, read_imatrix
from quantkit.progress import silent
from quantkit.quantizers.calibration import CalibrationTokens
from quantkit.quantizers.imatrix import captured
from quantkit.quantizers.pipeline import Source

pytestmark = pytest.mark.oracle


class Runs(Protocol):
    def run(self, *arguments: object) -> None: ...


@pytest.fixture
def reference(oracle: Callable[[str, str], Runs]) -> Runs:
    return oracle("llama-cpp", "imatrix_reference.py")


def matrix() -> Imatrix:
    rng = np.random.default_rng(0)
    experts = ImatrixEntry(rng.random((4, 96), np.float32) * 50, np.array([3, 0, 1, 12], np.float32))
    dense = ImatrixEntry(rng.random((1, 64), np.float32) * 1e4, np.array([16], np.float32))
    return Imatrix({"blk.1.ffn_down_exps.weight": experts, "blk.0.attn_q.weight": dense}, ("builtin",), 2, 8)


def loaded(reference: Runs, raw: bytes, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "matrix").write_bytes(raw)
    reference.run("load", tmp_path / "matrix", tmp_path / "loaded.json")
    found: dict[str, Any] = json.loads((tmp_path / "loaded.json").read_text())
    return found


def test_llama_cpp_reads_the_gguf_form(reference: Runs, tmp_path: Path) -> None:
    found = loaded(reference, encode_gguf(matrix()), tmp_path)
    assert found.pop("entries") == {
        name: {"sums": item.sums.ravel().tolist(), "counts": item.counts.tolist()} for name, item in matrix().entries.items()
    }
    assert found == {"datasets": ["builtin"], "chunk_count": 2, "chunk_size": 8, "legacy": False, "has_metadata": True}


def test_llama_cpp_reads_the_dat_form(reference: Runs, tmp_path: Path) -> None:
    found = loaded(reference, encode_dat(matrix()), tmp_path)
    for name, item in matrix().entries.items():
        read = found["entries"][name]
        assert read["counts"] == [2]  # 12 or 16 tokens in chunks of 8
        np.testing.assert_allclose(np.array(read["sums"]) / 2, item.importance().ravel(), rtol=1e-6)
    assert found["datasets"] == ["builtin"] and found["chunk_count"] == 2 and found["legacy"]


def test_llama_cpp_reads_what_was_read_from_an_old_file_and_written_anew(reference: Runs, tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(encode_dat(matrix()))
    found = loaded(reference, encode_gguf(read_imatrix(tmp_path / "old.dat")), tmp_path)
    for name, item in matrix().entries.items():
        read = found["entries"][name]
        np.testing.assert_allclose(np.array(read["sums"]) / read["counts"], item.importance().ravel(), rtol=1e-6)
    assert found["has_metadata"]


def experts_model(path: Path, config: dict[str, Any], twin: MemoryCheckpoint) -> Path:
    """A qwen3moe as llama.cpp reads it."""
    spec, values = spec_for(config), {name: value.numpy() for name, value in twin.values.items()}
    tensors = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    found = {name: values[hf] for name, hf in tensors.items()}
    for layer in range(spec.layers):
        for norm in spec.norms.values():
            found[f"blk.{layer}.{norm.gguf}.weight"] = values[f"{spec.tensor(layer, norm.name)}.weight"]
        stacks: dict[str, list[Any]] = {}
        for role, module in spec.block_linears(layer).items():
            stacks.setdefault(f"blk.{layer}.{spec.linears[role].gguf}.weight", []).append(values[f"{module}.weight"])
        found |= {name: np.stack(parts) if "_exps" in name else parts[0] for name, parts in stacks.items()}
    facts = {
        "block_count": spec.layers,
        "context_length": 64,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": 500.0,
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    keys = {f"qwen3moe.{key}": value for key, value in facts.items()} | {"tokenizer.ggml.model": "none"}
    return write_gguf(path, "qwen3moe", keys, found)


def compared(checkpoint: Any, model: Path, vocab: int, reference: Runs, tmp_path: Path, tolerance: float = 1e-4) -> None:
    tokens = torch.randint(0, vocab, (4, 40), generator=torch.Generator().manual_seed(2))
    source = Source(checkpoint, spec_for(checkpoint.config), "F16", torch.float32, ("cpu",))
    output = not source.spec.tied
    ours = captured(source, CalibrationTokens(tokens, "x"), output=output, offload=lambda hidden: hidden, progress=silent)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    reference.run("capture", model, tmp_path / "tokens.json", tmp_path / "theirs.npz")
    theirs = np.load(tmp_path / "theirs.npz")
    assert {f"{name}.{part}" for name in ours.entries for part in ("in_sum2", "counts")} == set(theirs.files)
    for name, item in ours.entries.items():
        np.testing.assert_array_equal(item.counts, theirs[f"{name}.counts"], err_msg=name)
        np.testing.assert_allclose(item.sums, theirs[f"{name}.in_sum2"], rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "gemma3"])
def test_the_sums_are_those_of_the_graphs_of_llama_cpp(family: str, reference: Runs, tmp_path: Path) -> None:
    config = gguf_config_of(family, **({"head_dim": 8} if family == "qwen2" else {}))  # where no other is known
    arch = "gemma3" if family == "gemma3" else config["model_type"]
    keys = {"tokenizer.ggml.model": "none", f"{arch}.vocab_size": config["vocab_size"]}
    model = write_model(tmp_path / "model.gguf", config, keys=keys)
    tolerance = 1e-3 if family == "gemma3" else 1e-4  # ggml looks GELU up in a table of float16
    compared(open_checkpoint(model), model, config["vocab_size"], reference, tmp_path, tolerance)


def test_the_sums_of_experts_are_those_of_the_graphs_of_llama_cpp(reference: Runs, tmp_path: Path) -> None:
    config = config_of("qwen3-moe")
    _, twin = random_twin(config, torch.float32)
    compared(twin, experts_model(tmp_path / "model.gguf", config, twin), config["vocab_size"], reference, tmp_path)


@pytest.mark.parametrize("form", [encode_gguf, encode_dat])
@pytest.mark.parametrize("file_type", ["q4_k_m", "q2_k_s", "iq4_xs", "q5_0"])
def test_a_file_quantized_with_a_matrix_is_that_of_llama_cpp(
    file_type: str, form: Callable[[Imatrix], bytes], reference: Runs, tmp_path: Path
) -> None:
    config = gguf_config_of("llama", hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=3, vocab_size=64)
    model, path = write_model(tmp_path / "model.gguf", config), tmp_path / "matrix"
    source = Source(open_checkpoint(model), spec_for(open_checkpoint(model).config), "F16", torch.float32, ("cpu",))
    tokens = CalibrationTokens(torch.arange(64).repeat(3).reshape(4, 48), "x")
    path.write_bytes(form(captured(source, tokens, output=False, offload=lambda hidden: hidden, progress=silent)))
    weighed = as_llama_cpp(model, path, file_type, reference, tmp_path)
    if file_type == "q4_k_m":
        quantize.run(GgufOptions(str(model), tmp_path / "plain.gguf", file_type))
        plain = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "plain.gguf").tensors}
        assert any(not np.array_equal(plain[name], data) for name, data in weighed.items())


def test_experts_quantized_with_a_matrix_are_those_of_llama_cpp(reference: Runs, tmp_path: Path) -> None:
    config = {**config_of("qwen3-moe"), "hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 12}
    _, twin = random_twin(config, torch.float32)
    model, path = experts_model(tmp_path / "model.gguf", config, twin), tmp_path / "matrix"
    source: Any = Source(twin, spec_for(config), "F16", torch.float32, ("cpu",))  # type: ignore[arg-type]
    tokens = CalibrationTokens(torch.tensor([[3, 5]]), "x")
    found = captured(source, tokens, output=True, offload=lambda hidden: hidden, progress=silent)
    counts = found.entries["blk.0.ffn_down_exps.weight"].counts
    assert (counts == 0).any() and (counts > 0).any()
    path.write_bytes(encode_gguf(found))
    as_llama_cpp(model, path, "q4_k_m", reference, tmp_path)


def as_llama_cpp(model: Path, matrix: Path, file_type: str, reference: Runs, tmp_path: Path) -> dict[str, Any]:
    """The data of ``model`` quantized with ``matrix``, the same from both programs, by name."""
    reference.run("quantize", matrix, model, tmp_path / "theirs.gguf", file_type)
    quantize.run(GgufOptions(str(model), tmp_path / "ours.gguf", file_type, GgufChoices(type=file_type, imatrix=matrix)))
    ours, theirs = ({t.name: t for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        np.testing.assert_array_equal(ours[name].data, tensor.data, err_msg=name)
    return {name: tensor.data for name, tensor in ours.items()}
