"""The only module that writes: confinement, faults of every kind, publishing, locking."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit import fs
from quantkit.errors import InputError, MachineError


def failing(number: int) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\x7f", "\udcff", "x" * 256])
def test_names_that_leave_or_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"^index: "):
        fs.confined(tmp_path, name, "index")


def test_links_may_stay_inside_and_may_not_leave(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    outside.write_text("x")
    (root / "real").write_text("y")
    (root / "inside").symlink_to("real")
    (root / "escape").symlink_to(outside)
    (root / "hop").symlink_to("escape")
    assert fs.confined(root, "inside", "index") == root / "inside"
    assert fs.confined(root, "plain", "index") == root / "plain"
    for name in ("escape", "hop"):
        with pytest.raises(InputError, match=f"'{name}' is a link that leaves the directory"):
            fs.confined(root, name, "index")


def test_the_hub_cache_may_link_into_its_own_blobs_only(tmp_path: Path) -> None:
    snapshot, blobs, other = tmp_path / "model" / "snapshots" / "abc", tmp_path / "model" / "blobs", tmp_path / "other" / "blobs"
    for path in (snapshot, blobs, other):
        path.mkdir(parents=True)
    (blobs / "1").write_text("x")
    (other / "1").write_text("x")
    (snapshot / "config.json").symlink_to(blobs / "1")
    (snapshot / "bad.json").symlink_to(other / "1")
    assert fs.confined(snapshot, "config.json", "index")
    with pytest.raises(InputError, match="leaves the directory"):
        fs.confined(snapshot, "bad.json", "index")


def test_what_is_no_regular_file_is_never_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="is not a regular file"):
            fs.file_size(path)
    with pytest.raises(InputError, match="cannot read it"):
        fs.read_bytes(tmp_path / "absent", 10)


def test_reads_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(10)))
    assert fs.read_bytes(path, 10) == bytes(range(10))
    with pytest.raises(InputError, match="is 10 bytes long, expected at most 9"):
        fs.read_bytes(path, 9)
    monkeypatch.setattr(fs, "CHUNK_BYTES", 3)
    assert list(fs.read_range(path, 2, 7)) == [bytes([2, 3, 4]), bytes([5, 6, 7]), bytes([8])]
    with pytest.raises(InputError, match="ends at byte 10, expected 12 bytes"):
        list(fs.read_range(path, 5, 7))
    assert fs.sha256_file(path) == hashlib.sha256(bytes(range(10))).hexdigest()


def test_a_hashing_file_hashes_what_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.symlink_to(tmp_path / "target")
    (tmp_path / "target").write_text("untouched")
    with fs.HashingFile(path) as file:
        file.write(b"ab")
        file.write(memoryview(bytearray(b"cd")))
        file.write(b"")
    assert (file.size, file.sha256) == (4, hashlib.sha256(b"abcd").hexdigest())
    assert path.read_bytes() == b"abcd" and not path.is_symlink()
    assert (tmp_path / "target").read_text() == "untouched"
    file.close()  # once closed, does nothing


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, MachineError, "the disk is full, cannot write to it"),
        (errno.EDQUOT, MachineError, "the disk quota is used up"),
        (errno.EFBIG, MachineError, "the file size limit is reached"),
        (errno.EIO, MachineError, "cannot write to it"),
        (errno.EROFS, InputError, "cannot write to it"),
    ],
)
def test_every_failed_write_says_whose_fault_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message), fs.HashingFile(tmp_path / "f") as file:
        monkeypatch.setattr(os, "write", failing(number))
        file.write(b"x")


def test_a_failed_sync_is_not_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = fs.HashingFile(tmp_path / "f")
    file.write(b"x")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(MachineError, match="cannot sync it"):
        file.close()


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:3]))
    fs.write_bytes(tmp_path / "f", b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_write_bytes_leaves_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    fs.write_bytes(path, b"old")
    with monkeypatch.context() as patch, pytest.raises(MachineError):
        patch.setattr(os, "write", failing(errno.ENOSPC))
        fs.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]
    fs.write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]


def test_append_cuts_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"good\ntor")
    assert fs.append(path, b"next\n", at=5) == 10
    assert path.read_bytes() == b"good\nnext\n"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InputError, match="cannot append to it"):
        fs.append(tmp_path / "link", b"x", at=0)


def test_make_dir_makes_parents_and_refuses_files(tmp_path: Path) -> None:
    fs.make_dir(tmp_path / "a" / "b")
    fs.make_dir(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a directory"):
        fs.make_dir(tmp_path / "file")


def test_removal_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").write_text("x")
    (tmp_path / "link").symlink_to("kept")
    fs.remove_tree(tmp_path / "link")
    assert (tmp_path / "kept" / "f").exists() and not (tmp_path / "link").is_symlink()
    fs.remove_tree(tmp_path / "absent")
    fs.remove_file(tmp_path / "absent")
    fs.discard(tmp_path / "kept")
    fs.discard(tmp_path / "kept")
    assert not os.listdir(tmp_path)


def test_discard_clears_what_an_earlier_one_left(tmp_path: Path) -> None:
    left = tmp_path / fs.DISCARDED.format(name="d")
    left.mkdir()
    (left / "half").write_text("x")
    (tmp_path / "d").mkdir()
    fs.discard(tmp_path / "d")
    assert not os.listdir(tmp_path)


def test_a_second_writer_is_locked_out_and_a_dead_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "out.lock"
    code = f"from pathlib import Path; from quantkit import fs\nwith fs.lock(Path({str(path)!r})): print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(MachineError, match="is locked: another process is writing this output"), fs.lock(path):
            pytest.fail("two writers")
        other.kill()
        other.wait()
    assert path.exists()
    with fs.lock(path):
        pass
    assert not path.exists()


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="cannot open the lock"), fs.lock(tmp_path / "l"):
        pytest.fail("followed")
    assert not (tmp_path / "elsewhere").exists()


def test_free_space_is_asked_of_the_nearest_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs.require_free(tmp_path / "not" / "yet", 1, "out")
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=4))
    fs.require_free(tmp_path, 40, "out")
    with pytest.raises(MachineError, match=r"out: needs 41 bytes of disk \(because\), 40 are free, expected 1 bytes more"):
        fs.require_free(tmp_path, 41, "out", "because")


def test_only_a_checkpoint_or_nothing_is_overwritten(tmp_path: Path) -> None:
    fs.refuse_existing(tmp_path / "absent", False)
    home, link, model, empty = (tmp_path / name for name in ("home", "link", "model", "empty"))
    for path in (home, model, empty):
        path.mkdir()
    (home / "thesis.tex").write_text("x")
    (model / "config.json").write_text("{}")
    link.symlink_to(model)
    for path in (home, link, model, empty):
        with pytest.raises(InputError, match="exists, expected a path that does not exist"):
            fs.refuse_existing(path, False)
    for path in (home, link, home / "thesis.tex"):
        with pytest.raises(InputError, match="cannot be overwritten: it is no checkpoint directory"):
            fs.refuse_existing(path, True)
    fs.refuse_existing(model, True)
    fs.refuse_existing(empty, True)


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (tmp_path / "alias").symlink_to(model)
    for out in (model, tmp_path / "models", tmp_path / "alias"):
        with pytest.raises(InputError, match="is where the source lies"):
            fs.refuse_source(out, model)
    fs.refuse_source(tmp_path / "out", model)
    fs.refuse_source(model / "quantized", model)


def directory(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(content)
    return path


def test_publish_puts_a_directory_in_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fs.publish(directory(tmp_path / "p", "new"), out, False)
    assert (out / "config.json").read_text() == "new"
    with pytest.raises(InputError, match="exists"):
        fs.publish(directory(tmp_path / "p", "newer"), out, False)
    assert (out / "config.json").read_text() == "new"
    fs.publish(tmp_path / "p", out, True)
    assert (out / "config.json").read_text() == "newer"
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, partial = tmp_path / "out", directory(tmp_path / "p", "ours")
    monkeypatch.setattr(fs, "refuse_existing", lambda path, overwrite: directory(path, "theirs"))
    monkeypatch.setattr(fs, "_replaced", lambda path: tmp_path / "aside")
    rename = os.rename

    def racing(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name == "aside":
            directory(out, "again")

    monkeypatch.setattr(os, "rename", racing)
    with pytest.raises(InputError, match="appeared while its replacement was being made"):
        fs.publish(partial, out, False)
    assert (out / "config.json").read_text() == "again" and (partial / "config.json").read_text() == "ours"


def test_a_publish_that_fails_puts_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, partial = directory(tmp_path / "out", "old"), directory(tmp_path / "p", "new")
    rename = os.rename

    def broken(source: Path, target: Path) -> None:
        if Path(source) == partial:
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(MachineError, match="cannot put it in place"):
        fs.publish(partial, out, True)
    assert (out / "config.json").read_text() == "old" and (partial / "config.json").read_text() == "new"


def test_what_a_crash_left_of_the_old_output_is_cleared_once_there_is_a_new_one(tmp_path: Path) -> None:
    left = directory(tmp_path / ".out.replaced", "old")
    fs.clear_replaced(tmp_path / "out")
    assert left.exists(), "it may be all that is left"
    directory(tmp_path / "out", "new")
    fs.clear_replaced(tmp_path / "out")
    assert not left.exists()
