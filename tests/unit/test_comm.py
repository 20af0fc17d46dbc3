"""Groups of threads and of processes give the same bits; a rank that stops or is late ends the others with RuntimeDied."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_fixtures import heard_at
from torch import Tensor

from quantkit.comm import Comm, ProcessComm, Solo, join_store, run_threads, serve_store, thread_group
from quantkit.errors import InputError, MachineError, RuntimeDied
from quantkit.ops import symmetric
from quantkit.ops.symmetric import FLAGGED, ONE_SHOT, TWO_SHOT, open_sums

SHAPES = [(0, 4), (3, 5), (300, 257)]
"""Nothing, a small sum, and one that is cut among the ranks and does not divide by their number."""


def piece(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator) * 10.0 ** (rank * 2)).to(dtype)


def exercise(comm: Comm, device: str = "cpu") -> dict[str, Tensor]:
    """One of everything; the same on every rank and for every kind of group."""
    out = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in SHAPES:
            out[f"sum {dtype} {shape}"] = comm.all_reduce(piece(comm.rank, shape, dtype).to(device))
    sizes = [3 * ((rank + 1) % comm.size) for rank in range(comm.size)]  # the last rank brings nothing
    for dim, shape in ((-1, (4, sizes[comm.rank])), (0, (sizes[comm.rank], 4))):
        out[f"gather {dim}"] = comm.all_gather(piece(comm.rank, shape, torch.bfloat16).to(device), sizes, dim)
    out["gather nothing"] = comm.all_gather(torch.empty(4, 0, device=device), [0] * comm.size)
    out["gather no rows"] = comm.all_gather(torch.empty(0, sizes[comm.rank], device=device), sizes)
    out["broadcast"] = comm.broadcast(torch.tensor([comm.rank, 7], device=device), comm.size - 1)
    comm.barrier()
    return {name: value.cpu() for name, value in out.items()}


def ordered(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    work = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.zeros(shape, dtype=work)
    for rank in range(size):
        total = total + piece(rank, shape, dtype).to(work)
    return total.to(dtype)


def test_ranks_agree_when_all_say_yes() -> None:
    for size in (1, 3):
        assert run_threads(size, lambda comm: comm.agree(True)) == [True] * size
        assert run_threads(size, lambda comm: comm.agree(comm.rank != comm.size - 1)) == [False] * size
    assert Solo().agree(True) and not Solo().agree(False)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_threads(size: int) -> None:
    results = run_threads(size, exercise)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in SHAPES:
            assert torch.equal(results[0][f"sum {dtype} {shape}"], ordered(size, shape, dtype))
    sizes = [3 * ((rank + 1) % size) for rank in range(size)]
    assert torch.equal(results[0]["gather -1"], torch.cat([piece(r, (4, n), torch.bfloat16) for r, n in enumerate(sizes)], 1))
    assert torch.equal(results[0]["gather 0"], torch.cat([piece(r, (n, 4), torch.bfloat16) for r, n in enumerate(sizes)], 0))
    assert results[0]["gather no rows"].shape == (0, sum(sizes)) and results[0]["gather nothing"].shape == (4, 0)
    assert results[0]["broadcast"].tolist() == [size - 1, 7]
    for other in results[1:]:
        assert all(torch.equal(other[key], value) for key, value in results[0].items())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 3))
def test_gather_puts_back_any_cut(sizes: list[int], rows: int) -> None:
    whole = torch.arange(float(rows * sum(sizes))).view(rows, sum(sizes))
    cuts = whole.split(sizes, 1)
    assert all(torch.equal(got, whole) for got in run_threads(len(sizes), lambda comm: comm.all_gather(cuts[comm.rank], sizes)))


def test_a_sum_does_not_depend_on_what_its_owner_does_next() -> None:
    def work(comm: Comm) -> Tensor:
        x = torch.ones(4)
        total = comm.all_reduce(x)
        x.fill_(100.0)
        return total

    for _ in range(20):
        assert all(total.tolist() == [3.0] * 4 for total in run_threads(3, work))


def test_solo_is_a_group_of_one() -> None:
    assert exercise(Solo()).keys() == run_threads(1, exercise)[0].keys()


def test_a_thread_that_fails_releases_the_others_and_its_error_is_raised() -> None:
    def work(comm: Comm) -> None:
        if comm.rank == 1:
            raise ValueError("broken")
        comm.barrier()

    start = time.monotonic()
    with pytest.raises(ValueError, match="broken"):
        run_threads(3, work, timeout=30)
    assert time.monotonic() - start < 10


def test_a_thread_that_is_late_is_an_error() -> None:
    first, _ = thread_group(2, timeout=0.05)
    with pytest.raises(RuntimeDied, match="rank 0"):
        first.all_reduce(torch.ones(1))


def test_a_thread_that_leaves_is_an_error() -> None:
    first, second = thread_group(2, timeout=30)
    threading.Timer(0.05, second.close).start()
    with pytest.raises(RuntimeDied):
        first.barrier()


RANK = """
import os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from quantkit.comm import ProcessComm
from quantkit.errors import RuntimeDied
from test_comm import exercise
rank, size, root = int(sys.argv[1]), 2, Path(sys.argv[2])
comm = ProcessComm(rank, size, root / "store", backend="gloo", timeout=5.0)
torch.save(exercise(comm), root / f"rank{rank}.pt")
assert comm.agree(True) and not comm.agree(rank == 0) and not comm.agree(False)
comm.barrier()
if rank == 1:
    sys.exit(0)  # dies without a word
start = time.monotonic()
try:
    comm.all_reduce(torch.ones(8))
except RuntimeDied as exc:
    assert time.monotonic() - start < 20, "late"
    print("RuntimeDied", exc.line, flush=True)
    os._exit(exc.exit_code)  # as a rank does: the threads of a broken group may abort an interpreter that ends in good order
"""


def test_processes_give_the_bits_of_threads_and_notice_a_death(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert ranks[1].returncode == 0, said[1]
    assert ranks[0].returncode == RuntimeDied.exit_code and "RuntimeDied rank 0: all_reduce failed" in said[0], said[0]
    want = run_threads(2, exercise)[0]
    for rank in range(2):
        got = torch.load(tmp_path / f"rank{rank}.pt")
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], value) for key, value in want.items())


def test_a_missing_rank_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeDied, match="start failed"):
        ProcessComm(0, 2, tmp_path / "store", backend="gloo", timeout=0.3)


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gloo or nccl"):
        ProcessComm(0, 1, tmp_path / "store", backend="mpi")


def test_a_rank_that_cannot_share_memory_keeps_all_to_nccl(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def possible(group: Comm, device: torch.device) -> None:
        if group.rank == 1:
            raise MachineError("GPU 1", "is odd", "an even one")

    monkeypatch.setattr(symmetric, "_possible", possible)
    monkeypatch.setattr(symmetric, "_near", lambda *_: pytest.fail("a rank went on"))
    assert run_threads(2, lambda comm: open_sums(comm, torch.device("cpu"), 1.0)) == [None, None]
    (said,) = caplog.messages
    assert said.startswith("warning: sums over the GPUs go through NCCL") and "cannot be used by another rank" in said


GPU_RANK = """
import sys
from pathlib import Path
import torch
from quantkit.comm import ProcessComm
from test_comm import sums_on_gpus
rank, root = int(sys.argv[1]), Path(sys.argv[2])
torch.cuda.set_device(rank)
comm = ProcessComm(rank, 2, root / "store", backend="nccl", timeout=30.0)
torch.save(sums_on_gpus(comm), root / f"rank{rank}.pt")
comm.close()
"""


def sums_on_gpus(comm: ProcessComm) -> dict[str, Tensor]:
    """Sums of two GPUs by NCCL and through symmetric memory, alone, one after another and in graphs, against sums made in one place."""
    device = torch.device("cuda", comm.rank)
    out = {f"nccl {name}": value for name, value in exercise(comm, str(device)).items()}
    _check_graphs(comm, device)
    found = open_sums(comm, device, 20.0)
    assert found is not None, "see what was logged"
    comm.sums = found
    out |= {f"symmetric {name}": value for name, value in exercise(comm, str(device)).items()}
    taken = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for nbytes in (2, 4, 6, 30, 100, 8192, 10240, 65536, 65538, 262144, 262148, 1 << 20, 4 << 20, (4 << 20) + 8):
            count = nbytes // dtype.itemsize
            if not count:
                continue
            x, want = piece(comm.rank, (count,), dtype).to(device), ordered(2, (count,), dtype)
            taken.append(found.takes(x))
            assert taken[-1] == (nbytes <= 4 << 20)
            assert torch.equal(comm.all_reduce(x).cpu(), want), (dtype, nbytes)
            for mode in (FLAGGED, ONE_SHOT, TWO_SHOT):
                if nbytes <= found.mode_limit(mode):
                    assert torch.equal(found.sum(x, mode).cpu(), want), (dtype, nbytes, mode)
    assert any(taken) and not all(taken)
    assert not found.takes(torch.zeros(4, dtype=torch.float64, device=device)) and not found.takes(torch.zeros(4))
    odd = piece(comm.rank, (101,), torch.bfloat16).to(device)[1:]  # not aligned
    assert torch.equal(comm.all_reduce(odd).cpu(), ordered(2, (101,), torch.bfloat16)[1:])
    _check_repeated(comm, device)
    _check_graphs(comm, device)
    if comm.rank == 1:
        time.sleep(1.0)  # late, and waited for
    assert float(comm.all_reduce(torch.ones(4, device=device))[0]) == 2.0
    return out


def _check_repeated(comm: ProcessComm, device: torch.device) -> None:
    """A thousand sums of other data and lengths, none waited for, some by NCCL among them."""
    generator = torch.Generator(device).manual_seed(0)
    base = torch.randn(2, 1 << 19, device=device, generator=generator).bfloat16()  # both ranks' data, on both
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for number in range(1000):
        count = (5, 5120, 40000, 140000)[number % 4] if number % 50 else 1 << 19
        parts = (base[:, :count].float() * (number % 7 + 1) + number).bfloat16()
        wrong += (comm.all_reduce(parts[comm.rank]) != (parts[0].float() + parts[1].float()).bfloat16()).sum()
    assert int(wrong) == 0


def _check_graphs(comm: ProcessComm, device: torch.device) -> None:
    """A graph of sums of several lengths and a gather, replayed with other data, and with sums outside the graph between."""
    x = torch.zeros(150000, device=device)

    def work() -> Tensor:
        y = comm.all_reduce(x)
        for count in (8, 5120, 100000):
            y = torch.cat([comm.all_reduce(y[:count] * (comm.rank + 1)), y[count:]])
        return comm.all_gather(y[:1000], [1000, 1000], 0) + y[0]

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = work()
    for number in range(20):
        parts = [torch.full_like(x, float(number + rank)) + torch.arange(150000, device=device) % 64 for rank in range(2)]
        x.copy_(parts[comm.rank])
        graph.replay()
        want = parts[0] + parts[1]
        for count in (8, 5120, 100000):
            want = torch.cat([want[:count] * 1 + want[:count] * 2, want[count:]])
        assert torch.equal(found, torch.cat([want[:1000], want[:1000]]) + want[0]), number
        assert float(comm.all_reduce(torch.ones(3, device=device))[0]) == 2.0


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_the_bits_of_threads(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(GPU_RANK)
    paths = os.pathsep.join([str(Path(__file__).parent), *(path for path in sys.path if path)])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    want = run_threads(2, exercise)[0]
    for rank in range(2):
        got = torch.load(tmp_path / f"rank{rank}.pt")
        assert got.keys() == {f"{way} {name}" for way in ("nccl", "symmetric") for name in want}
        assert all(torch.equal(value, want[name.partition(" ")[2]]) for name, value in got.items())


def test_a_store_is_served_at_one_address_and_a_missing_one_is_noticed() -> None:
    store, port = serve_store("127.0.0.1", 2, 10.0)
    other = join_store("127.0.0.1", port, 2, 10.0)
    other.set("who", "rank 1")
    assert store.get("who") == b"rank 1" and "127.0.0.1" in heard_at([os.getpid()])
    assert "0.0.0.0" not in heard_at([os.getpid()]) and "::" not in heard_at([os.getpid()])
    with pytest.raises(RuntimeDied, match=r"127\.0\.0\.1:9: cannot be met at"):
        join_store("127.0.0.1", 9, 2, 0.5)
    with pytest.raises(RuntimeDied, match=r"203\.0\.113\.9: cannot be met at"):
        serve_store("203.0.113.9", 2, 0.5)
