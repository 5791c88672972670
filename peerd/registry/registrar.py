"""Reconciles the scoreboard with etcd: every healthy peer that is READY has a record, and no other has.

Desired: the slots that are READY and whose worker is healthy (peerd/health.py). Actual: the registrations
held here. Each round registers the missing ones and revokes the superfluous ones; the registry's session
maintains the leases and the records. The lease of each slot is written to the scoreboard before the record
is put, so a registrar can be killed at any time: its successor adopts the leases, and no record disappears.

This is the only process of a supervisor with a gRPC channel. gRPC is imported after the fork, because its
threads do not survive one. When the supervisor dies, the lifeline ends (lifeline.py): every lease is revoked,
and the process exits, within a bound even if etcd hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from setproctitle import setproctitle

from peerd._scoreboard import PeerState, RegistryState, Scoreboard, Slot
from peerd.errors import PeerConflictError, RegistryError
from peerd.health import Diagnosis, HealthCheck
from peerd.registry.lean_grpc import release_code, without_asyncio
from peerd.registry.lifeline import Lifeline
from peerd.settings import SupervisorSettings

if TYPE_CHECKING:
    from peerd.registry import PeerRecord, Registration, Registry, SessionState

log = logging.getLogger(__name__)

ROUND_INTERVAL_S = 0.25  # interval between health checks when nothing wakes the registrar
MAX_IMPORT_DELAY_S = 1.0  # how long the import of gRPC waits for starting workers
RETRY_INTERVAL_S = 0.5  # between two attempts to register the same peer
WARN_INTERVAL_S = 60.0

CALL_TIMEOUT_S = 2.0  # for one call to etcd


def run(
    settings: SupervisorSettings,
    board: Scoreboard,
    lifeline_fd: int,
    report_fd: int,
    at_end: Callable[[], None] = lambda: None,
) -> int:
    """Reconcile until the lifeline ends. Returns 0. Calls ``at_end`` even if etcd does not answer."""
    setproctitle("peerd: registrar")
    # It ends with the supervisor, not by signals. The last two would stop it when it writes to a terminal
    # whose foreground process group is another (stty tostop).
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU, signal.SIGTTIN):
        signal.signal(number, signal.SIG_IGN)
    os.set_blocking(report_fd, False)
    lifeline = Lifeline(lifeline_fd, board, at_end)
    _wait_for_peers(board, lifeline)
    # Not at the top of the file: the supervisor imports this module and must not import gRPC.
    with without_asyncio():
        from peerd.registry import Registry

    def on_state(state: SessionState) -> None:
        board.registry_state = RegistryState[state.name]
        _notify(report_fd)

    with Registry(
        settings.registry.endpoint,
        settings.registry.prefix,
        access=settings.registry.access,
        lease_ttl_s=settings.registry.lease_ttl_s,
        timeout_s=CALL_TIMEOUT_S,
        on_state=on_state,
        owner_pid=os.getppid(),
    ) as registry:
        reconciler = _Reconciler(settings, board, registry, lifeline, report_fd)
        reconciler.reconcile()
        release_code()
        while not lifeline.has_ended:
            lifeline.wait(ROUND_INTERVAL_S)
            reconciler.reconcile()
    at_end()
    return 0


def _wait_for_peers(board: Scoreboard, lifeline: Lifeline) -> None:
    """Importing gRPC takes 0.2 s of a CPU, which starting workers need more urgently."""
    until_s = time.monotonic() + MAX_IMPORT_DELAY_S
    while not lifeline.has_ended and any(
        slot.generation == 0 or slot.state is PeerState.STARTING for slot in board.slots
    ):
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            return
        lifeline.wait(left_s)


@dataclass
class _Reconciler:
    settings: SupervisorSettings
    board: Scoreboard
    registry: Registry
    lifeline: Lifeline
    report_fd: int
    registrations: dict[int, Registration] = field(default_factory=dict)
    retry_at_s: dict[int, float] = field(default_factory=dict)
    warn_at_s: float = 0.0
    health: dict[int, HealthCheck] = field(default_factory=dict)

    def reconcile(self) -> None:
        """One round. Stops half way if the supervisor has died: all records are revoked then."""
        self.board.registrar_heartbeat_ns = time.monotonic_ns()
        for slot in self.board.slots:
            if self.lifeline.has_ended:
                return
            check = self.health.setdefault(
                slot.index, HealthCheck(self.settings.liveness_timeout_s)
            )
            diagnosis = check.judge(slot, time.monotonic_ns())
            desired = diagnosis is not None and diagnosis.is_healthy
            registration = self.registrations.get(slot.index)
            if registration is None:
                if desired:
                    self._register(slot)
                elif slot.lease_id:
                    self._adopt_to_revoke(slot)
            elif not desired:
                self._revoke(slot, registration, diagnosis)
            else:
                self._publish(slot, registration.registered_until_s, registration.conflict)

    def _register(self, slot: Slot) -> None:
        now_s = time.monotonic()
        if now_s < self.retry_at_s.get(slot.index, 0.0):
            return

        def on_lease(lease_id: int) -> None:
            slot.lease_id = lease_id

        try:
            self.registrations[slot.index] = self.registry.register(
                self._record(slot), adopt_lease_id=slot.lease_id, on_lease=on_lease
            )
        except PeerConflictError as error:
            if slot.holder != str(error):
                log.error("%s", error)
            slot.lease_id = 0
            self._publish(slot, 0.0, str(error))
            self.retry_at_s[slot.index] = now_s + RETRY_INTERVAL_S
        except RegistryError as error:
            if now_s >= self.warn_at_s:
                self.warn_at_s = now_s + WARN_INTERVAL_S
                log.warning("not registered, retrying every %g s: %s", RETRY_INTERVAL_S, error)
            # All peers would wait for the same etcd: one attempt per interval is enough.
            for other in self.board.slots:
                self.retry_at_s[other.index] = time.monotonic() + RETRY_INTERVAL_S
        else:
            self._publish(slot, self.registrations[slot.index].registered_until_s, "")

    def _revoke(self, slot: Slot, registration: Registration, diagnosis: Diagnosis | None) -> None:
        if diagnosis is not None:
            log.error(
                "peer=%s: %s: its record is withdrawn until the peer is healthy again",
                self.settings.peer_id(slot.index),
                diagnosis.sentence,
            )
        registration.close()
        del self.registrations[slot.index]
        slot.lease_id = 0
        self._publish(slot, 0.0, "")

    def _adopt_to_revoke(self, slot: Slot) -> None:
        """Revoke the lease that a dead registrar has left of a peer that has stopped since."""
        try:
            self.registry.revoke(slot.lease_id)
        except RegistryError:
            return  # next round
        slot.lease_id = 0
        self._publish(slot, 0.0, "")

    def _publish(self, slot: Slot, registered_until_s: float, conflict: str) -> None:
        before = slot.registered, slot.holder
        slot.registered_until_ns = int(registered_until_s * 1e9)
        slot.holder = conflict
        if before != (slot.registered, slot.holder):
            _notify(self.report_fd)

    def _record(self, slot: Slot) -> PeerRecord:
        from peerd.registry import PeerRecord

        return PeerRecord(
            url=self.settings.advertised_host,
            port=self.settings.base_port + slot.index,
            peer_id=self.settings.peer_id(slot.index),
            partition_key=self.settings.partition_key,
        )


def _notify(report_fd: int) -> None:
    """Wake the supervisor. It needs no further byte if the pipe is full, and is dead if it is broken."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(report_fd, b"\n")
