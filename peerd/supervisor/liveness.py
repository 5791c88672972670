"""Whether a worker whose loop does not turn is stuck, or has only had no chance to turn.

An idle loop writes its heartbeat four times a second, so an old one means one of three things. The
worker is stopped (SIGSTOP, a debugger, a frozen control group): somebody wants that. It is starved:
runnable, but others have the CPUs, or waiting for a disk or for memory that was swapped out. Or it is in
a handler that does not return, asleep or busy. Killing one of the first two would kill a healthy worker,
and the more so the busier the machine is.

So what counts is not the time since the last heartbeat but how much of it the worker could have used:
not the time in which it was stopped, and not what it waited for a CPU. /proc/pid/schedstat says, in
nanoseconds, how long it has run and how long it has waited; the wait that is under way is not in it,
so one that is found runnable has had what it has run, and one that is found asleep has had all but
what it waited. A worker that has had so much time of its own without a turn is stuck, whatever the load.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peerd._scoreboard import Slot
from peerd.supervisor.cgroup import is_frozen

STARVED_PART = 0.5
"""Of the time since the last turn: had no chance for more than that."""

MAX_LOOK_S = 1.0
"""What one look vouches for. When more has passed since the last, nobody has looked: the whole machine may
have stood still, or the supervisor and its workers may have been stopped together."""


class Verdict(enum.Enum):
    GETS_ON = "gets on"
    STOPPED = "stopped"
    STARVED = "starved"
    STUCK = "stuck"


class _Look(NamedTuple):
    at_s: float
    state: str
    """proc(5)'s letter."""

    ran_s: float
    waited_s: float
    """For a CPU; both in its life so far."""


@dataclass
class _Watched:
    pid: int
    progress: tuple[int, int]
    last: _Look
    passed_s: float = 0.0
    """Since it last got on, without what it was stopped."""

    own_s: float = 0.0
    """Of that, what it could have used."""


class Liveness:
    """Looks at the worker of a slot now and then, and remembers what it saw."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._watched: _Watched | None = None

    def judge(self, slot: Slot, now_s: float) -> Verdict:
        """``now_s``: the monotonic time. To be called often, compared with the timeout."""
        pid, progress, seen = slot.pid, slot.progress, self._watched
        look = _look(pid, now_s)
        if look is None:
            return Verdict.GETS_ON  # gone, and its pidfd tells
        if seen is None or seen.pid != pid or seen.progress != progress:
            self._watched = _Watched(pid, progress, look)
            return Verdict.GETS_ON
        last, seen.last = seen.last, look
        if _is_stopped(pid, look):
            return Verdict.STOPPED
        passed_s = min(now_s - last.at_s, MAX_LOOK_S)
        own_s = look.ran_s - last.ran_s
        if look.state not in "RD":
            own_s = passed_s - (look.waited_s - last.waited_s)
        seen.passed_s += passed_s
        seen.own_s += min(max(own_s, 0.0), passed_s)
        if seen.own_s >= self._timeout_s:
            return Verdict.STUCK
        if seen.passed_s >= self._timeout_s and seen.own_s < (1 - STARVED_PART) * seen.passed_s:
            return Verdict.STARVED
        return Verdict.GETS_ON

    @property
    def own_s(self) -> float:
        """For how long the worker could have got on, and has not."""
        return 0.0 if self._watched is None else self._watched.own_s


def is_stopped(pid: int) -> bool:
    """Somebody has stopped the process, and may continue it."""
    look = _look(pid, 0.0)
    return look is not None and _is_stopped(pid, look)


def _is_stopped(pid: int, look: _Look) -> bool:
    return look.state in "Tt" or (look.state in "SD" and is_frozen(pid))


def _look(pid: int, now_s: float) -> _Look | None:
    """None for a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        state, ran_ticks = fields[0].decode(), int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return None
    try:
        ran_ns, waited_ns, _ = map(int, Path(f"/proc/{pid}/schedstat").read_bytes().split())
    except (OSError, ValueError):  # a kernel without CONFIG_SCHED_INFO, gVisor
        return _Look(now_s, state, ran_ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    return _Look(now_s, state, ran_ns / 1e9, waited_ns / 1e9)
