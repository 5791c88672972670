"""Why a worker's loop makes no progress: it is stopped, starved or stuck.

An idle loop writes its heartbeat four times per second, so an old one means one of three things. The worker
is stopped (SIGSTOP, a debugger, a frozen control group), because someone wants that. It is starved:
runnable, but other processes have the CPUs, or it waits for a disk or for memory that was swapped out. Or
it is stuck in a handler that does not return, asleep or busy. Killing a worker of the first two kinds would
kill a healthy one, and the busier the machine, the more of them.

So the criterion is not the time since the last heartbeat but the part of it that the worker could have used:
neither the time in which it was stopped nor the time in which it waited for a CPU. /proc/pid/schedstat has
both the time it ran and the time it waited, in nanoseconds; a wait that is in progress is not included. So a
runnable worker is credited with the time that it ran, and a sleeping one with all but the time that it
waited. A worker that could have used the timeout and has made no progress is stuck, whatever the load.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peerd._scoreboard import Slot
from peerd.health import Health
from peerd.procfs import read_stat
from peerd.supervisor.cgroup import is_frozen

STARVED_SHARE = 0.5
"""A worker that could not use more than this share of the time without progress is starved."""

MAX_INTERVAL_S = 1.0
"""The time that one check accounts for. If more has passed since the one before, the supervisor was not
running: the machine may have been suspended, or supervisor and workers stopped together."""


class _Sample(NamedTuple):
    at_s: float
    state: str  # The letter in proc(5)
    ran_s: float
    waited_s: float  # For a CPU. Both are totals over the life of the process.


@dataclass
class _Watched:
    pid: int
    progress: tuple[int, int]
    last: _Sample
    elapsed_s: float = 0.0  # Since the last progress, without the time in which it was stopped
    usable_s: float = 0.0  # The part of it that the worker could have used


class Liveness:
    """Samples the worker of one slot, and remembers what it has seen since the last progress."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._watched: _Watched | None = None

    def judge(self, slot: Slot, now_s: float) -> Health | None:
        """STOPPED, STARVED, STUCK, or None: it makes progress, or it is too early to say.

        ``now_s``: monotonic time. Call it at intervals that are short against the timeout.
        """
        pid, progress, watched = slot.pid, slot.progress, self._watched
        sample = _sample(pid, now_s)
        if sample is None:
            return None  # gone, which its pidfd reports
        if watched is None or watched.pid != pid or watched.progress != progress:
            self._watched = _Watched(pid, progress, sample)
            return None
        last, watched.last = watched.last, sample
        if _is_stopped(pid, sample):
            return Health.STOPPED
        elapsed_s = min(now_s - last.at_s, MAX_INTERVAL_S)
        usable_s = sample.ran_s - last.ran_s
        if sample.state not in "RD":
            usable_s = elapsed_s - (sample.waited_s - last.waited_s)
        watched.elapsed_s += elapsed_s
        watched.usable_s += min(max(usable_s, 0.0), elapsed_s)
        if watched.usable_s >= self._timeout_s:
            return Health.STUCK
        is_starved = watched.usable_s < (1 - STARVED_SHARE) * watched.elapsed_s
        return Health.STARVED if is_starved and watched.elapsed_s >= self._timeout_s else None

    @property
    def usable_s(self) -> float:
        """The time since the last progress that the worker could have used."""
        return 0.0 if self._watched is None else self._watched.usable_s


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped, and may be continued."""
    sample = _sample(pid, 0.0)
    return sample is not None and _is_stopped(pid, sample)


def _is_stopped(pid: int, sample: _Sample) -> bool:
    return sample.state in "Tt" or (sample.state in "SD" and is_frozen(pid))


def _sample(pid: int, now_s: float) -> _Sample | None:
    """None for a process that is gone."""
    stat = read_stat(pid)
    if stat is None:
        return None
    try:
        ran_ns, waited_ns, _ = map(int, Path(f"/proc/{pid}/schedstat").read_bytes().split())
    except (OSError, ValueError):  # a kernel without CONFIG_SCHED_INFO, gVisor
        return _Sample(now_s, stat.state, stat.cpu_s, 0.0)
    return _Sample(now_s, stat.state, ran_ns / 1e9, waited_ns / 1e9)
