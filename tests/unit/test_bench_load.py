"""bench load: what is counted is what is read, of shards, slices and GGUF blocks alike; caches are really dropped, or it is said."""

from __future__ import annotations

import json
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.commands import bench_load, convert
from quantkit.commands.bench_load import BenchLoadOptions, run
from quantkit.commands.convert import ConvertOptions
from quantkit.errors import InputError
from quantkit.shard import rank_file, shard_checkpoint

LLAMA = Path(__file__).parent.parent / "data" / "models" / "llama"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("load") / "shards"
    shard_checkpoint(open_checkpoint(LLAMA), out, 2, overwrite=False)
    return out


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_file_is_read_whole(shards: Path, tmp_path: Path, rank: int) -> None:
    told: list[tuple[str, int, int]] = []
    report = run(
        BenchLoadOptions(str(shards), rank=rank, device="cpu", dtype="float32", rounds=2, out=tmp_path / "o.json"),
        lambda *progress: told.append(progress),
    )
    data, file = report.data, shards / rank_file(rank, 2)
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert (data["bytes"], data["file_bytes"], data["files"]) == (file.stat().st_size - start, file.stat().st_size, 1)
    assert (data["rank"], data["tp"], data["device"]) == (rank, 2, "cpu")
    assert data["weight_bytes"] >= 2 * data["bytes"]  # bfloat16 as float32
    assert told.count(("weights", data["bytes"], data["bytes"])) == 4
    assert [(one["dropped"], one["what"]) for one in data["figures"]] == [
        (dropped, what) for dropped in (True, False) for what in ("plain read", "tensors", "model")
    ]
    assert all(len(one["gb_per_second"]) == 2 and one["share"] > 0 for one in data["figures"])
    assert json.loads((tmp_path / "o.json").read_text()) == data


def test_slices_and_blocks_are_read_the_same_way(tmp_path: Path) -> None:
    sliced = [run(BenchLoadOptions(str(LLAMA), tp=2, rank=rank, device="cpu", rounds=1)).data["bytes"] for rank in range(2)]
    whole = run(BenchLoadOptions(str(LLAMA), device="cpu", rounds=1)).data
    norms = sum(ref.nbytes for name, ref in open_checkpoint(LLAMA).tensors.items() if "norm" in name)
    assert sum(sliced) == whole["bytes"] + norms
    assert whole["bytes"] == open_checkpoint(LLAMA).nbytes
    convert.run(ConvertOptions(str(LLAMA), tmp_path / "m.gguf", "gguf"))
    assert run(BenchLoadOptions(str(tmp_path / "m.gguf"), device="cpu", rounds=1)).data["files"] == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"path": str(LLAMA), "tp": 2, "rank": 2}, "--rank: is 2, expected 0 to 1"),
        ({"path": "SHARDS", "tp": 3}, "was cut for 2 ranks, --tp says 3, expected --tp 2"),
        ({"path": "SHARDS", "rank": 2}, "has no rank 2, expected 0 to 1"),
        ({"path": "nowhere"}, "nowhere: no such file or directory"),
    ],
)
def test_what_cannot_be_loaded_is_refused(shards: Path, options: dict[str, object], line: str) -> None:
    options = options | {"path": str(shards) if options["path"] == "SHARDS" else options["path"]}
    with pytest.raises(InputError) as caught:
        run(BenchLoadOptions(**options, device="cpu"))  # type: ignore[arg-type]
    assert line in caught.value.line


def test_a_plain_read_reads_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_load, "CHUNK_BYTES", 1000)
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(2500))
    asked: list[tuple[str, int, int]] = []
    read_rows = bench_load.fs.read_rows

    def counted(path: Path, offset: int, stride: int, out: np.ndarray) -> None:
        asked.append((path.name, offset, out.nbytes))
        read_rows(path, offset, stride, out)

    monkeypatch.setattr(bench_load.fs, "read_rows", counted)
    for keep in (True, False):
        asked.clear()
        assert bench_load._read(files, keep=keep) == 5000
        assert sorted(asked) == [(name, begin, size) for name in "ab" for begin, size in ((0, 1000), (1000, 1000), (2000, 500))]


def test_a_read_that_fails_leaves_none_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_load, "CHUNK_BYTES", 10)
    file = tmp_path / "a"
    file.write_bytes(bytes(10_000))
    asked: list[int] = []

    def fails(path: Path, offset: int, stride: int, out: np.ndarray) -> None:
        asked.append(offset)
        time.sleep(0.01)
        raise InputError(str(path), "fails")

    monkeypatch.setattr(bench_load.fs, "read_rows", fails)
    for keep in (True, False):
        asked.clear()
        with pytest.raises(InputError, match="fails"):
            bench_load._read([file, file], keep=keep)
        assert len(asked) < 500


def test_memory_of_one_file_at_a_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, arrays, held = [tmp_path / name for name in "abc"], list[weakref.ref[np.ndarray]](), list[int]()
    for file in files:
        file.write_bytes(bytes(100))
    read_rows = bench_load.fs.read_rows

    def counted(path: Path, offset: int, stride: int, out: np.ndarray) -> None:
        arrays.append(weakref.ref(out.base))
        held.append(sum(each() is not None for each in arrays))
        read_rows(path, offset, stride, out)

    monkeypatch.setattr(bench_load.fs, "read_rows", counted)
    assert bench_load._read(files, keep=True) == 300
    assert held == [1, 1, 1]


def test_a_file_that_cannot_be_mapped_counts_as_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(1 << 20))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(bench_load.mmap, "mmap", refuse)
    assert bench_load._cached([file]) == 1


def test_the_page_cache_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(1 << 20))
    assert bench_load._cached([file]) == 1
    bench_load._drop([file])  # not written to the disk yet, so it stays
    with file.open("rb") as written:
        bench_load.os.fsync(written.fileno())
    bench_load._drop([file])
    if bench_load._cached([file]) == 1:
        pytest.skip("this file system keeps its files in memory")
    assert bench_load._cached([file]) < 0.1
    assert bench_load._warnings(0.5) and not bench_load._warnings(0.0)
