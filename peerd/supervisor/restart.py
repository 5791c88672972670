"""When to start a worker or a service again: a pure function of its failures and the monotonic time.

Immediately after the first failure, then after a delay that doubles up to a cap. The delay is reset by a
minute of being ready, never by merely being alive: a process that dies 1.2 s after each start escapes the
usual "up for a second" rule and is restarted without end (supervisord issue 1285). After too many failures in
a window the peer is parked and retried slowly, until it has been ready for that minute; the other peers are
not affected.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from peerd.supervisor.loop import Callback, Loop, Timer


class RestartPolicy(NamedTuple):
    first_delay_s: float = 0.25
    max_delay_s: float = 15.0
    jitter: float = 0.2
    """Each delay is changed by up to this share, so that peers that died together spread out."""
    reset_after_ready_s: float = 60.0
    max_failures: int = 5
    window_s: float = 60.0
    parked_delay_s: float = 60.0


class Failure(NamedTuple):
    at_s: float
    ready_for_s: float  # How long the worker had been ready when it died; 0 if it never was
    was_parked: bool = False  # The peer was in a crash loop when this worker was started


class Restart(NamedTuple):
    delay_s: float
    crashloop: bool


def next_restart(policy: RestartPolicy, failures: Sequence[Failure], random_unit: float) -> Restart:
    """The restart after the last of ``failures`` (oldest first, at least one).

    ``random_unit``: a random number from 0 to 1. It comes from os.urandom, because the module random draws a
    new seed at each fork.
    """
    last = failures[-1]
    now_s = last.at_s
    streak = 0
    for failure in reversed(failures):
        if failure.ready_for_s >= policy.reset_after_ready_s:
            streak += failure is last
            break
        streak += 1
    recent = sum(1 for failure in failures[-streak:] if now_s - failure.at_s <= policy.window_s)
    still_fails = last.was_parked and last.ready_for_s < policy.reset_after_ready_s
    if recent > policy.max_failures or still_fails:
        return Restart(policy.parked_delay_s, crashloop=True)
    if streak == 1:
        return Restart(0.0, crashloop=False)
    # The exponent is bounded, so a streak of thousands does not overflow.
    delay_s = min(policy.first_delay_s * 2.0 ** min(streak - 2, 32), policy.max_delay_s)
    return Restart(delay_s * (1 + policy.jitter * (2 * random_unit - 1)), crashloop=False)


MAX_FAILURES = 64  # More than any policy looks back at
FORK_DELAY_S = 0.25
MAX_FORK_DELAY_S = 5.0
"""Delays between two attempts to fork where the machine had no process left; each doubles the last one."""


class RestartSchedule:
    """Calls ``start`` again after failures, with the delays of ``policy``."""

    def __init__(self, loop: Loop, policy: RestartPolicy, start: Callback) -> None:
        self.policy = policy
        self.was_parked = False  # The last failure was one too many
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
