"""The health of one peer as the supervisor sees it: the common definition, plus /proc and the socket.

A worker that does not read its socket, though its loop runs, is as useless as a blocked one. When that has
lasted for the stuck timeout, it is stuck too. The time is added up from the checks, so that it does not grow
while the supervisor itself is stopped.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable

from peerd._scoreboard import PeerState, Slot
from peerd.health import Diagnosis, Health, HealthCheck
from peerd.settings import SupervisorSettings
from peerd.supervisor.events import RepliesWithheld, SocketNotRead, SocketReadAgain
from peerd.supervisor.liveness import MAX_INTERVAL_S, Liveness
from peerd.supervisor.output import PeerLog
from peerd.supervisor.socket_queue import has_datagrams

MIN_REPORT_INTERVAL_S = 60.0  # Between two events about withheld replies

FRESH_HEARTBEAT_S = 1.0  # Four times the age that an idle loop lets its heartbeat reach


class PeerHealth:
    def __init__(
        self,
        slot: Slot,
        sock: socket.socket,
        settings: SupervisorSettings,
        publish: Callable[..., None],
        log: PeerLog,
    ) -> None:
        """``publish``: of SupervisedPeer."""
        self.diagnosis: Diagnosis | None = None
        """Of the last check; None while the peer is not ready."""

        self._slot = slot
        self._sock = sock
        self._publish = publish
        self._log = log
        self._check = HealthCheck(settings.liveness_timeout_s)
        self._liveness = Liveness(settings.stuck_timeout_s)
        self._stuck_timeout_s = settings.stuck_timeout_s
        self._not_reading_s = 0.0  # Time for which checks have found it FULL or UNREAD
        self._checked_s = 0.0
        self._evidence: tuple[int, ...] = ()

    @property
    def is_healthy(self) -> bool:
        return self.diagnosis is not None and self.diagnosis.is_healthy

    def on_ready(self) -> None:
        self.diagnosis = Diagnosis(Health.IDLE)

    def check(self) -> None:
        """Update the diagnosis. Call it about twice per second."""
        now_ns = time.monotonic_ns()
        now_s = now_ns / 1e9
        elapsed_s = min(now_s - self._checked_s, MAX_INTERVAL_S)
        self._checked_s = now_s
        is_ready = self._slot.state is PeerState.READY
        self._slot.watch_queue(is_ready and has_datagrams(self._sock), now_ns)
        found = self._check.judge(self._slot, now_ns)
        has_fresh_heartbeat = now_ns - self._slot.heartbeat_ns < FRESH_HEARTBEAT_S * 1e9
        if found is not None and not has_fresh_heartbeat:
            found = self._explained(found, now_s)
        if found is None or found.health not in (Health.FULL, Health.UNREAD):
            self._on_reads()
        elif has_fresh_heartbeat:
            self._on_not_read(found)
            self._not_reading_s += elapsed_s
            if self._not_reading_s >= self._stuck_timeout_s:
                found = Diagnosis(Health.STUCK, found.for_s, cause=found.health)
        if found is not None and found.health is Health.STUCK:
            self._evidence = self._signs_of_life()
        self.diagnosis = found

    def has_recovered(self) -> bool:
        """Whether a worker that was found stuck does again what it did not do."""
        return self._signs_of_life() != self._evidence

    def _explained(self, found: Diagnosis, now_s: float) -> Diagnosis:
        why = self._liveness.judge(self._slot, now_s)
        if why is Health.STUCK:
            return Diagnosis(why, self._liveness.usable_s, cause=Health.LATE)
        if why is not None and found.health is Health.LATE:
            return Diagnosis(why, found.for_s)
        return found

    def _on_not_read(self, found: Diagnosis) -> None:
        if not self._not_reading_s:
            self._publish(SocketNotRead, health=found.health.value, for_s=round(found.for_s, 3))
            text = (
                "%s: not ready, and its record is withdrawn until it reads again; it is replaced after "
                "%g s (--stuck-timeout)"
            )
            self._log.log(logging.ERROR, text, found.sentence, self._stuck_timeout_s)

    def _on_reads(self) -> None:
        if self._not_reading_s:
            self._not_reading_s = 0.0
            if self._slot.state is PeerState.READY:
                self._publish(SocketReadAgain)
                self._log.log(logging.WARNING, "reads its socket again")

    def _signs_of_life(self) -> tuple[int, ...]:
        """The heartbeat is one only if the loop is blocked."""
        slot = self._slot
        if self._not_reading_s:
            return slot.not_reading_since_ns, slot.unread_since_ns
        return slot.progress


class ReplyLimits:
    """Publishes that a peer's replies were withheld, because they looked like a loop of two servers.

    The worker counts each such reply and logs the first ones (serving/loop_logs.py); this one says in
    ``peerd events`` that it happened, at most once per minute.
    """

    def __init__(self, slot: Slot, publish: Callable[..., None]) -> None:
        self._slot = slot
        self._publish = publish
        self._published = self._counts()
        self._next_s = 0.0

    def check(self) -> None:
        """Call it about twice per second."""
        if time.monotonic() >= self._next_s and (counts := self._counts()) != self._published:
            to_peers, over_rate = (
                now - then for now, then in zip(counts, self._published, strict=True)
            )
            self._publish(RepliesWithheld, to_peers=to_peers, over_rate=over_rate)
            self._published = counts
            self._next_s = time.monotonic() + MIN_REPORT_INTERVAL_S

    def _counts(self) -> tuple[int, int]:
        counters = self._slot.counters()
        return counters["tx_loop"], counters["tx_dropped_rate"]
