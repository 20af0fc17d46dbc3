"""On how many threads a pass runs on a CPU, and how those threads wait for each other: decided here and nowhere else.

OpenMP reads both from the environment when torch is loaded, so this module needs no torch and speaks before it comes.

How many: never more than the cores that are really ours, each counted once however many threads it runs in hardware, fewer
where a control group's quota is less (of which torch knows nothing), and shared among the ranks of this host.

How they wait: a few microseconds awake, then asleep. A pass is hundreds of operations, and at the end of each its threads wait
until the last has come. GNU OpenMP, which torch brings, lets them spin for milliseconds. Beside other work the last has often
lost its core, and the others burn the very time that it waits for. Asleep at once they lose nothing there, but on an idle
machine waking up costs more than most operations take. ``SPINS`` has nearly the best of both. Tokens a second of a 4-bit
SmolLM2-135M in bfloat16 (on 32 cores: its matrix products alone):

    spins                         0       1000       default
    2 of 2 cores, load 9       21-26     16-18       1.5-2
    2 of 32 idle cores         59-63     75-83       68-78
    8 of 32 idle cores         57-66    83-135     136-152
    16 of 32 idle cores        22-33    66-137      99-176
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

COUNT, SPIN, POLICY = "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
SPINS = 1000
_CPUS = Path("/sys/devices/system/cpu")
_GROUP = Path("/sys/fs/cgroup")


def thread_variables(ranks: int = 1, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of each of ``ranks`` processes that share this host. What the user has set stands, where it is not more threads."""
    count = max(1, cores() // ranks)
    asked = environment.get(COUNT, "").partition(",")[0].strip()  # a list has a number for each level of nesting
    if asked.isdecimal() and 1 <= int(asked) < count:
        count = int(asked)
    return {COUNT: str(count)} if SPIN in environment or POLICY in environment else {COUNT: str(count), SPIN: str(SPINS)}


def cores(cpus: Path = _CPUS, group: Path = _GROUP) -> int:
    """Cores that this process may keep busy: of its affinity, hardware threads of one core counted once, within its group's quota."""
    ours = os.sched_getaffinity(0)
    distinct = {_read(cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in ours}
    return max(1, min(len(distinct), _quota(group)))


def _quota(group: Path) -> int:
    """Whole cores that the control group's quota is worth, of version 2 or 1 of the interface; a great number without one."""
    limit, _, period = _read(group / "cpu.max").partition(" ")
    if not limit:
        limit, period = _read(group / "cpu" / "cpu.cfs_quota_us"), _read(group / "cpu" / "cpu.cfs_period_us")
    if not limit.isdecimal() or not period.isdecimal() or int(period) == 0:  # "max" and -1 are no limit
        return 1 << 20
    return int(limit) // int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
