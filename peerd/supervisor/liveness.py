"""Whether a worker whose loop does not turn is stuck, or has only had no chance to turn.

An idle loop writes its heartbeat four times a second, so an old one means one of three things. The
worker is stopped (SIGSTOP, a debugger): somebody wants that. It is starved: runnable, but others have
the CPUs. Or it is in a handler that does not return, asleep or busy. Killing one of the first two
would kill a healthy worker, and the more so the busier the machine is.

So what counts is not the time since the last heartbeat but how much of it the worker could have used:
not the time in which it was stopped, and not what it waited for a CPU. /proc/pid/schedstat says, in
nanoseconds, how long it has run and how long it has waited; the wait that is under way is not in it,
so one that is found runnable has had what it has run, and one that is found asleep has had all but
what it waited. A worker that has had so much time of its own without a turn is stuck, whatever the load.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from peerd._scoreboard import Slot

STARVED_PART = 0.5
"""Of the time since the last turn: waited for a CPU for more than that."""


MAX_LOOK_S = 1.0
"""What one look vouches for. When more has passed since the last, nobody has looked: the whole machine may
have stood still, or the supervisor and its workers may have been stopped together."""


class Verdict(enum.Enum):
    GETS_ON = "gets on"
    STOPPED = "stopped"
    STARVED = "starved"
    STUCK = "stuck"


@dataclass
class _Watched:
    pid: int
    progress: tuple[int, int]
    looked_s: float
    ran_s: float
    waited_s: float
    """For a CPU; both in its life so far."""

    since_s: float
    own_s: float = 0.0
    """Its own time since it last got on."""


class Liveness:
    """Looks at the worker of a slot now and then, and remembers what it saw."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._watched: _Watched | None = None

    def judge(self, slot: Slot, now_s: float) -> Verdict:
        """``now_s``: the monotonic time. To be called often, compared with the timeout."""
        pid, progress = slot.pid, slot.progress
        state, ran_s, waited_s = _state_and_times(pid)
        seen = self._watched
        if seen is None or seen.pid != pid or seen.progress != progress:
            self._watched = _Watched(pid, progress, now_s, ran_s, waited_s, now_s)
            return Verdict.GETS_ON
        passed_s = now_s - seen.looked_s
        own_s = ran_s - seen.ran_s if state == "R" else passed_s - (waited_s - seen.waited_s)
        seen.looked_s, seen.ran_s, seen.waited_s = now_s, ran_s, waited_s
        if state in "Tt":
            return Verdict.STOPPED
        seen.own_s += min(max(own_s, 0.0), passed_s, MAX_LOOK_S)
        if seen.own_s >= self._timeout_s:
            return Verdict.STUCK
        since_s = now_s - seen.since_s
        if since_s >= self._timeout_s and since_s - seen.own_s > STARVED_PART * since_s:
            return Verdict.STARVED
        return Verdict.GETS_ON

    @property
    def own_s(self) -> float:
        """For how long the worker could have got on, and has not."""
        return 0.0 if self._watched is None else self._watched.own_s


def _state_and_times(pid: int) -> tuple[str, float, float]:
    """proc(5). A process that is gone is somebody else's news: it is taken for one that sleeps."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        state = stat.rpartition(b")")[2].split()[0].decode()
        ran_ns, waited_ns, _ = map(int, Path(f"/proc/{pid}/schedstat").read_bytes().split())
    except (OSError, IndexError, ValueError):
        return "S", 0.0, 0.0
    return state, ran_ns / 1e9, waited_ns / 1e9
