"""Which CPU each worker is given with ``--pin``: every worker one, in turn.

A worker that stays on a CPU keeps its caches, and neighbours do not take each other's turns. What may be
used is the affinity of this process, which honours cpusets, and of that no more CPUs than the group's
quota has time for: with a quota of 2 on 64 CPUs, peers on all of them would use it up together and then
all stand still until the next period.

More peers than CPUs is no reason for a warning. Eight peers on two cores is what a small machine is for: a
peer that waits for datagrams takes no time, and those that share a CPU take turns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from peerd.supervisor.cgroup import cpu_quota


def usable_cpus() -> list[int]:
    """Their numbers. To be asked in a process that is not pinned itself."""
    return sorted(os.sched_getaffinity(0))


def cpu_count() -> int:
    """For how many CPUs this process's group has time, at least 1."""
    return _within(len(usable_cpus()), cpu_quota())


def plan(cpus: Sequence[int], quota: float | None, peers: int) -> tuple[int, ...]:
    """The CPU of each slot. ``cpus``: at least one. A slot keeps its CPU when there are more peers."""
    used = _within(len(cpus), quota)
    return tuple(cpus[slot % used] for slot in range(peers))


def _within(cpus: int, quota: float | None) -> int:
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))
