"""Checkpoint: slices equal the reference library's, only what is asked for is read, and bad directories are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

import quantkit.checkpoint.reader as reader
from quantkit import fs
from quantkit.checkpoint.reader import open_checkpoint, read_manifest
from quantkit.errors import InputError
from quantkit.formats.index import encode_index

LLAMA = Path(__file__).parent.parent / "data" / "models" / "llama"
INDEX = "model.safetensors.index.json"
TENSORS: dict[str, NDArray[Any]] = {
    "a": np.arange(210, dtype=np.float32).reshape(7, 30),
    "b": np.arange(24, dtype=np.int8).reshape(2, 3, 4),
    "scalar": np.array(5, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float16),
}


def checkpoint_at(root: Path, *, parts: int = 1) -> Path:
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text('{"model_type": "llama"}')
    if parts == 1:
        save_file(TENSORS, root / "model.safetensors")
        return root
    names = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    placed = {tensor: names[place % parts] for place, tensor in enumerate(TENSORS)}
    for name in names:
        save_file({tensor: TENSORS[tensor] for tensor, where in placed.items() if where == name}, root / name)
    (root / INDEX).write_bytes(encode_index(placed, sum(value.nbytes for value in TENSORS.values())))
    return root


@pytest.mark.parametrize("parts", [1, 2])
def test_tensors_are_read_whole(tmp_path: Path, parts: int) -> None:
    checkpoint = open_checkpoint(checkpoint_at(tmp_path / "m", parts=parts))
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, want in TENSORS.items():
        got = checkpoint.read(name)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert np.array_equal(got, want)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_at(tmp_path_factory.mktemp("slices") / "m")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), row_bytes=st.sampled_from([1, 1 << 20]), chunk=st.sampled_from([1, 200, 1 << 20]))
def test_a_slice_is_a_slice(data: st.DataObject, row_bytes: int, chunk: int, root: Path) -> None:
    name = data.draw(st.sampled_from(["a", "b", "empty"]))
    index = []
    for size in TENSORS[name].shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "ROW_READ_BYTES", row_bytes)
        patch.setattr(fs, "CHUNK_BYTES", chunk)
        patch.setattr(reader, "CHUNK_BYTES", chunk)
        got = open_checkpoint(root).read(name, tuple(index))
    assert np.array_equal(got, TENSORS[name][tuple(index)])


@pytest.mark.parametrize(
    ("index", "row_bytes", "want"),
    [((slice(2, 4), slice(0, 30)), 1, [240]), ((slice(2, 5), slice(1, 11)), 40, [40] * 3), ((slice(2, 5), slice(1, 11)), 41, [280])],
)
def test_only_the_bytes_asked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: tuple[slice, slice], row_bytes: int, want: list[int]
) -> None:
    """Parts of rows one by one; where they are shorter than ``row_bytes``, from the first to the last with what lies between."""
    checkpoint = open_checkpoint(checkpoint_at(tmp_path / "m"))
    asked: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(fs, "ROW_READ_BYTES", row_bytes)
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: (asked.append(sum(map(len, views))), preadv(fd, views, at))[1])
    assert np.array_equal(checkpoint.read("a", index), TENSORS["a"][index])
    assert asked == want


def test_bfloat16_comes_as_its_bits() -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    checkpoint, want = open_checkpoint(LLAMA), load_file(LLAMA / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert checkpoint.dtype(name) == "BF16"
        assert torch.equal(torch.from_numpy(checkpoint.read(name).view(np.int16)), want[name].view(torch.int16))


def test_what_travels_with_the_weights(tmp_path: Path) -> None:
    root = checkpoint_at(tmp_path / "m")
    for name in (
        "tokenizer.json",
        "LICENSE",
        "LICENSE.txt",
        "chat_template.jinja",
        "README.md",
        "training_args.bin",
        "quantkit.json",
        "SHA256SUMS",
    ):
        (root / name).write_text("x")
    assert sorted(open_checkpoint(root).extra_files()) == ["LICENSE", "LICENSE.txt", "chat_template.jinja", "tokenizer.json"]


def test_the_fingerprint_is_of_content_alone(tmp_path: Path) -> None:
    one, two = checkpoint_at(tmp_path / "one"), checkpoint_at(tmp_path / "two")
    assert open_checkpoint(one).fingerprint() == open_checkpoint(two).fingerprint()
    data = bytearray((two / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (two / "model.safetensors").write_bytes(data)
    assert open_checkpoint(one).fingerprint() != open_checkpoint(two).fingerprint()


def test_a_cache_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in checkpoint_at(tmp_path / "m").iterdir():
        shutil.copy(path, blobs / f"blob-of-{path.name}")
        os.symlink(Path("../../blobs") / f"blob-of-{path.name}", snapshot / path.name)
    assert np.array_equal(open_checkpoint(snapshot).read("a"), TENSORS["a"])


# what is refused


def refused(path: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    return caught.value.line + f" [{caught.value.hint}]"


def test_paths_that_name_no_checkpoint(tmp_path: Path) -> None:
    assert "no such file or directory" in refused(tmp_path / "nothing")
    assert "has no config.json" in refused(tmp_path)
    assert "hf download org/name" in refused("hub:org/name@main")
    assert "no such package" in refused("pkg:quantkit_no_such_package")
    assert "no such package" in refused("pkg:../../etc")
    assert "holds 0 models" in refused("pkg:rich")


def test_pickles_are_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    line = refused(tmp_path)
    assert "can run code" in line and "safe_serialization=True" in line


def test_config_must_be_an_object(tmp_path: Path) -> None:
    root = checkpoint_at(tmp_path / "m")
    for text, what in (("[]", "holds list"), ("{", "not JSON"), ("[" * 100_000, "not JSON")):
        (root / "config.json").write_text(text)
        assert what in refused(root)


def test_links_that_leave_the_directory_are_refused(tmp_path: Path) -> None:
    root = checkpoint_at(tmp_path / "m")
    shutil.move(root / "model.safetensors", tmp_path / "elsewhere.safetensors")
    os.symlink(tmp_path / "elsewhere.safetensors", root / "model.safetensors")
    assert "leaves the directory" in refused(root)


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    root = checkpoint_at(tmp_path / "m")
    (root / "model.safetensors").unlink()
    os.mkfifo(root / "model.safetensors")
    assert "not a regular file" in refused(root)


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    root = checkpoint_at(tmp_path / "m", parts=2)
    good = json.loads((root / INDEX).read_text())
    first, second = sorted(set(good["weight_map"].values()))

    def with_map(**changes: str | None) -> str:
        weights = {k: v for k, v in {**good["weight_map"], **changes}.items() if v is not None}
        (root / INDEX).write_text(json.dumps({"weight_map": weights}))
        return refused(root)

    assert "which does not hold it" in with_map(ghost=first)
    assert "in no file, and" in with_map(a=None)
    assert "holds it" in with_map(a=second if good["weight_map"]["a"] == first else first)
    assert "which is not there" in with_map(a="model-00009-of-00009.safetensors")
    assert "plain name" in with_map(a="../x.safetensors")
    (root / INDEX).write_text(json.dumps(good))
    (root / second).write_bytes((root / second).read_bytes()[:-1])
    assert "is truncated" in refused(root)


def test_a_shard_directory_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantkit.json").write_text('{"kind": "shards"}')
    assert "quantkit unshard" in refused(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest == {"kind": "shards"}
    assert read_manifest(tmp_path / "config.json") is None


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path) -> None:
    root = checkpoint_at(tmp_path / "m")
    checkpoint = open_checkpoint(root)
    os.truncate(root / "model.safetensors", checkpoint.tensors["a"].offset + 10)
    with pytest.raises(InputError, match="ends at byte"):
        checkpoint.read("a")
