"""shard and unshard: the bytes of every rank, the way back, and what a damaged or foreign directory ends in."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

import quantkit.shard as shard_module
from quantkit import fs
from quantkit.arch.table import spec_for
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import CheckFailed, InputError, MachineError
from quantkit.geometry import geometry_of
from quantkit.plan import ParallelPlan, rank_memory
from quantkit.quant_config import assignment_from_config
from quantkit.scheme import LinearScheme
from quantkit.shard import open_rank, rank_file, shard_checkpoint, unshard

MODELS = Path(__file__).parent.parent / "data" / "models"
DEMO = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}
TINY = {**DEMO, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def synthetic(root: Path, config: dict[str, Any], group: int | None, *, files: int = 1, sums: bool = True) -> Path:
    """A checkpoint of random bits in the shapes of ``config``: AWQ with ``group``, or plain; in one weight file or several."""
    config = dict(config)
    if group is not None:
        config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    spec, rng = spec_for(config), np.random.default_rng(1)
    tensors: dict[str, NDArray[Any]] = {}

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        kind = {"I32": np.int32, "F16": np.float16, "BF16": np.float16}[dtype]
        raw = rng.integers(0, 256, int(np.prod(shape)) * np.dtype(kind).itemsize, dtype=np.uint8)
        tensors[name] = raw.view(kind).reshape(shape)

    hidden = spec.dims["hidden"].size
    add("model.embed_tokens.weight", "F16", (spec.dims["vocab"].size, hidden))
    for layer in range(spec.layers):
        for norm in spec.norms.values():
            add(spec.tensor(layer, norm.name) + ".weight", "F16", (spec.head_dim if norm.width == "head" else hidden,))
        for role, path in spec.block_linears(layer).items():
            n, k = spec.linear_shape(role)
            layout = "plain" if group is None else "awq"
            geometry = geometry_of(LinearScheme(layout, layout, 4, group or -1), n, k, dtype="F16", bias=bool(spec.linears[role].bias))
            for part in geometry.parts:
                add(f"{path}.{part.suffix}", part.dtype, geometry.shape(part))
    add("model.norm.weight", "F16", (hidden,))
    if not spec.tied:
        add("lm_head.weight", "F16", (spec.dims["vocab"].size, hidden))
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config, indent=1))
    (root / "tokenizer_config.json").write_text('{"kept": "byte for byte"}')
    names = sorted(tensors)
    parts = [names[i::files] for i in range(files)]
    weight_map = {}
    for i, part in enumerate(parts, start=1):
        file = "model.safetensors" if files == 1 else f"model-{i:05}-of-{files:05}.safetensors"
        save_file({name: tensors[name] for name in part}, root / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2))
    if sums:
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(root.iterdir())]
        (root / "SHA256SUMS").write_text("".join(lines))
    return root


LOAD_ORDER = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def cut(source: Path, out: Path, tp: int) -> Path:
    shard_checkpoint(open_checkpoint(source), out, tp, overwrite=False)
    return out


def read_all(path: Path) -> dict[str, NDArray[Any]]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_unshard_restores_the_tiny_models_byte_for_byte(tmp_path: Path, name: str, tp: int) -> None:
    shards = cut(MODELS / name, tmp_path / "shards", tp)
    done = unshard(shards, tmp_path / "back", overwrite=False)
    back = contents(tmp_path / "back")
    assert not done.proven
    assert back.pop("SHA256SUMS")
    assert back == contents(MODELS / name)


@pytest.mark.parametrize(
    ("config", "group", "files", "tp"),
    [
        *[(DEMO, 64, 1, 1), (DEMO, 64, 3, 2), (DEMO, 64, 1, 3), (DEMO, 64, 1, 4), (DEMO, 64, 2, 5), (DEMO, 64, 1, 8), (DEMO, -1, 1, 5)],
        *[(TINY, 128, 1, 2), (TINY, 128, 1, 4), (TINY, 128, 2, 8), (TINY, 64, 1, 5), (TINY, 256, 1, 3), (TINY, None, 2, 7)],
    ],
)
def test_unshard_restores_artifacts_and_their_sums(tmp_path: Path, config: dict[str, Any], group: int | None, files: int, tp: int) -> None:
    source = synthetic(tmp_path / "art", config, group, files=files)
    done = unshard(cut(source, tmp_path / "shards", tp), tmp_path / "back", overwrite=False)
    assert done.proven
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("more", [{"tie_word_embeddings": False}, {"model_type": "qwen2"}, {"model_type": "qwen3", "attention_bias": True}])
def test_heads_biases_and_head_norms_come_back(tmp_path: Path, more: dict[str, Any]) -> None:
    source = synthetic(tmp_path / "art", {**TINY, **more}, 64)
    unshard(cut(source, tmp_path / "shards", 3), tmp_path / "back", overwrite=False)
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("tp", [2, 4, 5, 8])
def test_a_rank_holds_the_slices_that_its_plan_names(tmp_path: Path, tp: int) -> None:
    source = synthetic(tmp_path / "art", {**DEMO, "model_type": "qwen2"}, 64)
    whole, shards = read_all(source), cut(source, tmp_path / "shards", tp)
    for rank in range(tp):
        checkpoint, plan, _ = open_rank(shards, rank)
        q_n, q_k = plan.cut("q", rank)
        o_n, o_k = plan.cut("o", rank)
        name = "model.layers.1.self_attn."
        np.testing.assert_array_equal(
            checkpoint.read(name + "q_proj.qweight"), whole[name + "q_proj.qweight"][:, q_n.start // 8 : q_n.stop // 8]
        )
        np.testing.assert_array_equal(checkpoint.read(name + "q_proj.bias"), whole[name + "q_proj.bias"][q_n.start : q_n.stop])
        assert len(q_k) == 576
        scales = whole[name + "o_proj.scales"][o_k.start // 64 : o_k.stop // 64]
        np.testing.assert_array_equal(checkpoint.read(name + "o_proj.scales"), scales)
        assert len(o_n) == 576
        rows = plan.elements("vocab", rank)
        table = checkpoint.read("model.embed_tokens.weight")
        real = min(rows.stop, 1000) - rows.start
        np.testing.assert_array_equal(table[:real], whole["model.embed_tokens.weight"][rows.start : rows.stop])
        assert table.shape[0] == len(rows)
        assert not table[real:].any()
        np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), whole["model.norm.weight"])


def test_rank_files_are_valid_page_aligned_and_as_large_as_the_plan_says(tmp_path: Path) -> None:
    source = synthetic(tmp_path / "art", {**DEMO, "tie_word_embeddings": False}, 64)
    checkpoint = open_checkpoint(source)
    spec = spec_for(checkpoint.config)
    assignment = assignment_from_config(checkpoint.config, spec.all_linears(), checkpoint.tensors)
    done = shard_checkpoint(checkpoint, tmp_path / "shards", 4, overwrite=False)
    memory = rank_memory(spec, assignment, done.plan, dtype="F16", kv_dtype="F16")
    assert list(done.rank_bytes) == [rank.weights for rank in memory]
    parent = hashlib.sha256((source / "SHA256SUMS").read_bytes()).hexdigest()
    for rank in range(4):
        path = tmp_path / "shards" / rank_file(rank, 4)
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert start % 4096 == 0
        assert path.stat().st_size == start + done.rank_bytes[rank]
        with safe_open(path, "np") as reference:
            assert set(reference.keys()) == set(checkpoint.tensors)
            assert reference.metadata() == {"format": "pt", "rank": f"{rank} of 4", "parent_sha256": parent}
            where = json.loads(path.read_bytes()[8:start])
            ends = [0, *(where[name]["data_offsets"][1] for name in reference.offset_keys())]
            assert [where[name]["data_offsets"][0] for name in reference.offset_keys()] == ends[:-1]
        layer = [f"model.layers.1.{linear}.qweight" for linear in LOAD_ORDER]
        order = ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.qweight", *layer, "model.norm.weight", "lm_head.weight"]
        assert [name for name in where if name in order] == order


def test_a_shard_directory_lists_its_files_and_its_plan(tmp_path: Path) -> None:
    source = synthetic(tmp_path / "art", DEMO, 64)
    shards = cut(source, tmp_path / "shards", 2)
    sums = dict(reversed(line.split("  ")) for line in (shards / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in contents(shards).items() if name != "SHA256SUMS"}
    manifest = json.loads((shards / "quantkit.json").read_text())
    assert manifest["kind"] == "shards"
    assert manifest["parent"]["sums_sha256"] == hashlib.sha256((source / "SHA256SUMS").read_bytes()).hexdigest()
    assert ParallelPlan.from_json(manifest["plan"]).tp == 2
    assert str(tmp_path) not in (shards / "quantkit.json").read_text()
    assert contents(cut(source, tmp_path / "again", 2)) == contents(shards)


def test_chunks_are_bounded_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = synthetic(tmp_path / "art", DEMO, 64)
    whole = contents(cut(source, tmp_path / "shards", 5))
    monkeypatch.setattr(shard_module, "CHUNK_BYTES", 5000)
    assert all((stop - start) * 4 * 72 <= 5000 for start, stop in shard_module._chunks(576, 576 * 4 * 72)), (
        "a chunk is larger than its bound"
    )
    assert contents(cut(source, tmp_path / "small", 5)) == whole
    unshard(tmp_path / "small", tmp_path / "back", overwrite=False)
    assert contents(tmp_path / "back") == contents(source)


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = synthetic(tmp_path / "art", TINY, 64)
    out = cut(source, tmp_path / "shards", 2)
    before = contents(out)
    with pytest.raises(InputError) as caught:
        cut(source, out, 3)
    assert "--overwrite" in (caught.value.hint or "")
    assert contents(out) == before
    bare = synthetic(tmp_path / "bare", TINY, 64, sums=False)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="exists"):
        patch.setattr(fs, "sha256_file", lambda path: pytest.fail(f"reads all of {path}"))
        cut(bare, out, 3)
    shard_checkpoint(open_checkpoint(source), out, 3, overwrite=True)
    assert (out / rank_file(2, 3)).is_file()
    assert not (out / rank_file(1, 2)).exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = synthetic(tmp_path / "art", TINY, 64)

    def full(*_: object) -> None:
        raise MachineError(str(tmp_path), "the disk is full")

    monkeypatch.setattr(shard_module.fs, "write_bytes", full)
    with pytest.raises(MachineError):
        cut(source, tmp_path / "shards", 2)
    assert not [path.name for path in tmp_path.iterdir() if path.name in ("shards", "shards.partial")]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    source = synthetic(tmp_path / "art", {**TINY, "num_hidden_layers": 1}, 64, sums=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(InputError, match=r"model\.layers\.1\..* is missing from the checkpoint"):
        cut(source, tmp_path / "shards", 2)


def test_a_tensor_that_the_architecture_lacks_is_named(tmp_path: Path) -> None:
    source = synthetic(tmp_path / "art", {**TINY, "model_type": "qwen2"}, None, sums=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(InputError, match=r"k_proj\.bias: is not a tensor of this architecture"):
        cut(source, tmp_path / "shards", 2)


def test_shapes_are_compared_with_the_configuration(tmp_path: Path) -> None:
    source = synthetic(tmp_path / "art", TINY, 64, sums=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    with pytest.raises(InputError, match=r"embed_tokens\.weight: is F16 \[1000, 256\], expected F16 \[999, 256\]"):
        cut(source, tmp_path / "shards", 2)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return cut(synthetic(tmp_path / "art", TINY, 64), tmp_path / "shards", 3)


def _edit(shards: Path, change: Any) -> None:
    manifest = json.loads((shards / "quantkit.json").read_text())
    change(manifest)
    (shards / "quantkit.json").write_text(json.dumps(manifest))


def test_a_plan_that_does_not_match_the_files_is_refused(shards: Path) -> None:
    def move(manifest: dict[str, Any]) -> None:
        manifest["plan"]["ranges"]["ffn"] = [[0, 128], [128, 320], [320, 512]]

    _edit(shards, move)
    with pytest.raises(InputError, match=r"rank-0-of-3\.safetensors: .* is not as the plan says"):
        open_rank(shards, 0)


def test_a_plan_of_another_model_is_refused(shards: Path, tmp_path: Path) -> None:
    other = cut(synthetic(tmp_path / "other", DEMO, 64), tmp_path / "other-shards", 3)
    shutil.copy(other / "quantkit.json", shards / "quantkit.json")
    with pytest.raises(InputError, match="is for a model of other dims"):
        open_rank(shards, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("plan", None), ("parent", None), ("parent", {"weights": [], "files": {}}), ("kind", "artifact"), ("plan", {"tp": 3})],
)
def test_a_damaged_manifest_is_refused(shards: Path, key: str, value: Any) -> None:
    _edit(shards, lambda manifest: manifest.update({key: value}))
    with pytest.raises(InputError):
        open_rank(shards, 0)


@pytest.mark.parametrize("name", ["../art/config.json", "/etc/hostname", "..", ""])
def test_names_in_the_manifest_stay_inside_the_directory(shards: Path, tmp_path: Path, name: str) -> None:
    _edit(shards, lambda manifest: manifest["parent"]["files"].update({"config.json": name}))
    with pytest.raises(InputError):
        unshard(shards, tmp_path / "back", overwrite=False)
    _edit(shards, lambda manifest: manifest["parent"].update(files={name: "config.json"}))
    with pytest.raises(InputError):
        unshard(shards, tmp_path / "back", overwrite=False)
    assert not (tmp_path / "back").exists()


def test_missing_truncated_and_foreign_rank_files_are_refused(shards: Path) -> None:
    with pytest.raises(InputError, match="has no rank 3"):
        open_rank(shards, 3)
    file = shards / rank_file(1, 3)
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(InputError):
        open_rank(shards, 1)
    shutil.copy(shards / rank_file(0, 3), file)
    with pytest.raises(InputError, match=r"rank-1-of-3\.safetensors: is the file of rank 0 of 3, expected that of rank 1 of 3$"):
        open_rank(shards, 1)
    file.unlink()
    with pytest.raises(InputError, match="is missing"):
        open_rank(shards, 1)


def rewritten(file: Path, metadata: dict[str, str] | None, pad: int = 0) -> None:
    """``file`` with other metadata, and ``pad`` more spaces behind its header."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    text = json.dumps(({} if metadata is None else {"__metadata__": metadata}) | header).encode()
    text += b" " * (-(8 + len(text)) % 4096 + pad)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def test_rank_files_of_equal_shapes_are_not_mistaken_for_one_another(tmp_path: Path) -> None:
    out = cut(synthetic(tmp_path / "art", {**TINY, "vocab_size": 1024}, 64), tmp_path / "shards", 2)
    one, two = (out / rank_file(rank, 2) for rank in range(2))
    one.rename(tmp_path / "kept")
    two.rename(one)
    (tmp_path / "kept").rename(two)
    for rank, file in enumerate((one, two)):
        with pytest.raises(InputError) as caught:
            open_rank(out, rank)
        assert caught.value.line == f"{file}: is the file of rank {1 - rank} of 2, expected that of rank {rank} of 2"


def test_a_rank_file_of_another_parent_is_refused(tmp_path: Path) -> None:
    shards = [
        cut(synthetic(tmp_path / name, {**TINY, "rms_norm_eps": eps}, 64), tmp_path / f"{name}-2", 2)
        for name, eps in (("a", 1e-5), ("b", 1e-6))
    ]
    hashes = [json.loads((path / "quantkit.json").read_text())["parent"]["sha256"] for path in shards]
    shutil.copy(shards[1] / rank_file(1, 2), shards[0] / rank_file(1, 2))
    open_rank(shards[0], 0)
    with pytest.raises(InputError) as caught:
        open_rank(shards[0], 1)
    file = shards[0] / rank_file(1, 2)
    assert caught.value.line == f"{file}: was cut from a checkpoint of sha256 {hashes[1]}, expected {hashes[0]} as in quantkit.json"
    rewritten(file, {"format": "pt"})
    with pytest.raises(InputError, match=r"does not say whose file it is, expected rank and parent_sha256 in its metadata$"):
        open_rank(shards[0], 1)
    _edit(shards[0], lambda manifest: manifest["parent"].update(sha256=hashes[1]))
    with pytest.raises(InputError, match=rf"parent\.sha256: is '{hashes[1]}', expected {hashes[0]}$"):
        open_rank(shards[0], 0)


def test_data_that_begin_between_pages_are_refused(shards: Path) -> None:
    file = shards / rank_file(0, 3)
    with safe_open(file, "np") as reference:
        metadata = reference.metadata()
    rewritten(file, metadata, pad=8)
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with pytest.raises(InputError) as caught:
        open_rank(shards, 0)
    assert caught.value.line == f"{file}: its data begin at byte {start}, expected a multiple of 4096"


@pytest.mark.parametrize("sums", [True, False])
def test_directories_of_earlier_versions_still_load(tmp_path: Path, sums: bool) -> None:
    """Their rank files do not say whose they are, nor their manifest what the parent's hash is."""
    source = synthetic(tmp_path / "art", TINY, 64, sums=sums)
    shards = cut(source, tmp_path / "shards", 3)
    want = [
        {name: checkpoint.read(name) for name in checkpoint.tensors} for checkpoint, _, _ in (open_rank(shards, rank) for rank in range(3))
    ]
    _edit(shards, lambda manifest: manifest["parent"].pop("sha256"))
    for rank in range(3):
        rewritten(shards / rank_file(rank, 3), {"format": "pt"})
        checkpoint, _, _ = open_rank(shards, rank)
        assert all(checkpoint.read(name).tobytes() == value.tobytes() for name, value in want[rank].items())
    names = sorted(set(contents(shards)) - {"SHA256SUMS"})
    lines = [f"{hashlib.sha256((shards / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (shards / "SHA256SUMS").write_text("".join(lines))
    unshard(shards, tmp_path / "back", overwrite=False)
    back = contents(tmp_path / "back")
    assert {name: back[name] for name in contents(source)} == contents(source)


def test_a_parent_without_sums_has_its_fingerprint_for_a_hash(tmp_path: Path) -> None:
    source = synthetic(tmp_path / "art", TINY, 64, sums=False)
    shards = cut(source, tmp_path / "shards", 2)
    parent = json.loads((shards / "quantkit.json").read_text())["parent"]
    assert (parent["sha256"], parent["sums_sha256"]) == (open_checkpoint(source).fingerprint(), None)
    with safe_open(shards / rank_file(1, 2), "np") as reference:
        assert reference.metadata()["parent_sha256"] == parent["sha256"]
        metadata = reference.metadata()
    unshard(shards, tmp_path / "back", overwrite=False)
    other = "0" * 64
    _edit(shards, lambda manifest: manifest["parent"].update(sha256=other))
    for rank in range(2):
        rewritten(shards / rank_file(rank, 2), {**metadata, "rank": f"{rank} of 2", "parent_sha256": other})
    names = sorted(set(contents(shards)) - {"SHA256SUMS"})
    lines = [f"{hashlib.sha256((shards / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (shards / "SHA256SUMS").write_text("".join(lines))
    with pytest.raises(CheckFailed, match=rf"gives a checkpoint of fingerprint {parent['sha256']}, expected {other}, its parent's"):
        unshard(shards, tmp_path / "forged", overwrite=False)
    assert not (tmp_path / "forged").exists()


def test_one_flipped_bit_is_found_before_anything_is_published(shards: Path, tmp_path: Path) -> None:
    file = shards / rank_file(2, 3)
    data = bytearray(file.read_bytes())
    data[-4096] ^= 1
    file.write_bytes(data)
    with pytest.raises((CheckFailed, InputError)):
        unshard(shards, tmp_path / "back", overwrite=False)
    assert not (tmp_path / "back").exists()


def test_copies_of_a_norm_must_agree(shards: Path, tmp_path: Path) -> None:
    checkpoint, *_ = open_rank(shards, 1)
    ref = checkpoint.tensors["model.norm.weight"]
    data = bytearray(ref.file.read_bytes())
    data[ref.offset] ^= 1
    ref.file.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.norm\.weight: differs between ranks"):
        unshard(shards, tmp_path / "back", overwrite=False)


def test_without_the_parents_sums_the_shards_own_are_checked(tmp_path: Path) -> None:
    shards = cut(MODELS / "llama", tmp_path / "shards", 2)
    file = shards / rank_file(1, 2)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckFailed, match="is not what SHA256SUMS says"):
        unshard(shards, tmp_path / "back", overwrite=False)


@pytest.mark.parametrize("content", [b"", b"0" * 64 + b"  config.json\n"])
def test_parent_sums_that_were_changed_prove_nothing(tmp_path: Path, content: bytes) -> None:
    shards = cut(synthetic(tmp_path / "art", TINY, 32), tmp_path / "shards", 2)
    (shards / "parent.SHA256SUMS").write_bytes(content)
    with pytest.raises(CheckFailed, match=r"parent\.SHA256SUMS: was changed"):
        unshard(shards, tmp_path / "back", overwrite=False)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["config.json", "parent.model.safetensors.header", "rank-1-of-2.safetensors"])
def test_without_the_parents_sums_every_file_is_checked(tmp_path: Path, name: str) -> None:
    shards = cut(synthetic(tmp_path / "art", TINY, None, sums=False), tmp_path / "shards", 2)
    data = (shards / name).read_bytes()
    if name.startswith("rank"):
        changed = data[:-1] + bytes([data[-1] ^ 1])
    elif name == "config.json":
        changed = data + b"\n"
    else:  # a header that says the same in other bytes
        changed = (len(data) - 7).to_bytes(8, "little") + data[8:] + b" "
    (shards / name).write_bytes(changed)
    with pytest.raises(CheckFailed, match="is not what SHA256SUMS says"):
        unshard(shards, tmp_path / "back", overwrite=False)
    assert not (tmp_path / "back").exists()


def test_a_file_of_the_parent_that_its_sums_do_not_list_is_checked_too(tmp_path: Path) -> None:
    source = synthetic(tmp_path / "art", TINY, 32)
    (source / "LICENSE").write_text("as you like")
    shards = cut(source, tmp_path / "shards", 2)
    (shards / "LICENSE").write_text("as I like")
    with pytest.raises(CheckFailed, match="LICENSE: is not what SHA256SUMS says"):
        unshard(shards, tmp_path / "back", overwrite=False)


@pytest.mark.parametrize("name", ["rank-1-of-2.safetensors", "parent.quantkit.json", "parent.model.safetensors.header"])
def test_a_file_of_the_parent_never_takes_the_place_of_one_of_ours(tmp_path: Path, name: str) -> None:
    source = synthetic(tmp_path / "art", TINY, 32)
    (source / "quantkit.json").write_text("{}")
    (source / name).write_bytes(b"mine")
    with (source / "SHA256SUMS").open("a") as sums:
        sums.write(f"{hashlib.sha256(b'mine').hexdigest()}  {name}\n")
    with pytest.raises(InputError, match="has the name of a file that shard writes"):
        cut(source, tmp_path / "shards", 2)
    assert not (tmp_path / "shards").exists()
