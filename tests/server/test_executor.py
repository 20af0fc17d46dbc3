"""Ranks that are really spawned: the same text, an error from a rank as it was, and every way to die noticed within seconds."""

from __future__ import annotations

import gc
import os
import queue
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_fixtures import heard_at

from quantkit import fs
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.errors import InputError, QuantkitError, RuntimeDied
from quantkit.runtime import executor as executor_module
from quantkit.runtime.engine import Delta, Engine, SamplingParams
from quantkit.runtime.executor import RankExecutor
from quantkit.runtime.start import start_engine
from quantkit.shard import rank_file, shard_checkpoint

LLAMA = Path(__file__).parent.parent / "data" / "models" / "llama"
PARAMS = SamplingParams(16, temperature=0, ignore_eos=True)


def ask(engine: Engine, text: str, params: SamplingParams = PARAMS) -> str:
    said: queue.SimpleQueue[Delta | QuantkitError] = queue.SimpleQueue()
    engine.submit(engine.tokenizer.encode(text, special=True), params, said.put)
    out = ""
    while True:
        delta = said.get(timeout=60)
        if isinstance(delta, QuantkitError):
            raise delta
        out += delta.text
        if delta.finish_reason is not None:
            return out


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and only waits for its parent does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """How long it took until ``condition`` held; fails after ``seconds``."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "too late"
        time.sleep(0.02)
    return time.monotonic() - start


def pids(engine: Engine) -> tuple[int, ...]:
    assert isinstance(engine._executor, RankExecutor)
    return tuple(rank.process.pid for rank in engine._executor.ranks)


@pytest.fixture(scope="module")
def one_rank() -> str:
    """What one rank in this process says."""
    engine = start_engine(str(LLAMA), device="cpu", parity=True)
    try:
        return ask(engine, "The capital")
    finally:
        engine.close()


def test_two_ranks_say_what_one_says_and_a_killed_rank_is_noticed(one_rank: str) -> None:
    """From a checkpoint, cut as it is read; then SIGKILL while nothing runs."""
    engine = start_engine(str(LLAMA), tp=2, device="cpu", parity=True)
    try:
        assert engine.tp == len(set(pids(engine))) == 2
        assert ask(engine, "The capital") == one_rank
        seeded = SamplingParams(16, seed=5, ignore_eos=True)
        assert ask(engine, "The capital", seeded) == ask(engine, "The capital", seeded) != one_rank
        os.kill(pids(engine)[1], signal.SIGKILL)
        wait_for(lambda: engine.failure is not None, 20)
        assert engine.failure is not None
        assert engine.failure.line == "rank 1: was killed by SIGKILL, expected every rank alive"  # and not a warning that it wrote once
        with pytest.raises(RuntimeDied, match="rank 1"):
            ask(engine, "The capital")
        assert not any(map(alive, pids(engine)))
    finally:
        engine.close()


def test_a_shard_directory_brings_its_ranks_and_a_hung_rank_is_noticed(
    tmp_path: Path, one_rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then SIGSTOP of a rank in the middle of an answer: the request gets the error, and both ranks are ended."""
    monkeypatch.setattr(executor_module, "SILENT_SECONDS", 3.0)
    shard_checkpoint(open_checkpoint(LLAMA), tmp_path / "shards", 2, overwrite=False)
    with pytest.raises(InputError, match="was cut for 2 ranks, --tp says 3"):
        start_engine(str(tmp_path / "shards"), tp=3)
    engine = start_engine(str(tmp_path / "shards"), device="cpu", parity=True)
    try:
        assert ask(engine, "The capital") == one_rank
        os.kill(pids(engine)[1], signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(RuntimeDied, match="rank 1: has said nothing for 3 s"):
            ask(engine, "The capital")
        assert time.monotonic() - start < 20
        assert not any(map(alive, pids(engine)))
    finally:
        engine.close()


def test_an_error_of_a_rank_comes_back_as_it_was(tmp_path: Path) -> None:
    """Rank 1's file is cut short: an InputError that names it, while rank 0 waits for a rank that will not come."""
    shards = tmp_path / "shards"
    shard_checkpoint(open_checkpoint(LLAMA), shards, 2, overwrite=False)
    file = shards / rank_file(1, 2)
    data = fs.read_bytes(file, 1 << 30)
    file.write_bytes(data[:-10])
    start = time.monotonic()
    with pytest.raises(InputError, match=r"rank-1-of-2\.safetensors") as caught:
        start_engine(str(shards), device="cpu")
    assert caught.value.exit_code == 2 and time.monotonic() - start < 30


PARENT = """
import sys, time
from quantkit.runtime.start import start_engine
engine = start_engine(sys.argv[1], tp=2, device="cpu")
print(*(rank.process.pid for rank in engine._executor.ranks), flush=True)
time.sleep(600)
"""


def test_no_rank_outlives_its_parent(tmp_path: Path) -> None:
    """The parent is killed and cannot say goodbye: nothing runs on, and no file is left."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(LLAMA)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout is not None
        ranks = parent.stdout.readline().split()
        assert len(ranks) == 2 and all(alive(int(pid)) for pid in ranks)
        parent.kill()
        parent.wait()
        wait_for(lambda: not any(alive(int(pid)) for pid in ranks), 15)
        assert list(tmp_path.iterdir()) == []
    finally:
        parent.kill()
        parent.wait()


def test_ranks_listen_on_loopback_alone_and_close_leaves_nothing_behind() -> None:
    engine = start_engine(str(LLAMA), tp=2, device="cpu")
    ranks = pids(engine)
    assert all(map(alive, ranks))
    assert heard_at(ranks) == {"127.0.0.1"}
    engine.close()
    engine.close()
    assert not any(map(alive, ranks)) and engine.failure is None


def test_a_closed_engine_in_this_process_lets_go_of_its_model() -> None:
    engine = start_engine(str(LLAMA), device="cpu")
    decoder = weakref.ref(engine._executor.runner.decoder)
    assert ask(engine, "The capital") and decoder() is not None
    engine.close()
    gc.collect()
    assert decoder() is None, "whoever holds the engine holds no weights"
    with pytest.raises(RuntimeDied, match="closed"):
        ask(engine, "The capital")


def test_a_rank_that_never_says_a_word_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that still import torch when their time is up."""
    monkeypatch.setattr(executor_module, "START_SECONDS", 0.2)
    with pytest.raises(RuntimeDied, match=r"rank 0: has said nothing for 0 s"):
        start_engine(str(LLAMA), tp=2, device="cpu")
