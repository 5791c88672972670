"""``--pin``: assigns one CPU to each worker, round robin.

A worker that stays on one CPU keeps its caches. The usable CPUs are the affinity of this process, which
honours cpusets, limited to the number that the control group's quota pays for: with a quota of 2 on 64 CPUs,
peers spread over all of them would exhaust the quota together and all stop until the next period.

More peers than CPUs is no reason for a warning: a peer that waits for datagrams uses no CPU time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from peerd.supervisor.cgroup import cpu_quota


def usable_cpus() -> list[int]:
    """Numbers of the CPUs. Call it in a process that is not pinned itself."""
    return sorted(os.sched_getaffinity(0))


def cpu_count() -> int:
    """CPUs that this process's control group may use, at least 1."""
    return _within(len(usable_cpus()), cpu_quota())


def plan(cpus: Sequence[int], quota: float | None, peers: int) -> tuple[int, ...]:
    """The CPU of each slot. ``cpus``: at least one. A slot keeps its CPU when ``peers`` grows."""
    used = _within(len(cpus), quota)
    return tuple(cpus[slot % used] for slot in range(peers))


def _within(cpus: int, quota: float | None) -> int:
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))
