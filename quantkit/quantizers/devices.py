"""Independent work over several devices of one machine: a thread to each, results in the order of the jobs.

Which device does a job is decided before any begins, so the same devices give the same bits. Knows tensors only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")


def shares(total: int, count: int) -> list[slice]:
    """``total`` things parted evenly and contiguously among ``count`` devices; some get none when there are fewer."""
    ends = [total * index // count for index in range(count + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(ends)]


def deal(costs: Sequence[float], count: int) -> list[int]:
    """Which of ``count`` devices does each job: the dearest job first, each to the one that has least to do so far."""
    load, chosen = [0.0] * count, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        chosen[job] = load.index(min(load))
        load[chosen[job]] += costs[job]
    return chosen


@functools.cache
def _load_solvers(device: str) -> None:
    """Let torch load its solvers for CUDA, which it does at their first use and which two threads must not do at once."""
    torch.linalg.cholesky(torch.ones(1, 1, device=device))


def spread(devices: Sequence[str], costs: Sequence[float], work: Callable[[int, str], T]) -> list[T]:
    """``work(job, device)`` for each job of ``costs``, dealt over ``devices``: what each gave, in the order of the jobs.

    With one device the jobs are done here, one after the other; with more, each device has a thread, where it is torch's current
    device. Raises what the first of the jobs that failed raised.
    """
    if len(devices) == 1:
        return [work(job, devices[0]) for job in range(len(costs))]
    inference = torch.is_inference_mode_enabled()  # a thread's own, like the current device

    def run(job: int, device: str) -> T:
        with torch.inference_mode(inference), torch.cuda.device(device) if device.startswith("cuda") else nullcontext():
            return work(job, device)

    for device in devices:
        if device.startswith("cuda"):
            _load_solvers(device)
    threads = [ThreadPoolExecutor(1, thread_name_prefix=device) for device in devices]
    try:
        running = [threads[owner].submit(run, job, devices[owner]) for job, owner in enumerate(deal(costs, len(devices)))]
        return [job.result() for job in running]
    finally:
        for thread in threads:
            thread.shutdown(cancel_futures=True)


def each(devices: Sequence[str], work: Callable[[int, str], T]) -> list[T]:
    """``work(index, device)`` once on each of ``devices``: what each gave."""
    return spread(devices, [1.0] * len(devices), work)
