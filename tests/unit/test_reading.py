"""Reading ahead: every piece lands in its place, in load order, within bounds; and a read that fails ends the load."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from decoder_fixtures import MemoryCheckpoint, awq_checkpoint, config_of, plan_of, random_twin
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_load import assigned, sliced

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.comm import thread_group
from quantkit.errors import InputError
from quantkit.geometry import FLOATS
from quantkit.model import reading
from quantkit.model.load import load_decoder
from quantkit.model.reading import ReadAhead, Wanted, pieces

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), limit=st.integers(1, 300), item=st.sampled_from([1, 2, 4]))
def test_pieces_are_small_and_lie_one_after_the_other(data: st.DataObject, limit: int, item: int) -> None:
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    index = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    whole = np.arange(np.prod(shape)).reshape(shape)
    found, end = [], 0
    for part, begin, nbytes in pieces(tuple(index), item, limit):
        assert begin == end and nbytes == whole[part].size * item and (nbytes <= limit or nbytes == item)
        found.append(whole[part].reshape(-1))
        end += nbytes
    want = whole[tuple(index)].reshape(-1)
    assert end == want.size * item
    assert np.array_equal(np.concatenate(found) if found else want[:0], want)


SHAPES = {"table": (300, 64), "norm": (64,), "wide": (3, 70_000), "cut": (200, 160), "stack": (3, 40, 30), "none": (0, 8), "one": ()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root, rng = tmp_path_factory.mktemp("reading"), np.random.default_rng(0)
    (root / "config.json").write_text(json.dumps({"model_type": "none"}))
    save_file({name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}, root / "model.safetensors")
    return open_checkpoint(root)


def wanted() -> list[Wanted]:
    parts: dict[str, tuple[slice, ...]] = {
        "cut": (slice(7, 190), slice(30, 150)),
        "stack": (slice(1, 3), slice(0, 40), slice(3, 9)),
        "wide": (slice(0, 3), slice(5, 69_999)),
    }
    whole = {name: tuple(slice(0, size) for size in shape) for name, shape in SHAPES.items()}
    found = [Wanted(name, shape, FLOATS, parts.get(name, whole[name]), 5 if name == "table" else 0) for name, shape in SHAPES.items()]
    flat = Wanted("cut", (200, 160), FLOATS, (slice(3, 9), slice(0, 800)), 0, (40, 800))
    return [*found, flat, Wanted("norm", None, FLOATS, ()), found[0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("chunk", "ahead"), [(1000, 1), (1000, 20_000), (64, 1 << 30), (1 << 20, 1 << 20)])
def test_what_is_taken_is_what_lies_there(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, device: str, chunk: int, ahead: int
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(reading, "AHEAD_BYTES", ahead)
    told: list[tuple[int, int]] = []
    with ReadAhead(checkpoint, wanted(), device, lambda stage, done, total: told.append((done, total))) as reader:
        for want in wanted():
            value = reader.take(want)
            expected = checkpoint.read(want.name, want.index if want.shape is not None else None, want.view)
            assert value.device.type == device and value.dtype == torch.float32
            expected = expected.reshape(expected.shape or (1,))
            assert value.shape == (expected.shape[0] + want.pad_rows, *expected.shape[1:]), want.name
            assert np.array_equal(value[: len(expected)].cpu().numpy(), expected), want.name
            assert not value[len(expected) :].any()
    sizes = [done for done, _ in told]
    assert sizes == sorted(set(sizes)) and told[-1] == (told[-1][1], sum(want.nbytes(checkpoint) for want in wanted()))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_read_and_not_taken_is_bounded(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """While the model works on a tensor, no more than the bound and one tensor is read ahead of it."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 2560)
    monkeypatch.setattr(reading, "AHEAD_BYTES", 20_000)
    read = 0
    lock, fill = threading.Lock(), Checkpoint.fill

    def counted(self: Checkpoint, out: np.ndarray, name: str, index: tuple[slice, ...], view: tuple[int, ...] | None = None) -> None:
        nonlocal read
        with lock:
            read += out.nbytes
        fill(self, out, name, index, view)

    monkeypatch.setattr(Checkpoint, "fill", counted)
    rows = [Wanted("table", (300, 64), FLOATS, (slice(row, row + 30), slice(0, 64))) for row in range(0, 300, 30)]  # 7680 bytes each
    with ReadAhead(checkpoint, rows, device) as reader:
        for taken, want in enumerate(rows):
            reader.take(want)
            reader._pool.submit(int).result()  # all that was asked for before has been begun
            assert (taken + 1) * 7680 <= read <= (taken + 1) * 7680 + 20_000 + 7680
        assert read == 300 * 64 * 4


@pytest.mark.parametrize("device", DEVICES)
def test_a_failing_read_ends_the_load_and_its_threads(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    preadv, reads = os.preadv, 0

    def fails(fd: int, views: list[memoryview], at: int) -> int:
        nonlocal reads
        reads += 1
        if reads > 20:
            raise OSError(5, "Input/output error")
        return preadv(fd, views, at)

    monkeypatch.setattr(os, "preadv", fails)
    before = threading.active_count()
    with (
        pytest.raises(Exception, match=r"model\.safetensors: cannot read it \(Input/output error\)"),
        ReadAhead(checkpoint, wanted(), device) as reader,
    ):
        for want in wanted():
            reader.take(want)
    assert threading.active_count() == before


def test_a_file_cut_short_while_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none"}))
    save_file({"a": np.zeros((64, 1000), np.float32)}, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    end = found.tensors["a"].offset + 64 * 4000
    os.truncate(tmp_path / "model.safetensors", end - 10)
    want = Wanted("a", (64, 1000), FLOATS, (slice(0, 64), slice(0, 1000)))
    with (
        pytest.raises(InputError, match=rf"model\.safetensors: ends at byte {end - 10}, expected {end} bytes"),
        ReadAhead(found, [want]) as reader,
    ):
        reader.take(want)


PACKED = {
    "awq": (config_of("qwen2-full") | {"head_dim": 16, "intermediate_size": 96}, 16),
    "awq-fused": (config_of("phi3") | {"head_dim": 16, "intermediate_size": 96, "tie_word_embeddings": True}, 16),
    "awq-experts": (config_of("qwen3-moe") | {"head_dim": 16, "moe_intermediate_size": 32, "tie_word_embeddings": True}, 16),
}


FLOAT = ("llama-biases", "qwen3-bias-sliding", "gemma2", "gemma3", "phi3", "gpt2", "mixtral", "qwen2-moe-steps", "qwen3-moe-dense-first")


@pytest.mark.parametrize("family", [*FLOAT, *PACKED])
@pytest.mark.parametrize("tp", [1, 4])
def test_a_rank_file_is_read_from_its_beginning_to_its_end(family: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which tensors are loaded is the order in which they lie."""
    monkeypatch.setattr(reading, "READERS", 1)
    whole = awq_checkpoint(*PACKED[family]) if family in PACKED else random_twin(config_of(family))[1]
    for comm in thread_group(tp):
        rank: MemoryCheckpoint = sliced(whole, tp, comm.rank)
        load_decoder(rank, dtype=torch.float32, plan=plan_of(whole, tp), comm=comm, presliced=assigned(whole))
        order = list(dict.fromkeys(name for name, _ in rank.reads))
        assert order == [name for name in rank.values if rank.values[name].numel() and name in order]
        assert set(order) == {name for name, value in rank.values.items() if value.numel()}
