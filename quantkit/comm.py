"""How ranks exchange tensors: alone, as threads of one process, or as processes over torch.distributed.

Every sum is made in rank order, in float32 for half-precision tensors, by whoever needs it: all ranks hold the same bits,
and they are the same bits for threads and for processes. This module knows no model and no plan.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from quantkit.errors import InputError, MachineError, RuntimeDied

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined, unused-ignore]

T = TypeVar("T")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The variables that say over which network interface the ranks' exchanges go."""
_NO_MULTICAST: Mapping[str, str] = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast stays off: a process that dies with it may leave the GPUs of a host unusable, and small sums do not need it."""
SCATTER_ELEMENTS = 1 << 16
"""From this size on a sum is cut among the ranks: one more exchange, but no rank receives whole tensors from all others."""


class Comm(Protocol):
    """A rank's view of its group. Every rank calls the same methods in the same order with tensors of the same shape.

    Raises RuntimeDied when another rank is gone or does not come within the group's timeout.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x`` (same shape, dtype), in rank order; identical bits on every rank."""

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """The ranks' ``x`` concatenated along ``dim``, where rank r brings ``sizes[r]`` (0 is fine)."""

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """``source``'s tensor on every rank; elsewhere ``x`` gives its shape and dtype."""

    def agree(self, yes: bool) -> bool:
        """Whether every rank says yes. Waited for on the host."""

    def barrier(self) -> None:
        """Return when every rank has called this."""

    def close(self) -> None:
        """Leave the group."""


def _ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """``((p0 + p1) + p2) + ...``, in float32 where the parts are narrower, returned in their dtype."""
    dtype = parts[0].dtype
    work = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(work, copy=True)
    for part in parts[1:]:
        total += part  # widened as it is added
    return total.to(dtype)


def _check_sizes(x: Tensor, sizes: Sequence[int], dim: int, rank: int, size: int) -> None:
    assert len(sizes) == size and x.shape[dim] == sizes[rank], (tuple(x.shape), list(sizes), dim, rank)


class Solo:
    """The group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        _check_sizes(x, sizes, dim, 0, 1)
        return x

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        assert source == 0
        return x

    def agree(self, yes: bool) -> bool:
        return yes

    def barrier(self) -> None:
        return

    def close(self) -> None:
        return


class _Table:
    """What the threads of a group share: one slot each, and the barrier before and after they are read."""

    def __init__(self, size: int, timeout: float) -> None:
        self.slots: list[Tensor | None] = [None] * size
        self.gate = threading.Barrier(size, timeout=timeout)

    def wait(self, rank: int) -> None:
        try:
            self.gate.wait()
        except threading.BrokenBarrierError as exc:
            raise RuntimeDied(f"rank {rank}", "another rank of the group stopped or is late", "all ranks in every exchange") from exc


class ThreadComm:
    """A rank of a group of threads in one process; made by ``thread_group``."""

    def __init__(self, rank: int, size: int, table: _Table) -> None:
        self.rank, self.size = rank, size
        self._table = table

    def _exchange(self, x: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Show ``x`` to all ranks and combine what they show; nobody goes on before all have combined."""
        self._table.slots[self.rank] = x
        self._table.wait(self.rank)
        shown = [slot for slot in self._table.slots if slot is not None]
        result = combine(shown)
        self._table.wait(self.rank)
        return result

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._exchange(x, _ordered_sum)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        _check_sizes(x, sizes, dim, self.rank, self.size)
        return self._exchange(x, lambda shown: torch.cat(shown, dim))

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        return self._exchange(x, lambda shown: shown[source].clone())

    def agree(self, yes: bool) -> bool:
        return bool(self._exchange(torch.tensor([yes]), torch.cat).all())

    def barrier(self) -> None:
        self._table.wait(self.rank)

    def close(self) -> None:
        """Leave the group: a rank that still waits for this one gets RuntimeDied."""
        self._table.gate.abort()


def thread_group(size: int, timeout: float = 60.0) -> list[ThreadComm]:
    """The ranks of a group of ``size`` threads; each is to be used by its own thread. ``timeout`` in seconds."""
    table = _Table(size, timeout)
    return [ThreadComm(rank, size, table) for rank in range(size)]


def run_threads(size: int, work: Callable[[Comm], T], timeout: float = 60.0) -> list[T]:
    """``work(comm)`` on ``size`` threads of one group; their results in rank order.

    When one fails the others are released, and the failure of the lowest rank that failed by itself is raised.
    """
    comms = thread_group(size, timeout)
    results: dict[int, T] = {}
    failures: dict[int, BaseException] = {}

    def run(comm: ThreadComm) -> None:
        try:
            results[comm.rank] = work(comm)
        except BaseException as exc:  # noqa: BLE001  raised again below, on the thread that waits
            failures[comm.rank] = exc
            comm.close()

    threads = [threading.Thread(target=run, args=(comm,), name=f"rank-{comm.rank}", daemon=True) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        own = [rank for rank, exc in sorted(failures.items()) if not isinstance(exc, RuntimeDied)]
        raise failures[own[0] if own else min(failures)]
    return [results[rank] for rank in range(size)]


class Sums(Protocol):
    """A way of its own to sum some tensors."""

    def takes(self, x: Tensor) -> bool:
        """Whether it sums tensors like ``x``: the same on every rank."""

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, as ``Comm.all_reduce`` makes it."""


class ProcessComm:
    """A rank of a group of processes: gloo for tensors on the CPU, NCCL for tensors on a GPU.

    ``sums``, where a caller has set it on every rank, makes the sums that it takes. On a GPU all exchanges but ``agree`` and ``barrier``
    can be captured in a CUDA graph, once each kind has run before: they wait for nothing on the host.

    ``store`` is a file that all ranks of this run, and no other run, can see, or a store (``serve_store``, ``join_store``). Exchanges
    go over loopback, unless GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name an interface. With gloo an exchange that passes
    ``timeout`` seconds raises RuntimeDied; with NCCL torch's own watchdog ends the process then.
    """

    def __init__(self, rank: int, size: int, store: Path | Store, *, backend: str, timeout: float = 60.0) -> None:
        import torch.distributed as dist

        if backend not in ("gloo", "nccl"):
            raise InputError("backend", f"is {backend!r}", "gloo or nccl")
        if not dist.is_available() or (backend == "nccl" and not dist.is_nccl_available()):
            raise MachineError(
                "torch.distributed", f"has no {backend}", "a torch build with it", "pip install a build of torch for this machine"
            )
        if dist.is_initialized():
            raise MachineError("torch.distributed", "is in use in this process", "one group per process")
        _use_loopback()
        os.environ.update(_NO_MULTICAST)
        self.rank, self.size = rank, size
        self.sums: Sums | None = None
        self._device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        self._dist = dist
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it
        with self._watched("start"):
            meeting = dist.FileStore(str(store), size) if isinstance(store, Path) else store  # type: ignore[attr-defined, unused-ignore]
            meeting.set_timeout(timedelta(seconds=timeout))
            dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))

    @contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as exc:  # torch raises nothing narrower for a closed connection or a timeout
            reason = str(exc).strip().splitlines() or [type(exc).__name__]
            raise RuntimeDied(f"rank {self.rank}", f"{what} failed ({reason[-1]})", "every rank alive and in time") from exc

    def _gathered(self, x: Tensor, what: str) -> Tensor:
        """Every rank's ``x``, all of one shape: ``[R, *shape]``. Moved as bytes, so that any dtype goes through any backend."""
        out = x.new_empty(self.size, *x.shape)
        if out.numel():
            with self._watched(what):
                self._all_gather(_bytes(out), _bytes(x.contiguous()))
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.sums is not None and self.sums.takes(x):
            return self.sums(x)
        if x.is_cuda and self.size == 2 and x.is_floating_point() and x.itemsize > 1:
            return self._sum_of_two(x)
        if x.numel() < SCATTER_ELEMENTS:
            return _ordered_sum(self._gathered(x, "all_reduce").unbind())
        flat = x.contiguous().view(-1)
        mine = torch.nn.functional.pad(flat, (0, -flat.numel() % self.size))
        received = torch.empty_like(mine)
        with self._watched("all_reduce"):
            self._dist.all_to_all_single(_bytes(received), _bytes(mine))
        part = _ordered_sum(received.view(self.size, -1).unbind())  # [numel/R]
        return self._gathered(part, "all_reduce").view(-1)[: flat.numel()].view(x.shape)

    def _sum_of_two(self, x: Tensor) -> Tensor:
        """The sum of two ranks by NCCL: two numbers have one sum in either order, and to round it in float32 first changes nothing."""
        total = x.clone(memory_format=torch.contiguous_format)
        if total.numel():
            with self._watched("all_reduce"):
                self._dist.all_reduce(total)
        return total

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        _check_sizes(x, sizes, dim, self.rank, self.size)
        front = x.movedim(dim, 0)
        missing = max(sizes) - front.shape[0]
        if missing:
            front = torch.cat([front, front.new_zeros(missing, *front.shape[1:])])
        parts = self._gathered(front, "all_gather")
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        result = x.contiguous().clone()
        if result.numel():
            with self._watched("broadcast"):
                self._dist.broadcast(_bytes(result), source)
        return result

    def agree(self, yes: bool) -> bool:
        return bool(self._gathered(torch.tensor(yes, device=self._device), "agree").all())

    def barrier(self) -> None:
        with self._watched("barrier"):
            self._dist.barrier()

    def close(self) -> None:
        if self._dist.is_initialized():
            self._dist.destroy_process_group()


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous ``x`` as bytes."""
    return x.view(-1).view(torch.uint8)


def _use_loopback() -> None:
    """Keep gloo and NCCL on this host unless the user chose an interface: by default they bind to what the host name resolves to."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:
        for variable in INTERFACES:
            os.environ.setdefault(variable, loopback)


def serve_store(host: str, size: int, timeout: float) -> tuple[Store, int]:
    """Where ``size`` ranks on several hosts meet, served by this process at the address ``host`` alone, and its port.

    Raises RuntimeDied where it cannot listen.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined, unused-ignore]

    with _store_failures(host), socket.create_server((host, 0), family=_family(host)) as listener:
        port = int(listener.getsockname()[1])
        store = TCPStore(
            host, port, size, True, timedelta(seconds=timeout), wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )
        return store, port


def join_store(host: str, port: int, size: int, timeout: float) -> Store:
    """The store that another rank serves at ``host`` and ``port``. Raises RuntimeDied when it does not answer in ``timeout`` seconds."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined, unused-ignore]

    with _store_failures(f"{host}:{port}"):
        return TCPStore(host, port, size, False, timedelta(seconds=timeout), wait_for_workers=False)


@contextmanager
def _store_failures(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as exc:  # torch's errors of a network are RuntimeErrors
        reason = str(exc).strip().splitlines() or [type(exc).__name__]
        raise RuntimeDied(where, f"cannot be met at ({reason[0][:300]})", "hosts that reach one another") from exc


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
