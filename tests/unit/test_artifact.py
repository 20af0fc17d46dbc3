"""The artifact writer: the same bytes however often it is stopped, and nobody's files lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantkit import __version__, fs
from quantkit.checkpoint import artifact
from quantkit.checkpoint.artifact import ArtifactWriter, PublishedArtifact, StoredTensor, encode_json, encode_sums, parse_sums
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import InputError, MachineError, QuantkitError

IDENTITY: dict[str, Any] = {"source": "abc", "recipe": {"bits": 4}}
UNITS = ("block-0", "block-1", "outer")


def tensors(unit: str) -> Iterator[StoredTensor]:
    rng = np.random.default_rng(len(unit) + ord(unit[-1]))
    for suffix, kind, shape in (("a.qweight", np.int32, (4, 8)), ("a.scales", np.float16, (2, 8)), ("norm.weight", np.float32, (3,))):
        value = (rng.random(shape) * 100).astype(kind)
        dtype = {np.int32: "I32", np.float16: "F16", np.float32: "F32"}[kind]
        yield StoredTensor(f"{unit}.{suffix}", dtype, shape, value.tobytes())


def writer(out: Path, **changes: Any) -> ArtifactWriter:
    settings: dict[str, Any] = {"identity": IDENTITY, "overwrite": False, "resume": False, "need_bytes": 1000, **changes}
    return ArtifactWriter(out, **settings)


def commit_all(target: ArtifactWriter, stop: str | None = None) -> None:
    for number, unit in enumerate(UNITS):
        if unit not in target.committed:
            target.commit(unit, tensors(unit), facts={"number": number}, carry=f"states {number}".encode() if number < 2 else None)
        if unit == stop:
            raise KeyboardInterrupt


def finish(target: ArtifactWriter, max_shard_size: int = 10**9) -> PublishedArtifact:
    files = {"tokenizer.json": b"{}"}
    return target.publish(config={"b": 1, "a": 2}, files=files, manifest={"kind": "artifact"}, max_shard_size=max_shard_size)


def whole(out: Path, max_shard_size: int = 10**9) -> dict[str, bytes]:
    with writer(out) as target:
        commit_all(target)
        finish(target, max_shard_size)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_an_artifact_is_a_checkpoint_with_manifest_and_sums(tmp_path: Path) -> None:
    found = whole(tmp_path / "out")
    assert sorted(found) == ["SHA256SUMS", "config.json", "model.safetensors", "quantkit.json", "tokenizer.json"]
    assert found["config.json"] == b'{\n  "a": 2,\n  "b": 1\n}\n'
    assert json.loads(found["quantkit.json"]) == {"kind": "artifact", "quantkit": __version__, "schema": 1}
    sums = parse_sums(found.pop("SHA256SUMS"), "SHA256SUMS")
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}
    held = load_file(tmp_path / "out" / "model.safetensors")
    for unit in UNITS:
        for tensor in tensors(unit):
            assert held[tensor.name].tobytes() == bytes(tensor.data) and held[tensor.name].shape == tensor.shape
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_it_says_what_it_published(tmp_path: Path) -> None:
    with writer(tmp_path / "out") as target:
        commit_all(target)
        done = finish(target)
    assert done.files == tuple(sorted((path.name, path.stat().st_size) for path in (tmp_path / "out").iterdir()))
    assert done.sums_sha256 == hashlib.sha256((tmp_path / "out" / "SHA256SUMS").read_bytes()).hexdigest()


def test_small_shards_keep_the_parts_of_a_linear_together(tmp_path: Path) -> None:
    found = whole(tmp_path / "out", 170)
    index = json.loads(found["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == 3 * (128 + 32 + 12)
    where = index["weight_map"]
    assert all(where[f"{unit}.a.qweight"] == where[f"{unit}.a.scales"] for unit in UNITS)
    names = [name for name in found if name.startswith("model-")]
    assert sorted(names) == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert set(open_checkpoint(tmp_path / "out").tensors) == {t.name for unit in UNITS for t in tensors(unit)}


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    found = whole(tmp_path / "out", 1)
    assert len([name for name in found if name.startswith("model-")]) == 9


@pytest.mark.parametrize(("size", "message"), [(0, "--max-shard-size: is 0"), (1, "makes 9 files, expected at most 5")])
def test_shard_sizes_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, message: str) -> None:
    monkeypatch.setattr(artifact, "MAX_SHARDS", 5)
    with writer(tmp_path / "out") as target:
        commit_all(target)
        with pytest.raises(InputError, match=message):
            finish(target, size)


@pytest.mark.parametrize("stop", UNITS)
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, stop: str) -> None:
    expected = whole(tmp_path / "straight")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), writer(out) as target:
        commit_all(target, stop)
    assert sorted(os.listdir(tmp_path)) == ["out.partial", "straight"]
    with writer(out, resume=True) as target:
        assert target.committed == UNITS[: UNITS.index(stop) + 1]
        number = len(target.committed) - 1
        assert target.facts(stop) == {"number": number}
        assert b"".join(target.carry() or ()) == f"states {min(number, 1)}".encode()
        commit_all(target)
        finish(target)
    assert contents(out) == expected
    assert sorted(os.listdir(tmp_path)) == ["out", "straight"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing below catches it."""


@pytest.mark.parametrize(("call", "step"), [("write", 2), ("fsync", 2), ("rename", 1), ("open", 5), ("mkdir", 1)])
def test_killed_at_any_system_call_it_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, step: int
) -> None:
    expected = whole(tmp_path / "straight")
    real = getattr(os, call)
    for at in range(0, 200, step):
        out, left = tmp_path / f"out{at}", [at]

        def counted(*args: Any, _left: list[int] = left, **kwargs: Any) -> Any:
            if not _left[0]:
                raise Killed
            _left[0] -= 1
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, counted)
            try:
                with writer(out) as target:
                    commit_all(target)
                    finish(target)
                assert at > 2
                return
            except Killed:
                pass
        if not (out / "SHA256SUMS").exists() or out.with_name(f"{out.name}.partial").exists():
            with writer(out, resume=True) as target:
                commit_all(target)
                finish(target)
            assert not [name for name in os.listdir(tmp_path) if name.startswith((f"out{at}.", f".out{at}."))], at
        assert contents(out) == expected, at
    pytest.fail("more calls than this test expects")


def stopped(out: Path) -> Path:
    with pytest.raises(KeyboardInterrupt), writer(out) as target:
        commit_all(target, "block-1")
    return out.with_name(f"{out.name}.partial")


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({**IDENTITY, "source": "abd"}, "source: was 'abc' when the work began and is 'abd' now"),
        ({**IDENTITY, "recipe": {"bits": 3}}, r"recipe\.bits: was 4 when the work began and is 3 now"),
        ({"source": "abc"}, "recipe: was {'bits': 4} when the work began and is None now"),
    ],
)
def test_another_identity_is_refused_by_field(tmp_path: Path, identity: Mapping[str, Any], message: str) -> None:
    stopped(tmp_path / "out")
    with pytest.raises(InputError, match=message), writer(tmp_path / "out", resume=True, identity=identity):
        pytest.fail("resumed")


def test_an_unfinished_run_is_neither_continued_nor_lost_unasked(tmp_path: Path) -> None:
    stopped(tmp_path / "out")
    with pytest.raises(InputError, match="an unfinished run left it") as caught, writer(tmp_path / "out"):
        pytest.fail("went on")
    assert caught.value.hint == "--resume continues it, --overwrite starts over"
    with writer(tmp_path / "out", overwrite=True) as target:
        assert target.committed == ()
        commit_all(target)
        finish(target)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_resume_with_nothing_to_resume_starts(tmp_path: Path) -> None:
    with writer(tmp_path / "out", resume=True) as target:
        assert target.committed == () and target.carry() is None
        with pytest.raises(KeyError):
            target.facts("block-0")
        commit_all(target)
        finish(target)
    assert (tmp_path / "out" / "SHA256SUMS").is_file()


@pytest.mark.parametrize("damage", ["shorter", "changed", "absent", "carry"])
def test_committed_bytes_that_changed_are_an_error(tmp_path: Path, damage: str) -> None:
    spool = stopped(tmp_path / "out") / "spool"
    path = spool / ("00001.carry" if damage == "carry" else "00000.bin")
    data = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "shorter" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(InputError, match="is not what was committed"), writer(tmp_path / "out", resume=True):
        pytest.fail("resumed")


def test_an_uncommitted_spool_file_is_removed(tmp_path: Path) -> None:
    partial = stopped(tmp_path / "out")
    (partial / "spool" / "00002.bin").write_bytes(b"half")
    (partial / "final").mkdir()
    with writer(tmp_path / "out", resume=True):
        assert sorted(os.listdir(partial / "spool")) == ["00000.bin", "00001.bin", "00001.carry"]
        assert not (partial / "final").exists()


@pytest.mark.parametrize("kind", ["stranger", "file", "link", "spool link"])
def test_a_partial_that_is_not_ours_is_left_alone(tmp_path: Path, kind: str) -> None:
    partial = tmp_path / "out.partial"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("x")
    if kind == "stranger":
        partial.mkdir()
        (partial / "thesis.tex").write_text("x")
    elif kind == "file":
        partial.write_text("x")
    elif kind == "link":
        partial.symlink_to(elsewhere)
    else:
        partial.mkdir()
        (partial / "spool").symlink_to(elsewhere)
    for settings in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=r"out\.partial"), writer(tmp_path / "out", **settings):
            pytest.fail("took it")
    assert (elsewhere / "thesis.tex").exists()
    assert kind != "stranger" or (partial / "thesis.tex").exists()


def test_an_output_that_exists_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    whole(tmp_path / "out")
    with pytest.raises(InputError, match="exists, expected a path that does not exist"), writer(tmp_path / "out"):
        pytest.fail("went on")
    with pytest.raises(InputError, match="exists"), writer(tmp_path / "out", resume=True):
        pytest.fail("went on")
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_an_output_that_appears_while_it_is_made_is_kept(tmp_path: Path) -> None:
    with writer(tmp_path / "out") as target:
        commit_all(target)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
        with pytest.raises(InputError, match="exists"):
            finish(target)
    assert os.listdir(tmp_path / "out") == ["theirs"]
    assert (tmp_path / "out.partial" / "journal").is_file()


def test_overwrite_replaces_a_checkpoint_and_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with writer(out, overwrite=True) as target:
        commit_all(target)
        assert (out / "config.json").read_text() == "old"
        finish(target)
    assert (out / "config.json").read_text() != "old"


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    whole(tmp_path / "model")
    with pytest.raises(InputError, match="is where the source lies"), writer(tmp_path / "model", overwrite=True, source=tmp_path / "model"):
        pytest.fail("went on")


def test_a_second_writer_is_locked_out(tmp_path: Path) -> None:
    with (
        writer(tmp_path / "out") as first,
        pytest.raises(MachineError, match=r"out\.lock: is locked"),
        writer(tmp_path / "out", overwrite=True),
    ):
        first.commit("never", [], facts={})
    assert sorted(os.listdir(tmp_path)) == ["out.partial"]


def test_too_small_a_disk_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1999, f_frsize=1))
    with pytest.raises(MachineError, match="needs 2000 bytes of disk") as caught, writer(tmp_path / "out"):
        pytest.fail("went on")
    assert caught.value.exit_code == 3 and not os.listdir(tmp_path)


def test_what_is_committed_already_needs_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path / "out")
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=2000 - 2 * 172, f_frsize=1))
    with writer(tmp_path / "out", resume=True) as target:
        assert len(target.committed) == 2


@pytest.mark.parametrize("where", ["commit", "publish"])
def test_a_disk_that_fills_up_is_the_machines_fault_and_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    expected = whole(tmp_path / "straight")

    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(MachineError, match="the disk is full") as caught,
        writer(tmp_path / "out") as target,
    ):
        if where == "commit":
            target.commit("block-0", tensors("block-0"), facts={"number": 0}, carry=b"states 0")
        else:
            commit_all(target)
        patch.setattr(os, "write", full)
        if where == "commit":
            commit_all(target)
        finish(target)
    assert caught.value.exit_code == 3
    with writer(tmp_path / "out", resume=True) as target:
        commit_all(target)
        finish(target)
    assert contents(tmp_path / "out") == expected


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    with writer(tmp_path / "out") as target:
        target.commit("block-0", tensors("block-0"), facts={})
        with pytest.raises(InputError, match=r"block-0\.a\.qweight: is written twice"):
            target.commit("again", tensors("block-0"), facts={})
        assert target.committed == ("block-0",)


@pytest.mark.parametrize("name", ["config.json", "SHA256SUMS", "quantkit.json", "model.safetensors", "../escape", "a/b"])
def test_an_extra_file_may_not_take_a_name_or_leave(tmp_path: Path, name: str) -> None:
    with writer(tmp_path / "out") as target:
        commit_all(target)
        with pytest.raises(QuantkitError):
            target.publish(config={}, files={name: b"x"}, manifest={}, max_shard_size=10**9)
    assert not (tmp_path / "out").exists() and not (tmp_path / "escape").exists()


def test_facts_and_identity_are_strict_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer(tmp_path / "out", identity={"x": float("inf")})
    with writer(tmp_path / "out") as target, pytest.raises(ValueError, match="not JSON compliant"):
        target.commit("block-0", [], facts={"x": float("nan")})


def test_sums_are_what_sha256sum_reads() -> None:
    digests = {"b": "1" * 64, "a": "2" * 64}
    data = encode_sums(digests)
    assert data == b"2" * 64 + b"  a\n" + b"1" * 64 + b"  b\n"
    assert parse_sums(data, "S") == digests
    assert parse_sums(b"", "S") == {}


@pytest.mark.parametrize(
    "data",
    [
        b"1" * 63 + b"  a\n",
        b"G" * 64 + b"  a\n",
        b"1" * 64 + b" a\n",
        b"1" * 64 + b"  \n",
        b"1" * 64 + b"  a\n" + b"2" * 64 + b"  a\n",
        b"1" * 64 + b"  a\n\n",
        b"\xff",
    ],
)
def test_sums_of_another_form_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^S: "):
        parse_sums(data, "S")


def test_json_is_sorted_and_ascii() -> None:
    assert encode_json({"b": "é", "a": [1]}) == b'{\n  "a": [\n    1\n  ],\n  "b": "\\u00e9"\n}\n'
    assert fs.REPLACEABLE[0] == artifact.CONFIG
