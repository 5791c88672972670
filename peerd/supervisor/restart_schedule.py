"""Starts a worker or a service again after it failed, with the delays of restart.py."""

from __future__ import annotations

import os
import time
from collections import deque

from peerd.supervisor.loop import Callback, Loop, Timer
from peerd.supervisor.restart import Failure, Restart, RestartPolicy, next_restart

MAX_FAILURES = 64
"""More than any policy looks back at."""

FORK_DELAY_S = 0.25
MAX_FORK_DELAY_S = 5.0
"""Delays between two attempts to fork where the machine had no process left; each doubles the last one."""


class RestartSchedule:
    def __init__(self, loop: Loop, policy: RestartPolicy, start: Callback) -> None:
        self.policy = policy
        self.was_parked = False
        """The last failure was one too many."""

        self.next_start_s: float | None = None
        """Monotonic time of the next start; None when none is due."""

        self._loop = loop
        self._start = start
        self._failures: deque[Failure] = deque(maxlen=MAX_FAILURES)
        self._fork_failures = 0
        self._delay_s = 0.0
        self._timer = Timer()

    @property
    def is_waiting(self) -> bool:
        return self._timer.is_waiting

    def after_failure(self, ready_for_s: float) -> Restart:
        """Record a failure. ``arm`` is next."""
        self._failures.append(Failure(time.monotonic(), ready_for_s, self.was_parked))
        restart = next_restart(self.policy, list(self._failures), os.urandom(1)[0] / 255)
        self.was_parked = restart.crashloop
        self._delay_s = restart.delay_s
        return restart

    def after_failed_fork(self) -> float:
        """Return the delay. ``arm`` is next. It does not count as a failure: the machine is the cause."""
        self._delay_s = min(FORK_DELAY_S * 2.0 ** min(self._fork_failures, 32), MAX_FORK_DELAY_S)
        self._fork_failures += 1
        return self._delay_s

    def on_forked(self) -> None:
        self._fork_failures = 0

    def arm(self) -> None:
        """Start when the delay is over."""
        self.next_start_s = time.monotonic() + self._delay_s
        self._timer = self._loop.call_at(self.next_start_s, self._run)

    def cancel(self) -> None:
        self._timer.cancel()
        self.next_start_s = None

    def _run(self) -> None:
        self.next_start_s = None
        self._start()
