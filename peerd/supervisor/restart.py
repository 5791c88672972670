"""When to start a worker again: a pure function of its failures and the monotonic time.

Immediately after the first failure, then after a delay that doubles up to a cap. The delay is reset by a
minute of being ready, never by merely being alive: a process that dies 1.2 s after each start escapes the
usual "up for a second" rule and is restarted without end (supervisord issue 1285). After too many failures in
a window the peer is parked and retried slowly, until it has been ready for that minute; the other peers are
not affected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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
    ready_for_s: float
    """How long the worker had been ready when it died; 0 if it never was."""
    was_parked: bool = False
    """The peer was in a crash loop when this worker was started."""


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
