"""Reconciles the scoreboard with etcd: every ready peer has a record, and nobody else has.

Desired: the slots that are READY and whose worker is healthy (peerd/health.py). Actual: the registrations
held here. Each round registers what is missing and revokes what is too much; the registry's session keeps
the leases. The lease of each slot is written to the scoreboard before the record is put, so a registrar can
be killed at any time: its successor adopts the leases, and no record disappears.

This is the only process of a supervisor with a gRPC channel. It is imported after the fork, since
gRPC's threads do not survive one. When the supervisor dies, the lifeline ends: every lease is
revoked, and the process exits, within a bound even if etcd hangs.

It is also who ends what the workers have started, once the supervisor was killed: the workers die of their
death signal, but that is not inherited. Each worker leads a process group, whose number is not given to
anybody else while it has a member (setpgid(2), credentials(7)), so what is left of it can be killed by
that number. What has made a session or a group of its own has meant to stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from setproctitle import setproctitle

from peerd._scoreboard import PeerState, RegistryState, Scoreboard, Slot
from peerd.errors import PeerConflictError, RegistryError
from peerd.health import Diagnosis, HealthCheck
from peerd.settings import SupervisorSettings

if TYPE_CHECKING:
    from peerd.registry import PeerRecord, Registration, Registry, SessionState

log = logging.getLogger(__name__)

MADV_DONTNEED = 4  # asm-generic/mman-common.h

ROUND_S = 0.25
"""How often liveness is looked at when nothing wakes the registrar."""

IMPORT_DELAY_S = 1.0
"""For how long the peers' start goes before the registrar's."""

RETRY_S = 0.5
"""Between two attempts to register the same peer."""

WARN_EVERY_S = 60.0

CALL_TIMEOUT_S = 2.0
"""The longest that one question to etcd may take."""

ORPHAN_TIMEOUT_S = 0.8
"""After the supervisor's death: when to exit even if etcd does not answer. The leases do the rest."""


def run(
    settings: SupervisorSettings,
    board: Scoreboard,
    lifeline_fd: int,
    report_fd: int,
    at_end: Callable[[], None] = lambda: None,
) -> int:
    """Reconcile until the lifeline ends. Returns 0. ``at_end`` is called however late etcd answers."""
    setproctitle("peerd: registrar")
    # Its end is the supervisor's end. The last two would stop it where it writes to a terminal whose
    # foreground is not its process group (stty tostop).
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU, signal.SIGTTIN):
        signal.signal(number, signal.SIG_IGN)
    os.set_blocking(report_fd, False)
    lifeline = _Lifeline(lifeline_fd, board, at_end)
    _wait_for_peers(board, lifeline)
    # Not at the top of the file: the supervisor imports this one, and must not import gRPC.
    with _without_asyncio():
        from peerd.registry import Registry

    def on_state(state: SessionState) -> None:
        board.registry_state = RegistryState[state.name]
        _tell(report_fd)

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
        _give_back_code()
        while not lifeline.ended:
            lifeline.wait(ROUND_S)
            reconciler.reconcile()
    at_end()
    return 0


def _wait_for_peers(board: Scoreboard, lifeline: _Lifeline) -> None:
    """To import gRPC takes a CPU for a fifth of a second, which workers that start can use better."""
    until_s = time.monotonic() + IMPORT_DELAY_S
    while not lifeline.ended and any(
        slot.generation == 0 or slot.state is PeerState.STARTING for slot in board.slots
    ):
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            return
        lifeline.wait(left_s)


@contextlib.contextmanager
def _without_asyncio() -> Iterator[None]:
    """gRPC brings a second interface along, for asyncio, and that brings OpenSSL for Python, beside its own:
    five megabytes that nobody uses here. TLS to etcd is gRPC's own."""
    sys.modules["grpc.aio"] = ModuleType("grpc.aio")
    sys.modules["ssl"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["ssl"]  # tls.py finds out with it what is wrong with a certificate


def _give_back_code() -> None:
    """Of gRPC's ten megabytes of code most was used once, at the import. What is used again comes back from
    the page cache (madvise(2): of a private mapping of a file, unmodified)."""
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps") as file:
        for line in file:
            addresses, permissions, _, _, inode, *_ = line.split()
            if permissions == "r-xp" and inode != "0":  # never written: no relocations are in it
                start, end = (int(address, 16) for address in addresses.split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


class _Lifeline:
    """The pipe from the supervisor, read by a thread, so that no call to etcd delays the notice."""

    def __init__(self, fd: int, board: Scoreboard, at_end: Callable[[], None]) -> None:
        self._fd = fd
        self._board = board
        self._at_end = at_end
        self._changed = threading.Event()
        self.ended = False
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def wait(self, timeout_s: float) -> None:
        self._changed.wait(timeout_s)
        self._changed.clear()

    def _watch(self) -> None:
        while os.read(self._fd, 4096):
            self._changed.set()
        self.ended = True
        self._changed.set()
        _end_process_groups(self._board)
        if not any(slot.lease_id for slot in self._board.slots):
            # Nothing to revoke: gRPC may still be under import, and nobody has to wait for it.
            self._at_end()
            os._exit(0)
        time.sleep(ORPHAN_TIMEOUT_S)
        log.warning("etcd does not answer: leaving the records to their leases")
        self._at_end()
        os._exit(0)


def _end_process_groups(board: Scoreboard) -> None:
    """After an orderly stop there are none."""
    for slot in board.slots:
        for pid in (slot.pid, slot.successor_pid):
            if pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)


class _Reconciler:
    def __init__(
        self,
        settings: SupervisorSettings,
        board: Scoreboard,
        registry: Registry,
        lifeline: _Lifeline,
        report_fd: int,
    ) -> None:
        self._settings = settings
        self._board = board
        self._registry = registry
        self._lifeline = lifeline
        self._report_fd = report_fd
        self._registrations: dict[int, Registration] = {}
        self._retry_s: dict[int, float] = {}
        self._warn_s = 0.0
        self._health: dict[int, HealthCheck] = {}

    def reconcile(self) -> None:
        """One round. Stops half way when the supervisor is gone: what is registered is revoked then."""
        self._board.registrar_heartbeat_ns = time.monotonic_ns()
        for slot in self._board.slots:
            if self._lifeline.ended:
                return
            diagnosis = self._judge(slot)
            desired = diagnosis is not None and diagnosis.is_healthy
            registration = self._registrations.get(slot.index)
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
        if now_s < self._retry_s.get(slot.index, 0.0):
            return

        def write_down(lease_id: int) -> None:
            slot.lease_id = lease_id

        try:
            self._registrations[slot.index] = self._registry.register(
                self._record(slot), adopt_lease_id=slot.lease_id, on_lease=write_down
            )
        except PeerConflictError as error:
            if slot.holder != str(error):
                log.error("%s", error)
            slot.lease_id = 0
            self._publish(slot, 0.0, str(error))
            self._retry_s[slot.index] = now_s + RETRY_S
        except RegistryError as error:
            if now_s >= self._warn_s:
                self._warn_s = now_s + WARN_EVERY_S
                log.warning("not registered, and tried again every %g s: %s", RETRY_S, error)
            # All of them would wait for the same etcd: one attempt a round is enough.
            for other in self._board.slots:
                self._retry_s[other.index] = time.monotonic() + RETRY_S
        else:
            self._publish(slot, self._registrations[slot.index].registered_until_s, "")

    def _judge(self, slot: Slot) -> Diagnosis | None:
        timeout_s = self._settings.liveness_timeout_s
        check = self._health.setdefault(slot.index, HealthCheck(timeout_s))
        return check.judge(slot, time.monotonic_ns())

    def _revoke(self, slot: Slot, registration: Registration, diagnosis: Diagnosis | None) -> None:
        if diagnosis is not None:
            log.error(
                "peer=%s: %s: its record is withdrawn until the peer is healthy again",
                self._settings.peer_id(slot.index),
                diagnosis.sentence,
            )
        registration.close()
        del self._registrations[slot.index]
        slot.lease_id = 0
        self._publish(slot, 0.0, "")

    def _adopt_to_revoke(self, slot: Slot) -> None:
        """A lease that a registrar left behind when it died, of a peer that has stopped since."""
        try:
            self._registry.revoke(slot.lease_id)
        except RegistryError:
            return  # next round
        slot.lease_id = 0
        self._publish(slot, 0.0, "")

    def _publish(self, slot: Slot, registered_until_s: float, conflict: str) -> None:
        before = slot.registered, slot.holder
        slot.registered_until_ns = int(registered_until_s * 1e9)
        slot.holder = conflict
        if before != (slot.registered, slot.holder):
            _tell(self._report_fd)

    def _record(self, slot: Slot) -> PeerRecord:
        from peerd.registry import PeerRecord

        return PeerRecord(
            url=self._settings.advertised_host,
            port=self._settings.base_port + slot.index,
            peer_id=self._settings.peer_id(slot.index),
            partition_key=self._settings.partition_key,
        )


def _tell(report_fd: int) -> None:
    """A full pipe means that the supervisor has enough to read; a broken one, that it is gone."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(report_fd, b"\n")
