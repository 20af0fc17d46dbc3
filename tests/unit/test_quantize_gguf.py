"""``quantize --method gguf`` and ``convert --to gguf``: bytes against the encoder, options, refusals, ends that came early."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_export_fixtures import config_of as family_config
from gguf_export_fixtures import values_of as family_values
from gguf_fixtures import gguf_values, write_gguf
from numpy.typing import NDArray
from quantize_fixtures import MODELS, two_layers
from safetensors.torch import load_file, save_file

from quantkit import gguf_file
from quantkit.checkpoint.gguf_writer import GgufWriter
from quantkit.commands import quantize_gguf
from quantkit.commands.convert import ConvertOptions
from quantkit.commands.convert import run as convert
from quantkit.commands.quantize import run
from quantkit.commands.quantize_gguf import GgufChoices
from quantkit.commands.quantize_options import QuantizeOptions
from quantkit.errors import InputError, MachineError
from quantkit.formats.gguf import GgufFile, read_gguf
from quantkit.formats.imatrix import Imatrix, ImatrixEntry, encode_dat, encode_gguf
from quantkit.ops.ggml.encode import encode
from quantkit.report import Report

FLOATS = ("F32", "F16", "BF16")
HEAD = "token_embd.weight"
"""Of the tiny model, which is tied."""


def made(source: Path, out: Path, kind: str | None = "q4_k_m", *, choices: Mapping[str, Any] | None = None, **options: Any) -> Report:
    chosen = GgufChoices(type=kind, **(choices or {}))
    return run(QuantizeOptions(path=str(source), out=out, method="gguf", device="cpu", gguf=chosen, **options))


def blocks_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """Tensor -> its type and bytes, of a file or a split model."""
    file = read_gguf(path)
    held = {part: part.read_bytes() for part in file.paths}
    return {t.name: (t.type, held[t.file][t.offset : t.offset + t.nbytes]) for t in file.tensors.values()}


def as_type(values: NDArray[np.float32], kind: str, importance: NDArray[np.float32] | None = None) -> bytes:
    """What a tensor of ``values`` is in a file; torch rounds the floats."""
    if kind in FLOATS:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        return torch.from_numpy(values.copy()).to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    return encode(np.ascontiguousarray(values), kind, importance).tobytes()


def values_of(root: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of a float checkpoint by GGUF name, rows in GGUF's order."""
    dense = {name: value.float().numpy() for name, value in load_file(root / "model.safetensors").items()}
    return gguf_values(json.loads((root / "config.json").read_text()), dense)


def assert_encoded(path: Path, values: Mapping[str, NDArray[np.float32]]) -> None:
    found = blocks_of(path)
    assert found.keys() == values.keys()
    for name, (kind, data) in found.items():
        assert data == as_type(values[name], kind), (name, kind)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_layers(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def q8(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    out = tmp_path_factory.mktemp("q8") / "model.gguf"
    made(small, out, "q8_0")
    return out


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """A refusal leaves the directory as it was."""
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before


# from floats


@pytest.mark.parametrize("kind", ["q2_k", "q3_k_m", "q4_k_m", "q6_k", "q8_0", "q4_0", "iq4_xs"])
def test_every_tensor_is_what_the_encoder_makes_of_it(tmp_path: Path, small: Path, kind: str) -> None:
    done = made(small, tmp_path / "out.gguf", kind)
    assert_encoded(tmp_path / "out.gguf", values_of(small))
    file = read_gguf(tmp_path / "out.gguf")
    assert {t.type for t in file.tensors.values() if t.name.endswith("norm.weight")} == {"F32"}
    assert done.data["types"] == dict(Counter(t.type for t in file.tensors.values()))
    assert done.data["bytes_after"] == sum(t.nbytes for t in file.tensors.values())
    assert done.data["weights"] == sum(np.prod(t.shape) for t in file.tensors.values())
    assert done.data["type"] == kind.upper() and file.metadata["general.quantization_version"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["q4_k_s", "f32", "f16", "bf16"])
def test_floats_of_every_dtype(tmp_path: Path, stored: torch.dtype, kind: str) -> None:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, value in tensors.items():
            noise = torch.randn(value.shape, generator=generator) * 1e-4
            tensors[name] = (value.float() + noise).to(stored)

    source = two_layers(tmp_path / "model", change)
    done = made(source, tmp_path / "out.gguf", kind)
    assert_encoded(tmp_path / "out.gguf", values_of(source))
    matrices = {t.type for t in read_gguf(tmp_path / "out.gguf").tensors.values() if len(t.shape) > 1}
    assert matrices == {kind.upper()} if kind != "q4_k_s" else matrices == {"Q4_K", "Q5_K", "Q6_K"}
    assert done.data["bytes_before"] == sum(v.nbytes for v in load_file(source / "model.safetensors").values())


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    source = two_layers(tmp_path / "model", name=family)
    made(source, tmp_path / "out.gguf")
    assert_encoded(tmp_path / "out.gguf", values_of(source))


def test_a_head_of_its_own(tmp_path: Path) -> None:
    def untied(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["tie_word_embeddings"] = False
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()

    source = two_layers(tmp_path / "model", untied)
    made(source, tmp_path / "out.gguf", "q4_k_s")
    assert_encoded(tmp_path / "out.gguf", values_of(source))
    types = {name: kind for name, (kind, _) in blocks_of(tmp_path / "out.gguf").items()}
    assert (types[HEAD], types["output.weight"]) == ("Q4_K", "Q6_K")
    made(source, tmp_path / "left.gguf", "q4_k_s", choices={"leave_output_tensor": True})
    assert blocks_of(tmp_path / "left.gguf")["output.weight"][0] == "BF16"
    made(source, tmp_path / "named.gguf", "q4_k_s", choices={"output_tensor_type": "q8_0", "token_embedding_type": "q3_k"})
    types = {name: kind for name, (kind, _) in blocks_of(tmp_path / "named.gguf").items()}
    assert (types[HEAD], types["output.weight"]) == ("Q3_K", "Q8_0")


def test_rows_that_no_type_divides_get_another_and_are_told(tmp_path: Path) -> None:
    config = {**family_config("llama"), "hidden_size": 96, "intermediate_size": 512, "vocab_size": 1024}
    source = random_model(tmp_path / "model", config)
    done = made(source, tmp_path / "out.gguf")
    types = {name: kind for name, (kind, _) in blocks_of(tmp_path / "out.gguf").items()}
    assert types["blk.0.attn_q.weight"] == "Q5_0" and types["blk.0.ffn_gate.weight"] == "Q5_0"
    assert types["blk.0.ffn_down.weight"] in ("Q4_K", "Q6_K")
    count = sum(kind in ("Q5_0", "Q8_0") for name, kind in types.items() if name != "output.weight")  # which its rule makes Q8_0
    assert done.data["fallbacks"] == count > 0
    assert any(f"{count} tensors have rows that their type does not divide" in warning for warning in done.warnings)
    assert_encoded(tmp_path / "out.gguf", values_of(source))


def random_model(root: Path, config: Mapping[str, Any]) -> Path:
    """A random model with the tiny model's tokenizer."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.from_numpy(value) for name, value in family_values(config).items()}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "llama" / file, root / file)
    return root


# experts


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    config = {**family_config("qwen3-moe"), **sizes, "vocab_size": 1024, "head_dim": 64}
    return random_model(tmp_path_factory.mktemp("moe") / "model", config)


def stacked(root: Path, layer: int, role: str) -> NDArray[np.float32]:
    held = load_file(root / "model.safetensors")
    return np.stack([held[f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"].numpy() for expert in range(3)])


def test_experts_lie_in_one_tensor_and_each_has_its_own_importance(tmp_path: Path, experts: Path) -> None:
    rng = np.random.default_rng(0)
    counts = np.array([5, 0, 2], np.float32)
    sums = (rng.random((3, 256)) * counts[:, None]).astype(np.float32)
    write_imatrix(tmp_path / "i.gguf", {"blk.1.ffn_gate_exps.weight": ImatrixEntry(sums, counts)})
    done = made(experts, tmp_path / "out.gguf", "q4_k_s", choices={"imatrix": tmp_path / "i.gguf"})
    assert done.data["imatrix"] == {"entries": 1, "used": 1}
    found = blocks_of(tmp_path / "out.gguf")
    importance = [sums[0] / 5, np.ones(256, np.float32), sums[2] / 2]
    kind, data = found["blk.1.ffn_gate_exps.weight"]
    values = stacked(experts, 1, "gate")
    assert data == b"".join(as_type(values[expert], kind, importance[expert]) for expert in range(3))
    assert data != b"".join(as_type(values[expert], kind) for expert in range(3))
    kind, data = found["blk.0.ffn_down_exps.weight"]
    assert data == b"".join(as_type(values, kind) for values in stacked(experts, 0, "down"))
    file = read_gguf(tmp_path / "out.gguf")
    assert file.tensors["blk.0.ffn_gate_inp.weight"].type == "F32"
    assert file.metadata["qwen3moe.expert_count"] == 3


# importance matrices


def write_imatrix(path: Path, entries: Mapping[str, ImatrixEntry]) -> Path:
    held = Imatrix(entries, ("text.txt",), 4, 512)
    path.write_bytes(encode_dat(held) if path.suffix == ".dat" else encode_gguf(held))
    return path


def entry(columns: int, seed: int = 0) -> ImatrixEntry:
    return ImatrixEntry((np.random.default_rng(seed).random((1, columns)) * 8).astype(np.float32), np.array([8], np.float32))


@pytest.mark.parametrize("name", ["i.gguf", "i.dat"])
def test_importance_weighs_the_columns_of_the_tensor_that_it_is_for(tmp_path: Path, small: Path, name: str) -> None:
    entries = {"blk.0.attn_q.weight": entry(256), "blk.1.ffn_down.weight": entry(512, 1)}
    path = write_imatrix(tmp_path / name, entries)
    done = made(small, tmp_path / "out.gguf", choices={"imatrix": path})
    values = values_of(small)
    for tensor, (kind, data) in blocks_of(tmp_path / "out.gguf").items():
        importance = entries[tensor].importance()[0] if tensor in entries else None
        assert data == as_type(values[tensor], kind, importance), tensor
    assert done.data["imatrix"] == {"entries": 2, "used": 2}
    assert any("no entry for 12 quantized tensors" in warning for warning in done.warnings)
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["quantize.imatrix.file"] == name and metadata["quantize.imatrix.dataset"] == "text.txt"
    assert metadata["quantize.imatrix.entries_count"] == 2 and metadata["quantize.imatrix.chunks_count"] == 4


def test_an_importance_matrix_of_another_model_is_refused(tmp_path: Path, small: Path) -> None:
    path = write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": entry(128)})
    with pytest.raises(InputError, match=r"i\.gguf: has 128 values for blk\.0\.attn_q\.weight, expected 256: 1 x 256 columns"):
        made(small, tmp_path / "out.gguf", choices={"imatrix": path})
    path = write_imatrix(tmp_path / "j.gguf", {"blk.7.attn_q.weight": entry(256)})
    with pytest.raises(InputError, match=r"j\.gguf"):
        made(small, tmp_path / "out.gguf", choices={"imatrix": path})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.gguf", "j.gguf"]


def test_q2_k_s_wants_importance(tmp_path: Path, small: Path, nothing_left: None) -> None:
    with pytest.raises(InputError, match="which need an importance matrix"):
        made(small, tmp_path / "out.gguf", "q2_k_s")


# from quantized checkpoints


@pytest.mark.parametrize(("method", "form"), [("rtn", "awq"), ("rtn", "gptq"), ("nf4", None), ("int8", None)])
def test_an_artifact_is_dequantized_and_encoded(tmp_path: Path, small: Path, method: str, form: str | None) -> None:
    sym = True if form == "gptq" else None
    run(QuantizeOptions(path=str(small), out=tmp_path / "art", method=method, format=form, sym=sym, device="cpu"))
    convert(ConvertOptions(str(tmp_path / "art"), tmp_path / "dense", dtype="float32"))
    done = made(tmp_path / "art", tmp_path / "out.gguf", "q5_k_m")
    assert_encoded(tmp_path / "out.gguf", values_of(tmp_path / "dense"))
    stored = sum(value.nbytes for value in load_file(tmp_path / "art" / "model.safetensors").values())
    assert done.data["bytes_before"] == stored


def test_a_quantized_file_is_quantized_again_on_request_only(tmp_path: Path, q8: Path) -> None:
    with pytest.raises(InputError, match=r"is Q8_0 already, and would become Q") as caught:
        made(q8, tmp_path / "out.gguf")
    assert caught.value.hint is not None and "--allow-requantize" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    done = made(q8, tmp_path / "out.gguf", choices={"allow_requantize": True})
    assert any("were quantized already and lose twice" in warning for warning in done.warnings)
    made(q8, tmp_path / "dense.gguf", "f32")
    dense = {name: np.frombuffer(data, "<f4").copy() for name, (_, data) in blocks_of(tmp_path / "dense.gguf").items()}
    shapes = {t.name: t.shape for t in read_gguf(q8).tensors.values()}
    assert_encoded(tmp_path / "out.gguf", {name: value.reshape(shapes[name]) for name, value in dense.items()})


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_a_quantized_file_as_floats(tmp_path: Path, q8: Path, kind: str) -> None:
    done = made(q8, tmp_path / "out.gguf", kind)
    reference = gguf.GGUFReader(q8)
    for tensor in reference.tensors:
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found, data = blocks_of(tmp_path / "out.gguf")[tensor.name]
        assert found == (kind.upper() if dense.ndim > 1 else "F32")
        assert data == as_type(np.ascontiguousarray(dense, np.float32), found)
    assert done.data["requantized"] == 0


def test_a_file_of_the_same_type_is_copied(tmp_path: Path, q8: Path) -> None:
    made(q8, tmp_path / "out.gguf", "q8_0")
    assert (tmp_path / "out.gguf").read_bytes() == q8.read_bytes()
    convert(ConvertOptions(str(q8), tmp_path / "same.gguf", to="gguf"))
    assert (tmp_path / "same.gguf").read_bytes() == q8.read_bytes()


def test_a_split_file_is_copied_into_one(tmp_path: Path, q8: Path) -> None:
    convert(ConvertOptions(str(q8), tmp_path / "cut.gguf", to="gguf", max_shard_size=400_000))
    parts = sorted(tmp_path.glob("cut-*.gguf"))
    assert len(parts) > 2
    convert(ConvertOptions(str(parts[0]), tmp_path / "whole.gguf", to="gguf"))
    assert (tmp_path / "whole.gguf").read_bytes() == q8.read_bytes()


def test_a_foreign_file_is_copied_without_a_change(tmp_path: Path) -> None:
    """Of an architecture that quantkit does not know, with types that it cannot encode, and keys that it never writes."""
    rng = np.random.default_rng(0)
    tensors = {
        "token_embd.weight": rng.standard_normal((8, 256)).astype(np.float32),
        "blk.0.odd.weight": ("IQ2_XXS", rng.integers(0, 255, (4, 66), np.uint8)),
        "blk.0.table": rng.integers(0, 9, 5, np.int32),
    }
    path = write_gguf(tmp_path / "in.gguf", "strange", {"strange.list": [1, 2], "general.name": "x", "strange.flag": True}, tensors)
    convert(ConvertOptions(str(path), tmp_path / "out.gguf", to="gguf"))
    before, after = read_gguf(path), read_gguf(tmp_path / "out.gguf")
    assert blocks_of(tmp_path / "out.gguf") == blocks_of(path)
    kept = {key: value for key, value in after.values().items() if key in before.values()}
    assert {key: (v.kind, v.element) for key, v in kept.items()} == {key: (v.kind, v.element) for key, v in before.values().items()}
    assert all(np.array_equal(after.metadata[key], before.metadata[key]) for key in before.metadata)


def test_a_directory_of_blocks_is_copied_back(tmp_path: Path, small: Path) -> None:
    made(small, tmp_path / "first.gguf")
    convert(ConvertOptions(str(tmp_path / "first.gguf"), tmp_path / "blocks", to="blocks"))
    for out in (tmp_path / "quantized.gguf", tmp_path / "converted.gguf"):
        if out.stem == "quantized":
            made(tmp_path / "blocks", out)
        else:
            convert(ConvertOptions(str(tmp_path / "blocks"), out, to="gguf"))
        assert blocks_of(out) == blocks_of(tmp_path / "first.gguf")
    with pytest.raises(InputError, match="is Q4_K already"):
        made(tmp_path / "blocks", tmp_path / "out.gguf", "q5_0")


# options


def test_pure_is_one_type(tmp_path: Path, small: Path) -> None:
    made(small, tmp_path / "out.gguf", choices={"pure": True})
    assert {t.type for t in read_gguf(tmp_path / "out.gguf").tensors.values() if len(t.shape) > 1} == {"Q4_K"}


def test_types_by_pattern_the_first_wins(tmp_path: Path, small: Path) -> None:
    made(small, tmp_path / "out.gguf", "q4_k_s", choices={"tensor_type": (r"blk\.0\.ffn_down=q8_0", "ffn_down=q3_k")})
    types = {name: kind for name, (kind, _) in blocks_of(tmp_path / "out.gguf").items()}
    assert (types["blk.0.ffn_down.weight"], types["blk.1.ffn_down.weight"]) == ("Q8_0", "Q3_K")
    assert_encoded(tmp_path / "out.gguf", values_of(small))


def test_the_type_is_q4_k_m_unless_something_else_is_said(tmp_path: Path, small: Path) -> None:
    made(small, tmp_path / "a.gguf", None)
    made(small, tmp_path / "b.gguf", "Q4_K_M")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert read_gguf(tmp_path / "a.gguf").metadata["general.file_type"] == 15


def test_a_pre_tokenizer_is_taken_at_its_word(tmp_path: Path, small: Path) -> None:
    made(small, tmp_path / "out.gguf", choices={"pre_tokenizer": "smollm"})
    assert read_gguf(tmp_path / "out.gguf").metadata["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize(
    ("called", "written"), [("Phi-3-mini", "Phi 3-mini"), ("my-phi3", "my-phi 3"), ("phi-4", "phi-4"), ("sophie", "sophie")]
)
def test_a_name_that_llama_cpp_fails_on_is_spelled_otherwise(tmp_path: Path, small: Path, called: str, written: str) -> None:
    shutil.copytree(small, tmp_path / called)
    made(tmp_path / called, tmp_path / "out.gguf")
    assert read_gguf(tmp_path / "out.gguf").metadata["general.name"] == written


@pytest.mark.parametrize("limit", [None, 300_000])
@pytest.mark.parametrize("kind", ["q4_k_m", "bf16"])
def test_a_dry_run_says_the_exact_sizes_and_writes_nothing(tmp_path: Path, small: Path, kind: str, limit: int | None) -> None:
    path = write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": entry(256)})
    choices = {"imatrix": path} if kind == "q4_k_m" else {}
    said = made(small, tmp_path / "out.gguf", kind, choices=choices, dry_run=True, max_shard_size=limit)
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]
    done = made(small, tmp_path / "out.gguf", kind, choices=choices, max_shard_size=limit)
    written = [{"name": path.name, "bytes": path.stat().st_size} for path in sorted(tmp_path.glob("out*.gguf"))]
    assert said.data["files"] == done.data["files"] == written
    assert (len(written) > 1) == (limit is not None)
    same = ("bytes_after", "bits_per_weight", "types", "weights", "bytes_before", "imatrix", "warnings")
    assert {key: said.data[key] for key in same} == {key: done.data[key] for key in same}
    types = {name: kind for name, (kind, _) in blocks_of(tmp_path / written[0]["name"]).items()}
    assert {name: item["type"] for name, item in said.data["tensors"].items()} == types


def test_a_split_model_has_the_same_tensors(tmp_path: Path, small: Path) -> None:
    made(small, tmp_path / "whole.gguf")
    made(small, tmp_path / "cut.gguf", max_shard_size=300_000)
    parts = sorted(tmp_path.glob("cut*"))
    assert [path.name for path in parts] == [f"cut-{n:05d}-of-{len(parts):05d}.gguf" for n in range(1, len(parts) + 1)]
    assert blocks_of(parts[0]) == blocks_of(tmp_path / "whole.gguf")


@pytest.mark.parametrize("threads", [1, 8])
def test_threads_and_slabs_do_not_change_a_byte(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    made(small, tmp_path / "usual.gguf")
    monkeypatch.setattr(quantize_gguf, "cores", lambda: threads)
    monkeypatch.setattr(gguf_file, "SLAB_ELEMENTS", 7 * 256)
    made(small, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "usual.gguf").read_bytes()


def test_experts_in_slabs(tmp_path: Path, experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(experts, tmp_path / "usual.gguf")
    monkeypatch.setattr(gguf_file, "SLAB_ELEMENTS", 100 * 256)  # 256 rows of an expert are no whole slabs
    made(experts, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "usual.gguf").read_bytes()


# ending early


@pytest.mark.parametrize("at", [0, 19])
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    made(small, tmp_path / "whole.gguf")
    write, count = GgufWriter.write, 0

    def ending(self: GgufWriter, name: str, chunks: Any) -> None:
        nonlocal count
        count += 1
        if count > at:
            raise KeyboardInterrupt
        write(self, name, chunks)

    monkeypatch.setattr(GgufWriter, "write", ending)
    with pytest.raises(KeyboardInterrupt):
        made(small, tmp_path / "out.gguf")
    monkeypatch.setattr(GgufWriter, "write", write)
    assert not (tmp_path / "out.gguf").exists()
    with pytest.raises(InputError, match="an unfinished run left it") as caught:
        made(small, tmp_path / "out.gguf")
    assert caught.value.hint is not None and "--resume" in caught.value.hint
    with pytest.raises(InputError, match="when the work began and is"):
        made(small, tmp_path / "out.gguf", "q5_k_m", resume=True)
    done = made(small, tmp_path / "out.gguf", resume=True)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert done.data["resumed_tensors"] <= at and (at < 19 or done.data["resumed_tensors"] > 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_resume_refuses_another_source_or_importance(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": entry(256)})
    monkeypatch.setattr(GgufWriter, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made(small, tmp_path / "out.gguf", choices={"imatrix": path})
    write_imatrix(path, {"blk.0.attn_q.weight": entry(256, 9)})
    with pytest.raises(InputError, match="imatrix: was"):
        made(small, tmp_path / "out.gguf", choices={"imatrix": path}, resume=True)
    other = two_layers(tmp_path / "other", lambda config, tensors: tensors["model.norm.weight"].mul_(2))
    write_imatrix(path, {"blk.0.attn_q.weight": entry(256)})
    with pytest.raises(InputError, match="source: was"):
        made(other, tmp_path / "out.gguf", choices={"imatrix": path}, resume=True)


def test_a_file_that_is_there_is_replaced_on_request_only(tmp_path: Path, small: Path) -> None:
    made(small, tmp_path / "out.gguf", "q8_0")
    before = (tmp_path / "out.gguf").read_bytes()
    for options in ({}, {"resume": True}):
        with pytest.raises(InputError, match="exists"):
            made(small, tmp_path / "out.gguf", **options)
    assert (tmp_path / "out.gguf").read_bytes() == before
    made(small, tmp_path / "out.gguf", overwrite=True)
    assert read_gguf(tmp_path / "out.gguf").metadata["general.file_type"] == 15
    (tmp_path / "notes.gguf").write_text("my notes")
    with pytest.raises(InputError, match="cannot be overwritten: it is no GGUF file"):
        made(small, tmp_path / "notes.gguf", overwrite=True)
    with pytest.raises(InputError, match="is where the source lies"):
        made(tmp_path / "out.gguf", tmp_path / "out.gguf", "q4_k_m", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.gguf", "out.gguf"]


# refusals


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("q4_k_m", {"bits": 4}, "--bits: was given, and method gguf has no such setting"),
        ("q4_k_m", {"group_size": 32}, "--group-size: was given"),
        ("q4_k_m", {"sym": False}, "--sym/--asym: was given"),
        ("q4_k_m", {"format": "awq"}, "--format: was given"),
        ("q4_k_m", {"recipe": Path("awq-w4-g64")}, "--recipe: was given"),
        ("q4_k_m", {"override": ("down:keep",)}, "--override: was given"),
        ("q4_k_m", {"option": ("a=1",)}, "--option: was given"),
        ("q4_k_m", {"inputs": "float"}, "--inputs: was given"),
        ("q4_k_m", {"calib": "self"}, "--calib: was given"),
        ("q4_k_m", {"samples": 4}, "--samples: was given"),
        ("q4_k_m", {"seq_len": 4}, "--seq-len: was given"),
        ("q4_k_m", {"devices": 2}, "--devices: was given"),
        ("q4_k_m", {"compute_dtype": "float16"}, "--compute-dtype: was given"),
        ("q4_k_m", {"offload": True}, "--offload: was given"),
        ("q4_k_m", {"max_shard_size": 0}, "--max-shard-size: is 0"),
        ("q4_k_m", {"max_shard_size": -5}, "--max-shard-size: is -5"),
        ("q9_z", {}, "--type 'q9_z': is not known, expected one of f32, f16"),
    ],
)
def test_what_a_file_has_no_use_for_is_refused(
    tmp_path: Path, small: Path, nothing_left: None, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        made(small, tmp_path / "out.gguf", kind, **options)
    assert message in caught.value.line


@pytest.mark.parametrize(
    ("kind", "choices", "message"),
    [
        ("q4_k_m", {"tensor_type": ("ffn_down",)}, "--tensor-type 'ffn_down': is no pair"),
        ("q4_k_m", {"tensor_type": ("ffn_down=q9",)}, "'q9': is not known"),
        ("q4_k_m", {"tensor_type": ("(=q8_0",)}, "is not a regular expression"),
        ("q4_k_m", {"tensor_type": ("nowhere=q8_0",)}, "matches no tensor"),
        ("f16", {"tensor_type": ("ffn_down=q8_0",)}, "has one type for all tensors"),
        ("f16", {"pure": True}, "--pure: was given with type f16"),
        ("q4_k_m", {"leave_output_tensor": True}, "the model has no output.weight"),
        ("q4_k_m", {"output_tensor_type": "q9"}, "'q9': is not known"),
        ("q4_k_m", {"token_embedding_type": "q9"}, "'q9': is not known"),
        ("q4_k_m", {"pre_tokenizer": "no such thing"}, "no such thing"),
        ("q4_k_m", {"imatrix": Path("nowhere.gguf")}, "nowhere.gguf"),
        ("f16", {"imatrix": MODELS / "llama" / "config.json"}, "config.json"),
    ],
)
def test_choices_that_cannot_be(tmp_path: Path, small: Path, nothing_left: None, kind: str, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        made(small, tmp_path / "out.gguf", kind, choices=choices)
    assert message in caught.value.line


@pytest.mark.parametrize("name", ["out", "out.bin", "out.GGUF", ".gguf"])
def test_the_file_is_called_gguf(tmp_path: Path, small: Path, nothing_left: None, name: str) -> None:
    for dry in (False, True):
        with pytest.raises(InputError, match=r"OUT: is .*, expected the name of a \.gguf file"):
            made(small, tmp_path / name, dry_run=dry)
    with pytest.raises(InputError, match=r"expected the name of a \.gguf file"):
        convert(ConvertOptions(str(small), tmp_path / name, to="gguf"))


def test_gguf_stands_alone_and_its_options_are_its_own(tmp_path: Path, small: Path, nothing_left: None) -> None:
    with pytest.raises(InputError, match="gguf alone"):
        run(QuantizeOptions(path=str(small), out=tmp_path / "out", method="gguf,rtn"))
    given = GgufChoices("q6_k", Path("i"), True, ("a=q8_0",), "q8_0", "q8_0", True, True, "gpt-2")
    for name in GgufChoices.__dataclass_fields__:
        choices = replace(GgufChoices(), **{name: getattr(given, name)})
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: was given with method rtn, expected method gguf"):
            run(QuantizeOptions(path=str(small), out=tmp_path / "out", method="rtn", gguf=choices))


def test_a_gguf_source_has_its_own_pre_tokenizer(tmp_path: Path, q8: Path, nothing_left: None) -> None:
    with pytest.raises(InputError, match="--pre-tokenizer: was given, and the source is a GGUF file"):
        made(q8, tmp_path / "out.gguf", "f16", choices={"pre_tokenizer": "gpt-2"})


@pytest.mark.parametrize(("device", "error"), [("tpu", InputError), ("cuda", MachineError)])
def test_devices_that_are_not_there(
    tmp_path: Path, small: Path, nothing_left: None, monkeypatch: pytest.MonkeyPatch, device: str, error: type[Exception]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match="--device"):
        run(QuantizeOptions(path=str(small), out=tmp_path / "out.gguf", method="gguf", device=device))


def test_a_gpu_without_its_kernels_is_told_before_anything_is_written(
    tmp_path: Path, small: Path, nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(MachineError, match="kernels"):
        run(QuantizeOptions(path=str(small), out=tmp_path / "out.gguf", method="gguf", device="cuda"))


# values that cannot be


def spoiled(root: Path, name: str, row: int, value: float) -> Path:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].float()
        tensors[name][row, 3] = value

    return two_layers(root, change)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("q4_k_m", float("nan"), "row 201 is not finite"),
        ("q8_0", float("-inf"), "row 201 is not finite"),
        ("q6_k", 1e9, "the scale of a block of row 201 does not fit in float16"),
        ("f16", -70000.0, "holds -70000 in row 201, which float16 cannot"),
    ],
)
def test_a_value_that_cannot_be_stored_is_named_by_tensor_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, value: float, message: str
) -> None:
    monkeypatch.setattr(gguf_file, "SLAB_ELEMENTS", 64 * 512)
    source = spoiled(tmp_path / "model", "model.layers.1.mlp.down_proj.weight", 201, value)
    with pytest.raises(InputError) as caught:
        made(source, tmp_path / "out.gguf", kind)
    assert caught.value.where.startswith("blk.1.ffn_down.weight")
    assert message in caught.value.line
    assert not (tmp_path / "out.gguf").exists()


def test_float16_names_the_value_of_the_row_that_it_names(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].float()
        tensors[name][7, 0], tensors[name][9, 1] = 70000.0, 1e30

    with pytest.raises(InputError, match="holds 70000 in row 7"):
        made(two_layers(tmp_path / "model", change), tmp_path / "out.gguf", "f16")


def test_what_is_not_a_number_stays_so_in_floats(tmp_path: Path) -> None:
    source = spoiled(tmp_path / "model", "model.layers.1.mlp.down_proj.weight", 4, float("nan"))
    for kind, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        made(source, tmp_path / f"{kind}.gguf", kind)
        stored = torch.frombuffer(bytearray(blocks_of(tmp_path / f"{kind}.gguf")["blk.1.ffn_down.weight"][1]), dtype=dtype)
        assert stored.view(256, 512).isnan().nonzero().tolist() == [[4, 3]]


# odd files


def odd_file(path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> GgufFile:
    return read_gguf(write_gguf(path, "llama", keys, tensors))


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    odd_file(tmp_path / "vocabulary.gguf", {"llama.block_count": 1}, {})
    for work in (
        lambda: convert(ConvertOptions(str(tmp_path / "vocabulary.gguf"), tmp_path / "out.gguf", to="gguf")),
        lambda: made(tmp_path / "vocabulary.gguf", tmp_path / "out.gguf"),
    ):
        with pytest.raises(InputError, match="has no tensors"):
            work()
    assert [path.name for path in tmp_path.iterdir()] == ["vocabulary.gguf"]


@pytest.mark.parametrize("value", ["many", -4, 1.5])
def test_sizes_that_are_no_sizes_are_refused(tmp_path: Path, value: Any) -> None:
    tensors = {"blk.0.ffn_up.weight": np.ones((4, 256), np.float32)}
    keys = {"llama.block_count": value} if value != -4 else {"llama.block_count": [-4]}
    odd_file(tmp_path / "in.gguf", keys, tensors)
    with pytest.raises(InputError, match=r"llama\.block_count"):
        made(tmp_path / "in.gguf", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_an_importance_matrix_is_no_model(tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": entry(256)})
    with pytest.raises(InputError, match=r"general\.architecture: is missing"):
        made(path, tmp_path / "out.gguf")


# convert --to gguf


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32"), (None, "BF16")])
def test_convert_to_floats(tmp_path: Path, small: Path, dtype: str | None, kind: str) -> None:
    done = convert(ConvertOptions(str(small), tmp_path / "out.gguf", to="gguf", dtype=dtype))
    assert_encoded(tmp_path / "out.gguf", values_of(small))
    file = read_gguf(tmp_path / "out.gguf")
    assert {t.type for t in file.tensors.values() if len(t.shape) > 1} == {kind}
    assert file.metadata["general.file_type"] == {"BF16": 32, "F16": 1, "F32": 0}[kind]
    assert done.command == "convert"
    exact = kind != "F16"  # the source is in bfloat16
    assert done.data["exact"] is exact and dict(done.facts)["values"].startswith("exact" if exact else "lossy: rounded are ")


def test_convert_goes_on_by_itself(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ConvertOptions(str(small), tmp_path / "out.gguf", to="gguf", dtype="float16")
    publish: Callable[[GgufWriter], Any] = GgufWriter.publish
    monkeypatch.setattr(GgufWriter, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(options)
    monkeypatch.setattr(GgufWriter, "publish", publish)
    assert convert(options).data["resumed_tensors"] == 20
    assert_encoded(tmp_path / "out.gguf", values_of(small))
