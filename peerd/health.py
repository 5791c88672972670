"""Whether the worker of a peer is healthy: the one definition, for everything that asks.

A worker is healthy when its loop makes progress and it reads its socket. The facts are in the scoreboard, so
the supervisor (status, /healthz/ready, systemd's watchdog) and the registrar (the peer's record) come to the
same verdict, each by its own clock:

LATE       For the timeout, the loop has neither completed an iteration nor called a handler.
FULL       For the timeout, the worker has not read because too many of its handlers wait
           (``not_reading_since_ns``).
UNREAD     For the timeout, the supervisor has seen datagrams in the socket's queue and the worker has read
           none, whatever the reason (``unread_since_ns``).

The timeout is ``liveness_timeout_s`` everywhere. The supervisor also finds out why a worker is late
(supervisor/liveness.py): it is STOPPED, STARVED or STUCK.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from peerd._scoreboard import PeerState, Slot


class Health(enum.Enum):
    OK = "ok"
    IDLE = "idle"
    """As healthy as OK: no message since the check before."""

    LATE = "late"
    FULL = "full"
    UNREAD = "unread"
    STOPPED = "stopped"
    STARVED = "starved"
    STUCK = "stuck"


_SENTENCES = {
    Health.LATE: "event loop blocked",
    Health.FULL: "too many waiting handlers, socket not read",
    Health.UNREAD: "socket not read",
    Health.STOPPED: "process stopped",
    Health.STARVED: "waiting for a CPU",
    Health.STUCK: "stuck",
}


class Diagnosis(NamedTuple):
    health: Health
    for_s: float = 0.0
    """How long this has been so; 0 when healthy."""

    cause: Health | None = None
    """Of STUCK: the condition that lasted too long."""

    @property
    def is_healthy(self) -> bool:
        return self.health in (Health.OK, Health.IDLE)

    @property
    def sentence(self) -> str:
        """Such as ``event loop blocked for 7 s`` or ``stuck, socket not read for 30 s``."""
        if self.is_healthy:
            return self.health.value
        because = f", {_SENTENCES[self.cause]}" if self.cause is not None else ""
        return f"{_SENTENCES[self.health]}{because} for {self.for_s:.0f} s"


class HealthCheck:
    """Judges one slot by its scoreboard entry now and at the checks before."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_ns = int(timeout_s * 1e9)
        self._progress = (0, 0)
        self._progress_ns = 0

    def judge(self, slot: Slot, now_ns: int) -> Diagnosis | None:
        """``now_ns``: CLOCK_MONOTONIC. None for a peer that is not READY: it has no health."""
        heartbeat_ns, messages = slot.progress
        has_messages = messages != self._progress[1]
        if heartbeat_ns != self._progress[0]:
            self._progress_ns = heartbeat_ns
        elif has_messages:
            self._progress_ns = now_ns
        self._progress = heartbeat_ns, messages
        if slot.state is not PeerState.READY:
            return None
        for health, since_ns in (
            (Health.LATE, self._progress_ns),
            (Health.FULL, slot.not_reading_since_ns),
            (Health.UNREAD, slot.unread_since_ns),
        ):
            if since_ns and now_ns - since_ns >= self._timeout_ns:
                return Diagnosis(health, (now_ns - since_ns) / 1e9)
        return Diagnosis(Health.OK if has_messages else Health.IDLE)
