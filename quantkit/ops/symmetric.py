"""Sums over the GPUs of one host through PyTorch's symmetric memory: buffers that every rank maps, and kernels of ours that read them.

The kernels are in ``kernels/exchange``; they add in rank order, in float32, so the bits are those of ``quantkit.comm``. Nothing here
allocates during a pass but the result, and nothing waits on the host: a sum can be captured in a CUDA graph. NVLink multicast is never
used. This module knows of the group only what ``Group`` says.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from quantkit.errors import MachineError
from quantkit.ops.cuda_call import call, checked
from quantkit.ops.cuda_library import HINT, find_library, load_library

T = TypeVar("T")
_LOG = logging.getLogger("quantkit")
_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
MAX_RANKS = 8
FLAGGED, ONE_SHOT, TWO_SHOT = 0, 1, 2
"""How a sum is made; ``kernels/exchange/all_reduce.cu`` describes them."""
FLAGGED_BYTES = {2: 256 << 10}
"""The longest message that goes flagged, by ranks, where that was measured; of others ``_FLAGGED_BYTES``."""
_FLAGGED_BYTES = 16 << 10
_ONE_SHOT_BYTES = 256 << 10
"""The longest that goes in one shot where there are more than two ranks: each reads all parts. Two ranks always do."""
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
_FIRST_CALL = (1 << 31) - 16
"""Counters start shortly before they wrap, so that every self-test sees it."""
_P, _I, _I64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class _Peers(ctypes.Structure):
    """``QkPeers`` of ``kernels/exchange/exchange.h``."""

    _fields_ = (("buffers", _P * MAX_RANKS), ("rank", ctypes.c_int32), ("ranks", ctypes.c_int32), ("patience", ctypes.c_uint64))


_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "exchange_bytes": (_I64, (_I,)),
    "exchange_limit": (_I64, (_I,)),
    "exchange_begin": (_I, (ctypes.POINTER(_Peers), ctypes.c_uint32, _P)),
    "all_reduce": (_I, (ctypes.POINTER(_Peers), _P, _P, _I64, _I, _I, _P)),
}


@cache
def _functions() -> dict[str, Any]:
    """The kernels by name. Raises MachineError where they are not built, or the library is of other sources."""
    if find_library() is None:
        raise MachineError("CUDA kernels", "are not built", "quantkit's library", HINT)
    library = load_library()
    found = {}
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, f"quantkit_{name}")
        except AttributeError as exc:
            raise MachineError("CUDA kernels", f"lack quantkit_{name}", "a library of this version of quantkit", HINT) from exc
        function.argtypes, function.restype = arguments, result
        found[name] = function
    return found


class Group(Protocol):
    """What is asked of the group of ranks, each of which has a GPU. All are collectives."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def agree(self, yes: bool) -> bool:
        """Whether every rank says yes."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, in rank order, in float32."""

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """The ranks' ``x`` one after the other."""

    def barrier(self) -> None:
        """Return when every rank has called this."""


class SymmetricSums:
    """Sums of a group whose buffers are mapped; made by ``open_sums``. One stream at a time, the same calls on every rank."""

    def __init__(self, rank: int, buffers: list[Tensor], handle: Any, timeout: float) -> None:
        self.rank, self.size = rank, len(buffers)
        self._buffers, self._handle, self._device = buffers, handle, buffers[rank].device
        self._run = _functions()["all_reduce"]
        self._limit = self.mode_limit(ONE_SHOT)
        self._flagged_bytes = FLAGGED_BYTES.get(self.size, _FLAGGED_BYTES)
        addresses = (_P * MAX_RANKS)(*(buffer.data_ptr() for buffer in buffers))
        self._peers = _Peers(addresses, rank, self.size, int(timeout * 1e9))

    def begin(self) -> None:
        """Clear this rank's buffer. All ranks are to do so before one sums."""
        self._buffers[self.rank].zero_()
        code = call(_functions()["exchange_begin"], self._device, self._peers, _FIRST_CALL)
        checked("quantkit_exchange_begin", code, self._device)
        torch.cuda.synchronize(self._device)

    def mode(self, nbytes: int) -> int:
        """How ``nbytes`` are summed."""
        if nbytes <= self._flagged_bytes:
            return FLAGGED
        return ONE_SHOT if self.size == 2 or nbytes <= _ONE_SHOT_BYTES else TWO_SHOT

    def mode_limit(self, mode: int) -> int:
        """The most bytes that are summed in one way."""
        limit: int = _functions()["exchange_limit"](mode)
        return limit

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is summed here: it is on the GPU, of a dtype that the kernels know, and not too long. The same on every rank."""
        return x.is_cuda and x.dtype in _TYPES and 0 < x.nbytes <= self._limit

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, which ``takes`` has taken; a new tensor, contiguous."""
        return self.sum(x, self.mode(x.nbytes))

    def sum(self, x: Tensor, mode: int) -> Tensor:
        """The sum made in one way, of at most ``mode_limit`` bytes."""
        x = x.contiguous()
        if x.data_ptr() % 16:
            x = x.clone()
        out = torch.empty_like(x)
        code = call(self._run, self._device, self._peers, x.data_ptr(), out.data_ptr(), x.nbytes, _TYPES[x.dtype], mode)
        checked("quantkit_all_reduce", code, self._device)
        return out


def open_sums(group: Group, device: torch.device, timeout: float) -> SymmetricSums | None:
    """Sums of ``group`` through memory that all map, once a test of them has passed on every rank; None, and a warning, where that fails.

    ``timeout``: seconds that a rank may be late in a sum. A collective.
    """
    try:
        return _opened(group, device, timeout)
    except (MachineError, RuntimeError) as exc:  # RuntimeError: torch's, of memory that cannot be shared
        reason = exc.line.removeprefix("error: ") if isinstance(exc, MachineError) else (str(exc).strip().splitlines() or [repr(exc)])[0]
        if group.rank == 0:
            _LOG.warning("warning: sums over the GPUs go through NCCL, which takes longer for small ones (%s)", reason)
        return None


def _opened(group: Group, device: torch.device, timeout: float) -> SymmetricSums:
    """Raises MachineError or RuntimeError on every rank: each step is agreed on, so that nobody waits in the next for one that failed."""
    _together(group, lambda: _possible(group, device))
    _together(group, lambda: _near(group, device))
    sums = SymmetricSums(group.rank, *_together(group, lambda: _mapped(group, device)), timeout)
    sums.begin()
    group.barrier()
    _together(group, lambda: _test(group, sums, device))
    return sums


def _together(group: Group, step: Callable[[], T]) -> T:
    """What ``step`` gives. Raises its error, or one that says that another rank had one."""
    failure: MachineError | RuntimeError = MachineError("symmetric memory", "cannot be used by another rank", "all ranks")
    result: list[T] = []
    try:
        result.append(step())
    except (MachineError, RuntimeError) as exc:
        failure = exc
    if not group.agree(bool(result)):
        raise failure
    return result[0]


def _possible(group: Group, device: torch.device) -> None:
    """Raise MachineError for what this rank sees alone."""
    _functions()
    if group.size > MAX_RANKS:
        raise MachineError("symmetric memory", f"{group.size} ranks", f"at most {MAX_RANKS}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise MachineError("symmetric memory", "this GPU is too old", "compute capability 8.0 or later")


def _near(group: Group, device: torch.device) -> None:
    """Raise MachineError unless all ranks are on one host, and this one's GPU reaches the memory of the others'."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = f"{socket.gethostname()} {boot.read_text() if boot.is_file() else ''}"
    number = int.from_bytes(hashlib.sha256(host.encode()).digest()[:7], "little")
    mine = torch.tensor([number, device.index], device=device)
    hosts, devices = group.all_gather(mine, [2] * group.size, 0).view(-1, 2).T.tolist()
    if len(set(hosts)) > 1:
        raise MachineError("symmetric memory", "the ranks are on several hosts", "one host")
    for other in devices:  # a rank that sees but one GPU finds out by mapping
        if other != device.index and other < torch.cuda.device_count() and not torch.cuda.can_device_access_peer(device.index, other):
            raise MachineError(
                "symmetric memory", f"GPU {device.index} does not reach the memory of GPU {other}", "NVLink, or PCIe peer access"
            )


def _mapped(group: Group, device: torch.device) -> tuple[list[Tensor], Any]:
    """Every rank's buffer as this rank sees it, and what keeps them mapped. Raises torch's RuntimeError where memory cannot be shared."""
    os.environ[_NO_MULTICAST] = "1"  # a program that dies with it may leave the GPUs of a host unusable
    nbytes = _functions()["exchange_bytes"](group.size)
    try:
        from torch.distributed import _symmetric_memory as symmetric
        from torch.distributed import group as groups

        mine = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        assert groups.WORLD is not None, "the ranks have met"
        handle = symmetric.rendezvous(mine, groups.WORLD)
        return [mine if rank == group.rank else handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size)], handle
    except (ImportError, AttributeError, TypeError) as exc:  # it is no public interface
        raise MachineError("symmetric memory", f"that of torch {torch.__version__} is another ({exc})", "torch 2.6 to 2.13") from exc


def _test(group: Group, sums: SymmetricSums, device: torch.device) -> None:
    """Raise MachineError when a sum is not that of ``group``, bit for bit: of several lengths, in every way, and one after another."""
    generator = torch.Generator(device).manual_seed(group.rank)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for dtype in _TYPES:
        for nbytes in (4, 1000, 8192, sums.mode_limit(FLAGGED), 1_000_004, sums.mode_limit(ONE_SHOT)):
            x = torch.randn(nbytes // dtype.itemsize, device=device, generator=generator).to(dtype) * 10.0**group.rank
            want = group.all_reduce(x)
            for mode in (FLAGGED, ONE_SHOT, TWO_SHOT):
                if nbytes <= sums.mode_limit(mode):
                    wrong += (sums.sum(x, mode) != want).sum()
    x = first = torch.randn(5000, device=device, generator=generator)
    for number in range(48):
        total = sums.sum(x, number % 3 if number % 2 else FLAGGED)
        wrong += (total != group.all_reduce(x)).sum()
        x = total * 0.1 + first
    if int(wrong):
        raise MachineError("symmetric memory", f"{int(wrong)} sums of a test are wrong on rank {group.rank}", "those of NCCL")
