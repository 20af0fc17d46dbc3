"""The GGUF writer: the same bytes however often it is stopped, split as asked, and nobody's files lost."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from quantkit.checkpoint import gguf_writer
from quantkit.checkpoint.gguf_writer import GgufWriter, PlannedTensor, file_bytes
from quantkit.errors import InputError, MachineError
from quantkit.formats.gguf import BLOCK_TYPES, I32, STRING, array, boolean, f32, i32, read_gguf, tensor_bytes, text, texts, u32, u64

METADATA = {
    "general.architecture": text("llama"),
    "general.name": text("é"),
    "llama.block_count": u32(2),
    "llama.rope.freq_base": f32(1e4),
    "tokenizer.ggml.tokens": texts(["a", "日本", ""]),
    "tokenizer.ggml.token_type": array(I32, [1, 3, 1]),
    "tokenizer.ggml.add_bos_token": boolean(True),
    "big": u64(1 << 63),
    "small": i32(-1),
    "none": array(STRING, []),
}
TENSORS = (
    PlannedTensor("token_embd.weight", "Q4_K", (3, 256)),
    PlannedTensor("blk.0.attn_norm.weight", "F32", (5,)),
    PlannedTensor("blk.0.attn_q.weight", "Q8_0", (4, 64)),
    PlannedTensor("blk.0.ffn_down_exps.weight", "IQ4_NL", (2, 3, 32)),
    PlannedTensor("blk.1.attn_norm.weight", "F32", (5,)),
    PlannedTensor("blk.1.attn_q.weight", "F16", (4, 3)),
    PlannedTensor("output_norm.weight", "BF16", (7,)),
    PlannedTensor("empty.weight", "F32", (0, 3)),
)
NAMES = [tensor.name for tensor in TENSORS]
IDENTITY: dict[str, Any] = {"source": "abc", "types": {"output_norm.weight": "BF16"}}


def data_of(tensor: PlannedTensor) -> bytes:
    nbytes = tensor_bytes(tensor.type, tensor.shape)
    return np.random.default_rng(len(tensor.name)).integers(0, 256, nbytes, np.uint8).tobytes()


def chunks(tensor: PlannedTensor) -> Iterator[bytes | memoryview | np.ndarray[Any, Any]]:
    """The bytes of a tensor in buffers of three kinds."""
    data = data_of(tensor)
    third = len(data) // 3
    yield data[:third]
    yield memoryview(data)[third : 2 * third]
    yield np.frombuffer(data[2 * third :], np.uint8)


def writer(out: Path, **changes: Any) -> GgufWriter:
    settings: dict[str, Any] = {
        "metadata": METADATA,
        "tensors": TENSORS,
        "identity": IDENTITY,
        "overwrite": False,
        "resume": False,
        "max_part_bytes": None,
        **changes,
    }
    return GgufWriter(out, **settings)


def write_all(target: GgufWriter, stop: str | None = None) -> None:
    for tensor in TENSORS:
        if tensor.name not in target.committed:
            target.write(tensor.name, chunks(tensor))
        if tensor.name == stop:
            raise KeyboardInterrupt


def whole(out: Path, **changes: Any) -> dict[str, bytes]:
    out.parent.mkdir(exist_ok=True)
    with writer(out, **changes) as target:
        write_all(target)
        files = target.publish()
    return {path.name: path.read_bytes() for path, _ in files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def held(path: Path) -> dict[str, bytes]:
    """Name -> bytes of every tensor, by our reader."""
    return {t.name: t.file.read_bytes()[t.offset : t.offset + t.nbytes] for t in read_gguf(path).tensors.values()}


def test_a_file_holds_what_it_was_given(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with writer(out) as target:
        assert target.committed == frozenset()
        write_all(target)
        assert target.publish() == ((out, out.stat().st_size),)
    file = read_gguf(out)
    assert file.version == 3 and file.values() == METADATA and list(file.values()) == list(METADATA)
    assert [(t.name, t.type, t.shape) for t in file.tensors.values()] == [(t.name, t.type, t.shape) for t in TENSORS]
    assert held(out) == {tensor.name: data_of(tensor) for tensor in TENSORS}
    assert names(tmp_path) == ["m.gguf"]


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    """A file, and each part of a split one, with every type that the package knows."""
    every = tuple(PlannedTensor(block.name, block.name, (3, 2 * block.elements)) for block in BLOCK_TYPES.values())
    for limit in (None, 2000):
        folder = tmp_path / str(limit)
        folder.mkdir()
        with writer(folder / "m.gguf", tensors=every, max_part_bytes=limit) as target:
            for tensor in every:
                target.write(tensor.name, chunks(tensor))
            files = target.publish()
        assert len(files) == (1 if limit is None else len(list(folder.iterdir())))
        found = {}
        for number, (path, _) in enumerate(files):
            reader = gguf.GGUFReader(path)
            for tensor in reader.tensors:
                shape = tuple(int(n) for n in reversed(tensor.shape))
                found[tensor.name] = (tensor.tensor_type.name, shape, tensor.data.tobytes())
            kept = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(("GGUF.", "split."))}
            plain = {key: list(v.value) if v.element is not None else v.value for key, v in METADATA.items()}
            assert kept == ({} if number else plain)
        assert found == {tensor.name: (tensor.type, tensor.shape, data_of(tensor)) for tensor in every}


# parts


def test_names_and_sizes_are_known_before(tmp_path: Path) -> None:
    for limit in (None, 100, 1000, 1500, 10**9):
        found = whole(tmp_path / str(limit) / "model.gguf", max_part_bytes=limit)
        assert file_bytes(Path("model.gguf"), METADATA, TENSORS, limit) == tuple((name, len(data)) for name, data in found.items())


def test_parts_are_as_large_as_they_may_be_and_no_tensor_is_cut(tmp_path: Path) -> None:
    tensors = tuple(PlannedTensor(f"blk.{i}.weight", "F32", (20 + 70 * (i % 3),)) for i in range(40))
    limit = 1500
    sizes = file_bytes(Path("m.gguf"), METADATA, tensors, limit)
    assert len(sizes) > 5 and all(size <= limit for _, size in sizes)
    assert [name for name, _ in sizes] == [f"m-{i:05d}-of-{len(sizes):05d}.gguf" for i in range(1, len(sizes) + 1)]
    with writer(tmp_path / "m.gguf", tensors=tensors, max_part_bytes=limit) as target:
        for tensor in tensors:
            target.write(tensor.name, chunks(tensor))
        files = target.publish()
    assert names(tmp_path) == [path.name for path, _ in files] and [(p.name, size) for p, size in files] == list(sizes)
    assert held(files[0][0]) == {tensor.name: data_of(tensor) for tensor in tensors}
    counts = [len(gguf.GGUFReader(path).tensors) for path, _ in files]
    first = 0
    for number, (_, size) in enumerate(sizes[:-1]):
        first += counts[number]
        following = tensors[first]
        assert size + tensor_bytes(following.type, following.shape) + 64 > limit, "the next tensor would have fitted"


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    metadata = {**METADATA, "general.alignment": u32(128)}
    found = whole(tmp_path / "m.gguf", metadata=metadata, max_part_bytes=1)
    assert len(found) == len(TENSORS)
    file = read_gguf(tmp_path / "m-00001-of-00008.gguf")
    assert file.paths == tuple(tmp_path / name for name in found)
    assert file.values() == metadata and file.metadata["split.count"] == 8 and file.metadata["split.tensors.count"] == 8
    assert {t.name: t.file.name for t in file.tensors.values()} == dict(zip(NAMES, found, strict=True))
    assert held(file.path) == {tensor.name: data_of(tensor) for tensor in TENSORS}


@pytest.mark.parametrize(("limit", "message"), [(0, "--max-shard-size: is 0"), (1, "makes 8 files, expected at most 5")])
def test_part_sizes_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, message: str) -> None:
    monkeypatch.setattr(gguf_writer, "MAX_PARTS", 5)
    with pytest.raises(InputError, match=message):
        writer(tmp_path / "m.gguf", max_part_bytes=limit)
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": [PlannedTensor("n" * 64, "F32", (1,))]}, r"has a name of 64 bytes, expected 1 to 63"),
        ({"tensors": [PlannedTensor("a", "Q4_K", (2, 100))]}, r"Q4_K: rows of 100 elements, expected a multiple of 256"),
        ({"metadata": {"k": text("\ud800")}}, r"key 'k': holds half a character"),
        ({"metadata": {"k": u32(1 << 32)}}, r"key 'k': is 4294967296, expected a value of uint32"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_made(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        writer(tmp_path / "m.gguf", **changes)
    assert not names(tmp_path)


def test_no_tensors_make_a_file(tmp_path: Path) -> None:
    with writer(tmp_path / "m.gguf", tensors=()) as target:
        target.publish()
    assert read_gguf(tmp_path / "m.gguf").values() == METADATA


# stopped and resumed


@pytest.mark.parametrize("limit", [None, 1000])
@pytest.mark.parametrize(("stop", "kept"), [(0, 1), (1, 1), (2, 1), (3, 4), (4, 4), (5, 6), (6, 6), (7, 8)])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, stop: int, kept: int, limit: int | None) -> None:
    """A layer is committed when it is whole, and a part before the next begins."""
    expected = whole(tmp_path / "straight" / "m.gguf", max_part_bytes=limit)
    out = tmp_path / "m.gguf"
    with pytest.raises(KeyboardInterrupt), writer(out, max_part_bytes=limit) as target:
        write_all(target, NAMES[stop])
    assert names(tmp_path) == ["m.gguf.partial", "straight"]
    with writer(out, resume=True, max_part_bytes=limit) as target:
        assert target.committed == frozenset(NAMES[:kept]) or (limit and target.committed > frozenset(NAMES[:kept]))
        write_all(target)
        target.publish()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")} == expected


def test_a_long_tensor_goes_to_the_disk_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held in memory is bounded, large tensors are committed one by one, and a broken one leaves nothing that is counted."""
    expected = whole(tmp_path / "straight" / "m.gguf")
    monkeypatch.setattr(gguf_writer, "BATCH_BYTES", 100)
    out = tmp_path / "m.gguf"
    sizes: list[int] = []
    append = gguf_writer.fs.append
    monkeypatch.setattr(
        gguf_writer.fs,
        "append",
        lambda path, *data, at: (sizes.append(sum(memoryview(one).nbytes for one in data)), append(path, *data, at=at))[1],
    )

    def breaks() -> Iterator[bytes]:
        yield data_of(TENSORS[2])[:200]
        raise InputError("source", "ends")

    with pytest.raises(InputError, match="ends"), writer(out) as target:
        target.write(NAMES[0], chunks(TENSORS[0]))
        target.write(NAMES[1], chunks(TENSORS[1]))
        target.write(NAMES[2], breaks())
    assert max(sizes) < 300 + 100
    with writer(out, resume=True) as target:
        assert target.committed == frozenset(NAMES[:1])
        write_all(target)
        target.publish()
    assert {"m.gguf": out.read_bytes()} == expected


class Killed(BaseException):
    """Stands for SIGKILL: nothing below catches it."""


@pytest.mark.parametrize("limit", [None, 1000])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open", "mkdir", "link", "unlink", "ftruncate"])
def test_killed_at_any_system_call_it_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, old: bool, limit: int | None
) -> None:
    """With and without an output to overwrite; at no moment is there a model that is neither the old nor the new one."""
    expected = whole(tmp_path / "straight" / "m.gguf", max_part_bytes=limit)
    other = {**METADATA, "general.name": text("old")}
    before = whole(tmp_path / "old" / "m.gguf", metadata=other, max_part_bytes=limit)
    first = next(iter(expected))
    real = getattr(os, call)
    for at in range(200):
        folder, left = tmp_path / f"at{at}", [at]
        folder.mkdir()
        out = folder / "m.gguf"
        for name, data in before.items() if old else ():
            (folder / name).write_bytes(data)

        def counted(*args: Any, _left: list[int] = left, **kwargs: Any) -> Any:
            if not _left[0]:
                raise Killed
            _left[0] -= 1
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, counted)
            try:
                with writer(out, max_part_bytes=limit, overwrite=old) as target:
                    write_all(target)
                    target.publish()
                assert at > 0 or (call == "link" and old)
                return
            except Killed:
                pass
        found = {path.name: path.read_bytes() for path in folder.glob("*.gguf")}
        assert first not in found or found in (before, expected), at
        ending = {"m.gguf.lock", ".m.gguf.partial.discarded"}
        if found != expected or (folder / "m.gguf.partial").exists():
            ending = set()
            with writer(out, max_part_bytes=limit, overwrite=old, resume=True) as target:
                write_all(target)
                target.publish()
        assert {path.name: path.read_bytes() for path in folder.glob("*.gguf")} == expected, at
        # What a process that dies at the very last leaves holds nobody off, and the next writer of this output removes it.
        assert set(names(folder)) - ending == set(expected), at
    pytest.fail("more calls than this test expects")


SLOWLY = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_gguf_writer as tests
with tests.writer(Path(sys.argv[2]), max_part_bytes=1000) as target:
    for tensor in tests.TENSORS:
        target.write(tensor.name, tests.chunks(tensor))
        time.sleep(0.2)
"""


def test_killed_with_sigkill_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    expected = whole(tmp_path / "straight" / "m.gguf", max_part_bytes=1000)
    out, journal = tmp_path / "m.gguf", tmp_path / "m.gguf.partial" / "journal"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(Path(__file__).parent), str(out)])
    deadline = time.monotonic() + 60
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 3):
        assert time.monotonic() < deadline, "the run does not move"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and (tmp_path / "m.gguf.lock").exists() and not list(tmp_path.glob("*-of-*"))
    with writer(out, max_part_bytes=1000, resume=True) as target:
        assert 2 <= len(target.committed) < len(TENSORS)
        write_all(target)
        target.publish()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")} == expected
    assert names(tmp_path) == sorted([*expected, "straight"])


def stopped(out: Path, **changes: Any) -> Path:
    with pytest.raises(KeyboardInterrupt), writer(out, **changes) as target:
        write_all(target, NAMES[4])
    return out.with_name(f"{out.name}.partial")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": {**IDENTITY, "source": "abd"}}, "source: was 'abc' when the work began and is 'abd' now"),
        (
            {
                "identity": {**IDENTITY, "types": {"output_norm.weight": "F16"}},
                "tensors": (*TENSORS[:6], PlannedTensor(NAMES[6], "F16", (7,))),
            },
            r"types\.output_norm\.weight: was 'BF16' when the work began and is 'F16' now",
        ),
        ({"metadata": {**METADATA, "small": i32(-2)}}, r"written\.headers: was '[0-9a-f]{64}' when"),
        ({"max_part_bytes": 1000}, r"written\.headers: was '[0-9a-f]{64}' when"),
    ],
)
def test_another_identity_is_refused_by_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    stopped(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=message) as caught, writer(tmp_path / "m.gguf", resume=True, **changes):
        pytest.fail("resumed")
    assert caught.value.hint == "run as before to continue, or --overwrite to start over"


def test_an_unfinished_run_is_neither_continued_nor_lost_unasked(tmp_path: Path) -> None:
    stopped(tmp_path / "m.gguf", max_part_bytes=1000)
    with pytest.raises(InputError, match="an unfinished run left it") as caught, writer(tmp_path / "m.gguf"):
        pytest.fail("went on")
    assert caught.value.hint == "--resume continues it, --overwrite starts over"
    with writer(tmp_path / "m.gguf", overwrite=True) as target:
        assert target.committed == frozenset()
        write_all(target)
        target.publish()
    assert names(tmp_path) == ["m.gguf"]


def test_resume_with_nothing_to_resume_starts(tmp_path: Path) -> None:
    with writer(tmp_path / "m.gguf", resume=True) as target:
        write_all(target)
        target.publish()
    assert names(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize("damage", ["shorter", "header", "tensor", "padding", "absent", "link"])
def test_committed_bytes_that_changed_are_an_error(tmp_path: Path, damage: str) -> None:
    path = stopped(tmp_path / "m.gguf") / "m.gguf"
    data = bytearray(path.read_bytes())
    place = gguf_writer._parts("m.gguf", METADATA, TENSORS, None)[0].places[1]
    if damage in ("absent", "link"):
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(data[: place.end])
    else:
        data[{"header": 9, "tensor": place.begin, "padding": place.end - 1}[damage]] ^= 1
        path.write_bytes(data)
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"is not what was committed|has changed between bytes") as caught:
        writer(tmp_path / "m.gguf", resume=True).__enter__()
    assert caught.value.hint == "--overwrite starts over" and "m.gguf.partial/m.gguf" in caught.value.where
    assert names(tmp_path) == sorted(["m.gguf.partial", *(["elsewhere"] if damage == "link" else [])])


@pytest.mark.parametrize("line", [{"tensor": "other", "sha256": "0" * 64}, {"tensor": NAMES[5]}, {"publish": True}, {"unit": "x"}])
def test_a_journal_with_another_line_is_refused(tmp_path: Path, line: dict[str, Any]) -> None:
    journal = stopped(tmp_path / "m.gguf") / "journal"
    with journal.open("ab") as file:
        file.write(gguf_writer.log.encode_line(line))
    with pytest.raises(InputError, match=r"line 6: is not what follows"), writer(tmp_path / "m.gguf", resume=True):
        pytest.fail("resumed")


def test_what_was_not_committed_is_cut_off(tmp_path: Path) -> None:
    path = stopped(tmp_path / "m.gguf") / "m.gguf"
    committed = gguf_writer._parts("m.gguf", METADATA, TENSORS, None)[0].places[3].end
    with path.open("ab") as file:
        file.write(b"half a tensor" * 100)
    with writer(tmp_path / "m.gguf", resume=True):
        assert path.stat().st_size == committed


@pytest.mark.parametrize("kind", ["stranger", "file", "link"])
def test_a_partial_that_is_not_ours_is_left_alone(tmp_path: Path, kind: str) -> None:
    partial, elsewhere = tmp_path / "m.gguf.partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("x")
    if kind == "stranger":
        partial.mkdir()
        (partial / "thesis.tex").write_text("x")
    elif kind == "file":
        partial.write_text("x")
    else:
        partial.symlink_to(elsewhere)
    for settings in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=r"m\.gguf\.partial"), writer(tmp_path / "m.gguf", **settings):
            pytest.fail("took it")
    assert (elsewhere / "thesis.tex").exists() and os.path.lexists(partial)
    assert kind != "stranger" or (partial / "thesis.tex").exists()


# what is there already


@pytest.mark.parametrize("limit", [None, 1000])
def test_an_output_that_exists_is_refused_before_anything_is_made(tmp_path: Path, limit: int | None) -> None:
    before = whole(tmp_path / "m.gguf", max_part_bytes=limit)
    for resume in (False, True):
        with pytest.raises(InputError, match="exists, expected a path that does not exist") as caught:
            writer(tmp_path / "m.gguf", resume=resume, max_part_bytes=limit).__enter__()
        assert caught.value.hint == "--overwrite replaces it"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["text", "directory", "link", "pipe"])
def test_only_a_gguf_file_is_overwritten(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "m.gguf"
    if kind == "text":
        out.write_text("my thesis")
    elif kind == "directory":
        out.mkdir()
    elif kind == "pipe":
        os.mkfifo(out)
    else:
        whole(tmp_path / "real.gguf")
        out.symlink_to(tmp_path / "real.gguf")
    with pytest.raises(InputError, match=r"m\.gguf: cannot be overwritten: it is no GGUF file"), writer(out, overwrite=True):
        pytest.fail("went on")
    assert os.path.lexists(out) and not os.path.lexists(tmp_path / "m.gguf.partial")


@pytest.mark.parametrize("limit", [None, 1000])
def test_overwrite_replaces_a_file_and_only_at_the_end(tmp_path: Path, limit: int | None) -> None:
    before = whole(tmp_path / "m.gguf", metadata={**METADATA, "general.name": text("old")}, max_part_bytes=limit)
    first = tmp_path / next(iter(before))
    (tmp_path / "m.gguf").write_bytes(b"")  # an empty file may be replaced, and is not when the model is split
    first.write_bytes(before[first.name])
    with writer(tmp_path / "m.gguf", overwrite=True, max_part_bytes=limit) as target:
        write_all(target)
        assert first.read_bytes() == before[first.name]
        files = target.publish()
    assert files[0][0] == first and read_gguf(first).values() == METADATA


def test_an_output_that_appears_while_it_is_made_is_kept(tmp_path: Path) -> None:
    with writer(tmp_path / "m.gguf") as target:
        write_all(target)
        (tmp_path / "m.gguf").write_text("theirs")
        with pytest.raises(InputError, match="appeared while it was being made") as caught:
            target.publish()
    assert caught.value.hint == "--overwrite replaces it"
    assert (tmp_path / "m.gguf").read_text() == "theirs" and (tmp_path / "m.gguf.partial" / "journal").is_file()


def test_a_disk_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*paths: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    whole(tmp_path / "m.gguf")
    assert names(tmp_path) == ["m.gguf"]
    with writer(tmp_path / "n.gguf") as target:
        write_all(target)
        (tmp_path / "n.gguf").write_text("theirs")
        with pytest.raises(InputError, match="exists"):
            target.publish()


@pytest.mark.parametrize("alias", ["itself", "link", "a part"])
def test_the_source_is_not_overwritten(tmp_path: Path, alias: str) -> None:
    found = list(whole(tmp_path / "m.gguf", max_part_bytes=1000 if alias == "a part" else None))
    source = tmp_path / found[0]
    out = source if alias == "itself" else tmp_path / ("alias.gguf" if alias == "link" else found[1])
    if alias == "link":
        out.symlink_to(source)
    with pytest.raises(InputError, match=r"is where the source lies|is a part of the source"):
        writer(out, overwrite=True, source=source).__enter__()
    with writer(tmp_path / "m.gguf.out" / "m.gguf", source=tmp_path) as target:
        assert target.committed == frozenset()


def test_a_second_writer_is_locked_out(tmp_path: Path) -> None:
    with (
        writer(tmp_path / "m.gguf"),
        pytest.raises(MachineError, match=r"m\.gguf\.lock: is locked"),
        writer(tmp_path / "m.gguf", overwrite=True),
    ):
        pytest.fail("went on")
    assert names(tmp_path) == ["m.gguf.partial"]


def test_too_small_a_disk_is_said_first_and_what_is_committed_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, total),) = file_bytes(Path("m.gguf"), METADATA, TENSORS, None)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=total - 1, f_frsize=1))
    with pytest.raises(MachineError, match=f"needs {total} bytes of disk, {total - 1} are free") as caught:
        writer(tmp_path / "m.gguf").__enter__()
    assert caught.value.exit_code == 3 and not names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=total, f_frsize=1))
        stopped(tmp_path / "m.gguf")
    with writer(tmp_path / "m.gguf", resume=True) as target:
        assert len(target.committed) == 4


@pytest.mark.parametrize("after", [0, 1, 3, 6, 9])
def test_a_disk_that_fills_up_is_the_machines_fault_and_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    expected = whole(tmp_path / "straight" / "m.gguf")
    real, writes = os.write, [0]

    def full(fd: int, data: Any) -> int:
        writes[0] += 1
        if writes[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    with monkeypatch.context() as patch, pytest.raises(MachineError, match="the disk is full") as caught:
        patch.setattr(os, "write", full)
        whole(tmp_path / "m.gguf")
    assert caught.value.exit_code == 3 and "--resume" in (caught.value.hint or "")
    whole(tmp_path / "m.gguf", resume=True)
    assert (tmp_path / "m.gguf").read_bytes() == expected["m.gguf"] and names(tmp_path) == ["m.gguf", "straight"]


# what callers must not do


def test_wrong_bytes_are_our_bug(tmp_path: Path) -> None:
    for data, message in ((b"x" * 19, "1 bytes shorter"), (b"x" * 21, "longer than its type")):
        with writer(tmp_path / "m.gguf", tensors=TENSORS[1:2], overwrite=True) as target, pytest.raises(AssertionError, match=message):
            target.write(NAMES[1], [data])
    with writer(tmp_path / "m.gguf", overwrite=True) as target:
        with pytest.raises(AssertionError):
            target.write(NAMES[1], chunks(TENSORS[1]))
        with pytest.raises(AssertionError, match="not every tensor"):
            target.publish()
    assert not (tmp_path / "m.gguf").exists()


def test_the_identity_is_strict_json_and_names_no_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer(tmp_path / "m.gguf", identity={"x": float("nan")})
    partial = stopped(tmp_path / "m.gguf")
    assert str(tmp_path).encode() not in (partial / "journal").read_bytes()


def test_two_runs_make_the_same_bytes(tmp_path: Path) -> None:
    digests = {hashlib.sha256(whole(tmp_path / name / "m.gguf")["m.gguf"]).hexdigest() for name in ("a", "b")}
    assert len(digests) == 1
