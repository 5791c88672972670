"""Keeps one worker a peer running, and with them the registrar and, if asked, an etcd.

One thread and one selector: pidfds tell of deaths, pipes of readiness, a socketpair of signals, and
timers are the selector's timeout. There is no gRPC here and there never was a thread, so fork is
safe at any time (gRPC's threads hang a forked child in up to 17 of 20 cases).

What runs in a child is handed in: this file imports neither the worker nor the registrar.

Stopping has phases, each with an end of its own, all within ``stop_timeout_s``:

    WITHDRAW  the slots are STOPPING; the registrar revokes their records, the workers still serve
    DRAIN     the workers get SIGTERM, serve what their queues hold, and exit
    CLOSE     the registrar's lifeline is closed, then etcd is ended

Replacing a worker (``reload``, ``restart``) loses nothing: its successor loads the app beside it and
waits; then the worker answers what it has read and exits, and the successor reads on from the same
socket, where the kernel has kept what came meanwhile. One peer at a time, in the order asked for. A
successor that cannot start leaves the worker as it was.

A worker whose loop could turn and does not is stuck (liveness.py): its Python stack goes to the log,
and it is killed and replaced.

A second signal skips to SIGKILL for the workers and the end of the lifeline: the registrar revokes
what is left by itself, as it does when the supervisor is killed.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import os
import random
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from setproctitle import setproctitle

from peerd._scoreboard import PeerState, RegistryState, Scoreboard, Slot
from peerd.embedded_etcd import is_listening
from peerd.errors import ControlError
from peerd.settings import EmbeddedEtcdSettings, SupervisorSettings
from peerd.signals import DUMP_STACK, HAND_OVER
from peerd.supervisor.control import Command, ControlServer, Pending
from peerd.supervisor.history import History
from peerd.supervisor.liveness import Liveness, Verdict
from peerd.supervisor.processes import Child, Exit, redirect_output, spawn
from peerd.supervisor.restart import Failure, RestartPolicy, next_restart
from peerd.supervisor.status import StatusReport
from peerd.supervisor.workers import Worker, WorkerEntry, start_worker

if TYPE_CHECKING:
    from peerd.supervisor.metrics import MetricsServer

log = logging.getLogger(__name__)

EX_OK = 0
EX_CONFIG = 78

STOP_SIGNALS: Mapping[signal.Signals, int] = {
    signal.SIGTERM: EX_OK,
    signal.SIGINT: 128 + signal.SIGINT,
}
"""What asks the supervisor to stop, and the exit code it then ends with. SIGHUP reloads."""

WITHDRAW_TIMEOUT_S = 2.0
"""For how long a stop waits for the registrar; longer than etcd's answer, shorter than the stop."""

LAST_TIMEOUT_S = 1.0
"""What a stop at its end leaves the registrar to revoke the records."""

HAND_OVER_GRACE_S = 1.0
"""What a worker has beyond its drain timeout to leave the socket to its successor."""

LOOK_S = 0.5
"""How often old heartbeats are looked at."""

OLD_HEARTBEAT_NS = 1_000_000_000
"""Four times as old as an idle loop lets it become."""

STACK_S = 0.5
"""How long a stuck worker has to write its stack."""

MOST_NAMES = 8
"""In one log line."""

RegistrarEntry = Callable[[Scoreboard, int, int], int]
"""(scoreboard, lifeline, report) -> exit code; runs in the registrar.

The lifeline can be read: a byte means that a slot has changed, its end that the supervisor is gone.
A byte written to the report means that a registration has changed.
"""


class _Phase(enum.Enum):
    SERVING = enum.auto()
    WITHDRAW = enum.auto()
    DRAIN = enum.auto()
    CLOSE = enum.auto()
    DONE = enum.auto()


@dataclass
class _Managed:
    """A child that is started again when it dies."""

    name: str
    start: Callable[[], None]
    child: Child | None = None
    started_s: float = 0.0
    ready_s: float | None = None
    next_start_s: float | None = None
    failures: deque[Failure] = field(default_factory=lambda: deque(maxlen=64))
    policy: RestartPolicy = field(default_factory=RestartPolicy)


@dataclass
class _Peer(_Managed):
    slot: Slot = field(kw_only=True)
    sock: socket.socket = field(kw_only=True)
    peer_id: str = field(kw_only=True)
    worker: Worker | None = None
    successor: Worker | None = None
    stack_asked_s: float | None = None
    """When the worker was found stuck and told to write its stack."""


@dataclass
class _Replacement:
    """A worker that is to be replaced by a new one."""

    peer: _Peer
    told: Callable[[dict[str, object] | str], None]
    """Gets what happened, or why nothing did. Called once."""

    old_pid: int = 0
    deadline_s: float = math.inf
    handed_over_s: float | None = None
    """When the worker was told to leave the socket, or was found to have left it."""


class Supervisor:
    def __init__(
        self,
        settings: SupervisorSettings,
        sockets: Sequence[socket.socket],
        *,
        worker_entry: WorkerEntry,
        registrar_entry: RegistrarEntry,
        etcd: EmbeddedEtcdSettings | None,
        control_path: Path,
        metrics_socket: socket.socket | None,
        version: str,
    ) -> None:
        self._settings = settings
        self._worker_entry = worker_entry
        self._registrar_entry = registrar_entry
        self._etcd_settings = etcd
        self._control_path = control_path
        self._board = Scoreboard(len(sockets))
        self._status = StatusReport(settings, sockets, self._board, version)
        self._selector = selectors.DefaultSelector()
        self._peers = [
            self._peer(slot, sock) for slot, sock in zip(self._board.slots, sockets, strict=True)
        ]
        # Never parked, and back before the leases that its predecessor kept have run out.
        ttl_s = settings.registry.lease_ttl_s
        unparked = RestartPolicy(max_failures=sys.maxsize, max_delay_s=ttl_s / 4)
        self._registrar = _Managed("registrar", self._start_registrar, policy=unparked)
        self._etcd = _Managed("etcd", self._start_etcd, policy=unparked)
        self._replacements: deque[_Replacement] = deque()
        self._replacing: _Replacement | None = None
        self._history = History()
        self._liveness = Liveness(settings.stuck_timeout_s)
        self._next_look_s = 0.0
        self._lifeline_fd: int | None = None
        self._registrar_report_fd: int | None = None
        self._control: ControlServer | None = None
        self._metrics_socket = metrics_socket
        self._metrics: MetricsServer | None = None
        self._version = version
        self._phase = _Phase.SERVING
        self._stop_s = 0.0
        self._kill_s = 0.0
        self._next_notice_s = 0.0
        self._exit_code = EX_OK
        self._begun_s = time.monotonic()
        self._all_ready_told = False
        self._all_registered_told = False

    def run(self) -> int:
        """Serve until a signal ends it; the exit code."""
        last = self._settings.last_port
        setproctitle(f"peerd: supervisor of ports {self._settings.base_port} to {last}")
        with self._signals():
            try:
                self._open_control()
                self._open_metrics()
                # Before the etcd, whose folder it removes if this process is killed.
                self._start(self._registrar)
                for peer in self._peers:
                    self._start(peer)
                if self._etcd_settings is not None:
                    self._start(self._etcd)
                while self._phase is not _Phase.DONE:
                    self._turn()
            finally:
                self._release()
        return self._exit_code

    def status(self) -> dict[str, object]:
        if self._phase is not _Phase.SERVING:
            return self._status.build("stopping")
        return self._status.build("ready" if self._status.all_get_on() else "degraded")

    def stop(self, _arguments: Mapping[str, object]) -> dict[str, object]:
        """Begin to stop, as SIGTERM does."""
        if self._is_serving:
            log.info("asked to stop")
            self._begin_stop(EX_OK)
        return {"pid": os.getpid(), "stop_timeout_s": self._settings.stop_timeout_s}

    # The loop

    def _turn(self) -> None:
        for key, events in self._selector.select(self._timeout_s()):
            # A callback may have unregistered what comes later in the same list, or even have
            # given its descriptor's number to something new.
            current = self._selector.get_map().get(key.fd)
            if current is not None and current.data is key.data:
                key.data(events)
        now_s = time.monotonic()
        for managed in (*self._peers, self._etcd, self._registrar):
            if managed.next_start_s is not None and managed.next_start_s <= now_s:
                self._start(managed)
        if self._replacing is not None and now_s >= self._replacing.deadline_s:
            self._replacement_is_late(self._replacing)
        if self._phase is not _Phase.SERVING:
            self._advance_stop(now_s)
        elif now_s >= self._next_look_s:
            self._next_look_s = now_s + LOOK_S
            self._look_for_stuck_workers(now_s)

    def _timeout_s(self) -> float:
        due = [
            managed.next_start_s
            for managed in (*self._peers, self._etcd, self._registrar)
            if managed.next_start_s is not None
        ]
        if self._replacing is not None:
            due.append(self._replacing.deadline_s)
        due.append(self._next_look_s if self._is_serving else self._next_deadline_s())
        return max(0.0, min(due) - time.monotonic())

    @property
    def _is_serving(self) -> bool:
        return self._phase is _Phase.SERVING

    # Children

    def _start(self, managed: _Managed) -> None:
        managed.next_start_s = None
        managed.ready_s = None
        managed.started_s = time.monotonic()
        try:
            managed.start()
        except OSError as error:
            log.error("cannot start the %s: %s", managed.name, error)
            self._plan_restart(managed)
            return
        assert managed.child is not None
        self._selector.register(
            managed.child.pidfd, selectors.EVENT_READ, lambda _: self._exited(managed)
        )

    def _exited(self, managed: _Managed) -> None:
        assert managed.child is not None
        pid, pidfd = managed.child.pid, managed.child.pidfd
        self._selector.unregister(pidfd)
        end = managed.child.wait()
        managed.child = None
        if isinstance(managed, _Peer):
            self._worker_exited(managed, pid, end)
        elif managed is self._registrar:
            self._registrar_exited(pid, end)
        else:
            self._etcd_exited(pid, end)

    def _plan_restart(self, managed: _Managed) -> None:
        now_s = time.monotonic()
        ready_for_s = 0.0 if managed.ready_s is None else now_s - managed.ready_s
        managed.failures.append(Failure(now_s, ready_for_s))
        restart = next_restart(managed.policy, list(managed.failures), random.random())
        managed.next_start_s = now_s + restart.delay_s
        if isinstance(managed, _Peer):
            state = PeerState.CRASHLOOP if restart.crashloop else PeerState.BACKOFF
            self._set_state(managed, state)
            managed.slot.restarts += 1
        when = f"in {restart.delay_s:.2g} s" if restart.delay_s else "now"
        kind = "parked" if restart.crashloop else "restarting"
        self._history.note(kind, what=managed.name, in_s=round(restart.delay_s, 3))
        if restart.crashloop:
            log.error(
                "the %s failed %d times within %g s: parked, the next try is %s",
                managed.name,
                managed.policy.max_failures + 1,
                managed.policy.window_s,
                when,
            )
        else:
            log.info("restarting the %s %s", managed.name, when)

    # Workers

    def _peer(self, slot: Slot, sock: socket.socket) -> _Peer:
        def start() -> None:
            self._start_worker(peer)

        peer_id = self._settings.peer_id(slot.index)
        peer = _Peer(f"worker of {peer_id}", start, slot=slot, sock=sock, peer_id=peer_id)
        return peer

    def _start_worker(self, peer: _Peer) -> None:
        worker = start_worker(self._worker_entry, peer.slot, peer.sock)
        self._follow(peer, worker)
        self._set_state(peer, PeerState.STARTING)
        worker.go()

    def _follow(self, peer: _Peer, worker: Worker) -> None:
        """From now on it is the one that serves."""
        peer.worker, peer.child = worker, worker.child
        peer.slot.pid = worker.child.pid
        peer.slot.generation += 1
        if worker.report_fd is not None:
            self._selector.register(
                worker.report_fd, selectors.EVENT_READ, lambda _: self._read_report(peer, worker)
            )

    def _read_report(self, peer: _Peer, worker: Worker) -> None:
        if not worker.read_report():
            self._close_report(worker)
        elif worker.is_ready:
            self._became_ready(peer)

    def _became_ready(self, peer: _Peer) -> None:
        peer.ready_s = time.monotonic()
        self._history.note("ready", peer_id=peer.peer_id, pid=peer.slot.pid)
        if self._is_serving and peer.slot.state is not PeerState.READY:
            self._set_state(peer, PeerState.READY)
            self._tell_all_ready()
        if self._replacing is not None and self._replacing.peer is peer:
            self._replaced(self._replacing)

    def _close_report(self, worker: Worker) -> None:
        if worker.report_fd is not None:
            self._selector.unregister(worker.report_fd)
        worker.close()

    def _worker_exited(self, peer: _Peer, pid: int, end: Exit) -> None:
        worker = peer.worker
        assert worker is not None
        while worker.report_fd is not None:
            self._read_report(peer, worker)
        peer.worker = peer.stack_asked_s = None
        peer.slot.pid = 0
        lost = peer.slot.unfinished
        peer.slot.lost_in_flight += lost
        replacement = self._replacing
        if replacement is not None and replacement.peer is peer and peer.successor is not None:
            if replacement.handed_over_s is None or end.code != EX_OK:
                self._note_death(peer, pid, end, worker.ready_s, lost)
                log.error(
                    "peer=%s: worker pid %d: %s while its successor started; datagrams in hand and "
                    "lost: %d",
                    peer.peer_id,
                    pid,
                    end,
                    lost,
                )
            self._predecessor_is_gone(replacement)
            return
        if not self._is_serving:
            self._set_state(peer, PeerState.STOPPED)
            self._fail_replacement_of(peer, f"the successor: {end}")
            return
        if worker.failure is not None:
            self._boot_failed(peer, worker.failure)
            return
        age = (
            "before it was ready"
            if worker.ready_s is None
            else f"after {time.monotonic() - worker.ready_s:.1f} s of service"
        )
        self._note_death(peer, pid, end, worker.ready_s, lost)
        log.error(
            "peer=%s: worker pid %d: %s %s; datagrams in hand and lost: %d",
            peer.peer_id,
            pid,
            end,
            age,
            lost,
        )
        self._plan_restart(peer)
        self._fail_replacement_of(peer, f"the successor: {end} {age}")

    def _note_death(
        self, peer: _Peer, pid: int, end: Exit, ready_s: float | None, lost: int
    ) -> None:
        ready_for_s = None if ready_s is None else round(time.monotonic() - ready_s, 3)
        self._history.note(
            "died",
            peer_id=peer.peer_id,
            pid=pid,
            how=str(end),
            ready_for_s=ready_for_s,
            lost_in_flight=lost,
        )

    def _boot_failed(self, peer: _Peer, text: str) -> None:
        self._history.note("cannot start", peer_id=peer.peer_id, why=text.partition("\n")[0])
        if any(other.ready_s is not None for other in self._peers):
            log.error("peer=%s: the worker cannot start: %s", peer.peer_id, text)
            self._plan_restart(peer)
            return
        # Nobody was ever ready: it is the configuration, and the same for every worker.
        log.critical("%s", text)
        self._set_state(peer, PeerState.STOPPED)
        self._begin_stop(EX_CONFIG)

    def _set_state(self, peer: _Peer, state: PeerState) -> None:
        peer.slot.since_ns = time.monotonic_ns()
        peer.slot.state = state
        self._wake_registrar()

    def _tell_all_ready(self) -> None:
        ready = sum(peer.slot.state is PeerState.READY for peer in self._peers)
        if ready == len(self._peers) and not self._all_ready_told:
            self._all_ready_told = True
            passed_ms = (time.monotonic() - self._begun_s) * 1e3
            log.info("%s ready, %.0f ms after start", self._all_peers(), passed_ms)

    def _all_peers(self) -> str:
        return "the peer is" if len(self._peers) == 1 else f"all {len(self._peers)} peers are"

    # Replacing workers

    def reload(self, _arguments: Mapping[str, object]) -> Pending:
        """Replace all workers, one at a time; stop at the first that fails."""
        return self._replace(self._peers)

    def restart(self, arguments: Mapping[str, object]) -> Pending:
        """Replace the worker of one slot, or start it if it is parked."""
        slot = arguments.get("slot")
        if type(slot) is not int or not 0 <= slot < len(self._peers):
            raise ControlError(f"no slot {slot!r}: there are 0 to {len(self._peers) - 1}")
        return self._replace([self._peers[slot]])

    def _replace(self, peers: Sequence[_Peer]) -> Pending:
        if not self._is_serving:
            raise ControlError("the supervisor is stopping")
        pending, results = Pending(), list[dict[str, object]]()
        group: list[_Replacement] = []

        def told(result: dict[str, object] | str) -> None:
            if isinstance(result, str):
                for other in group:
                    if other in self._replacements:
                        self._replacements.remove(other)
                kept = f"; {len(results)} of {len(group)} were replaced before" if results else ""
                self._history.note("not replaced", why=result.partition("\n")[0])
                log.error("not replaced%s: %s", kept, result)
                pending.fail(result + kept)
                return
            results.append(result)
            if len(results) == len(group):
                pending.finish({"replaced": results})

        group += [_Replacement(peer, told) for peer in peers]
        self._replacements += group
        self._next_replacement()
        return pending

    def _next_replacement(self) -> None:
        if self._replacing is not None or not self._replacements or not self._is_serving:
            return
        replacement = self._replacing = self._replacements.popleft()
        peer = replacement.peer
        peer.next_start_s = None  # this is it
        replacement.old_pid = peer.slot.pid
        try:
            worker = peer.successor = start_worker(self._worker_entry, peer.slot, peer.sock)
        except OSError as error:
            self._not_replaced(replacement, f"peer {peer.peer_id}: no successor: {error}")
            return
        assert worker.report_fd is not None
        replacement.deadline_s = worker.started_s + self._settings.boot_timeout_s
        self._selector.register(
            worker.child.pidfd, selectors.EVENT_READ, lambda _: self._successor_exited(replacement)
        )
        self._selector.register(
            worker.report_fd, selectors.EVENT_READ, lambda _: self._successor_says(replacement)
        )

    def _successor_says(self, replacement: _Replacement) -> None:
        worker, now_s = replacement.peer.successor, time.monotonic()
        assert worker is not None
        if not worker.read_report():
            self._close_report(worker)
        elif worker.is_prepared and replacement.peer.child is None:
            self._take_over(replacement)
        elif worker.is_prepared and replacement.handed_over_s is None:
            assert replacement.peer.child is not None
            replacement.peer.child.send(HAND_OVER)
            replacement.handed_over_s = now_s
            replacement.deadline_s = now_s + self._settings.drain_timeout_s + HAND_OVER_GRACE_S

    def _predecessor_is_gone(self, replacement: _Replacement) -> None:
        """As it was told to, or because it died."""
        successor = replacement.peer.successor
        assert successor is not None
        if replacement.handed_over_s is None:
            replacement.handed_over_s = time.monotonic()
            replacement.peer.slot.restarts += 1
            self._set_state(replacement.peer, PeerState.STARTING)
        if successor.is_prepared:
            self._take_over(replacement)

    def _take_over(self, replacement: _Replacement) -> None:
        peer = replacement.peer
        worker, peer.successor = peer.successor, None
        assert worker is not None
        self._selector.unregister(worker.child.pidfd)
        if worker.report_fd is not None:
            self._selector.unregister(worker.report_fd)
        self._follow(peer, worker)
        self._selector.register(
            worker.child.pidfd, selectors.EVENT_READ, lambda _: self._exited(peer)
        )
        if self._is_serving and peer.slot.state is not PeerState.READY:
            self._set_state(peer, PeerState.STARTING)
        replacement.deadline_s = math.inf
        worker.go()

    def _replaced(self, replacement: _Replacement) -> None:
        peer = replacement.peer
        gap_s = time.monotonic() - (replacement.handed_over_s or time.monotonic())
        self._history.note(
            "replaced",
            peer_id=peer.peer_id,
            pid=peer.slot.pid,
            old_pid=replacement.old_pid or None,
            gap_ms=round(gap_s * 1e3, 3),
        )
        log.info(
            "peer=%s: worker pid %d has taken over from %s; gap %.1f ms",
            peer.peer_id,
            peer.slot.pid,
            f"pid {replacement.old_pid}" if replacement.old_pid else "nobody",
            gap_s * 1e3,
        )
        self._replacing = None
        replacement.told(
            {
                "slot": peer.slot.index,
                "peer_id": peer.peer_id,
                "old_pid": replacement.old_pid or None,
                "pid": peer.slot.pid,
                "gap_ms": round(gap_s * 1e3, 3),
            }
        )
        self._next_replacement()

    def _not_replaced(self, replacement: _Replacement, why: str) -> None:
        peer = replacement.peer
        self._replacing = None
        if peer.child is None and self._is_serving and peer.next_start_s is None:
            self._plan_restart(peer)
        replacement.told(why)
        self._next_replacement()

    def _fail_replacement_of(self, peer: _Peer, why: str) -> None:
        if self._replacing is not None and self._replacing.peer is peer:
            self._not_replaced(self._replacing, f"peer {peer.peer_id}: {why}")

    def _successor_exited(self, replacement: _Replacement) -> None:
        peer = replacement.peer
        worker = peer.successor
        assert worker is not None
        self._selector.unregister(worker.child.pidfd)
        while worker.report_fd is not None:
            if not worker.read_report():
                self._close_report(worker)
        end = worker.wait()
        peer.successor = None
        why = worker.failure or f"the successor ended before it was ready: {end}"
        self._not_replaced(replacement, f"peer {peer.peer_id}: {why}")

    def _replacement_is_late(self, replacement: _Replacement) -> None:
        peer = replacement.peer
        replacement.deadline_s = math.inf
        if replacement.handed_over_s is None and peer.successor is not None:
            log.error(
                "peer=%s: the successor has not loaded its app within %g s: SIGKILL",
                peer.peer_id,
                self._settings.boot_timeout_s,
            )
            peer.successor.child.send(signal.SIGKILL)
        elif peer.child is not None:
            log.error("peer=%s: the worker does not leave its socket: SIGKILL", peer.peer_id)
            peer.child.send(signal.SIGKILL)

    def _abandon_replacements(self) -> None:
        """The supervisor stops. One that is half done is finished, since the queue is the successor's."""
        waiting, self._replacements = self._replacements, deque()
        for replacement in waiting:
            replacement.told("the supervisor is stopping")
        if self._replacing is not None and self._replacing.handed_over_s is None:
            successor = self._replacing.peer.successor
            if successor is not None:
                successor.child.send(signal.SIGKILL)

    # Stuck workers

    def _look_for_stuck_workers(self, now_s: float) -> None:
        oldest_ns = time.monotonic_ns() - OLD_HEARTBEAT_NS
        for peer in self._peers:
            slot = peer.slot
            if slot.state is not PeerState.READY or slot.heartbeat_ns > oldest_ns:
                peer.stack_asked_s = None
            elif self._liveness.judge(slot, now_s) is not Verdict.STUCK or peer.child is None:
                continue
            elif peer.stack_asked_s is None:
                log.error(
                    "peer=%s: worker pid %d is stuck: for %.0f s it could turn its loop and has not; "
                    "its stack follows, then SIGKILL",
                    peer.peer_id,
                    slot.pid,
                    self._liveness.own_s(slot),
                )
                self._history.note(
                    "stuck",
                    peer_id=peer.peer_id,
                    pid=slot.pid,
                    for_s=round(self._liveness.own_s(slot), 3),
                )
                peer.stack_asked_s = now_s
                peer.child.send(DUMP_STACK)
            elif now_s >= peer.stack_asked_s + STACK_S:
                peer.child.send(signal.SIGKILL)

    # The registrar

    def _start_registrar(self) -> None:
        lifeline_read, lifeline_write = os.pipe()
        report_read, report_write = os.pipe()
        os.set_blocking(lifeline_write, False)
        os.set_blocking(report_read, False)
        try:
            self._registrar.child = spawn(
                lambda: self._registrar_entry(self._board, lifeline_read, report_write),
                (lifeline_read, report_write),
                # It must outlive the supervisor, for as long as it takes to revoke the records.
                die_with_parent=False,
            )
        except OSError:
            os.close(lifeline_write)
            os.close(report_read)
            raise
        finally:
            os.close(lifeline_read)
            os.close(report_write)
        self._registrar.ready_s = time.monotonic()
        self._lifeline_fd = lifeline_write
        self._registrar_report_fd = report_read
        self._selector.register(report_read, selectors.EVENT_READ, self._read_registrar_report)

    def _read_registrar_report(self, _events: int) -> None:
        assert self._registrar_report_fd is not None
        if not os.read(self._registrar_report_fd, 4096):
            self._selector.unregister(self._registrar_report_fd)
            os.close(self._registrar_report_fd)
            self._registrar_report_fd = None
        if not self._all_registered_told and all(peer.slot.registered for peer in self._peers):
            self._all_registered_told = True
            endpoint = self._settings.registry.endpoint
            log.info("%s registered in etcd at %s", self._all_peers(), endpoint)

    def _registrar_exited(self, pid: int, end: Exit) -> None:
        self._close_lifeline()
        if self._registrar_report_fd is not None:
            self._selector.unregister(self._registrar_report_fd)
            os.close(self._registrar_report_fd)
            self._registrar_report_fd = None
        self._board.registry_state = RegistryState.SUSPENDED
        if self._phase in (_Phase.SERVING, _Phase.WITHDRAW):
            self._history.note("died", what="registrar", pid=pid, how=str(end))
            log.error("the registrar, pid %d: %s", pid, end)
            self._plan_restart(self._registrar)

    def _wake_registrar(self) -> None:
        if self._lifeline_fd is not None:
            # Full: it has not read the last wake-ups yet. Broken: its end is about to be noticed.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._lifeline_fd, b"\n")

    def _close_lifeline(self) -> None:
        if self._lifeline_fd is not None:
            os.close(self._lifeline_fd)
            self._lifeline_fd = None

    # The embedded etcd

    def _start_etcd(self) -> None:
        assert self._etcd_settings is not None
        command = self._etcd_settings.command
        data_dir = self._etcd_settings.data_dir

        def run_etcd() -> int:
            os.makedirs(data_dir, mode=0o700, exist_ok=True)
            redirect_output(str(data_dir / "etcd.log"))
            os.execv(command[0], command)

        self._etcd.child = spawn(run_etcd, (), die_with_parent=True)
        self._etcd.ready_s = time.monotonic()

    def _etcd_exited(self, pid: int, end: Exit) -> None:
        assert self._etcd_settings is not None
        if self._phase is not _Phase.SERVING:
            return
        if is_listening(self._settings.registry.endpoint):
            # Two supervisors started at once, and the other one's etcd was first.
            log.info("etcd pid %d: %s; another one listens there by now and is used", pid, end)
            return
        self._history.note("died", what="etcd", pid=pid, how=str(end))
        log.error("etcd pid %d: %s; its last words:\n%s", pid, end, self._etcd_last_words())
        self._plan_restart(self._etcd)

    def _etcd_last_words(self) -> str:
        assert self._etcd_settings is not None
        with contextlib.suppress(OSError):
            text = (self._etcd_settings.data_dir / "etcd.log").read_text(errors="replace")
            return "\n".join(text.splitlines()[-3:]) or "(its log is empty)"
        return "(it has no log)"

    # Stopping

    def _begin_stop(self, exit_code: int) -> None:
        self._phase = _Phase.WITHDRAW
        self._history.note("stopping", exit_code=exit_code)
        self._exit_code = exit_code
        self._stop_s = time.monotonic()
        self._kill_s = self._stop_s + self._settings.stop_timeout_s
        self._next_notice_s = self._stop_s + 1.0
        for managed in (*self._peers, self._etcd):
            managed.next_start_s = None
        if self._registrar.child is None:
            # A registrar that died a moment ago: the records it left need one to revoke them.
            self._registrar.next_start_s = self._stop_s
        self._abandon_replacements()
        for peer in self._peers:
            self._set_state(peer, PeerState.STOPPING if peer.child else PeerState.STOPPED)

    def _stop_now(self) -> None:
        log.warning("second signal: stopping at once")
        now_s = time.monotonic()
        self._kill_s = min(self._kill_s, now_s + LAST_TIMEOUT_S)
        for peer in self._peers:
            for worker in (peer.worker, peer.successor):
                if worker is not None:
                    worker.child.send(signal.SIGKILL)
        self._close()

    def _advance_stop(self, now_s: float) -> None:
        if self._phase is _Phase.WITHDRAW and self._withdrawn(now_s):
            self._phase = _Phase.DRAIN
            self._registrar.next_start_s = None
            for peer in self._peers:
                if peer.child is not None:
                    peer.child.send(signal.SIGTERM)
        if self._phase is _Phase.DRAIN and not any(
            peer.child or peer.successor for peer in self._peers
        ):
            self._close()
        if (
            self._phase is _Phase.CLOSE
            and self._registrar.child is None
            and self._etcd.child is not None
        ):
            # Its data is thrown away, so there is nothing that it could do in an orderly stop.
            self._etcd.child.send(signal.SIGKILL)
        children = [
            managed for managed in (*self._peers, self._registrar, self._etcd) if managed.child
        ]
        if self._phase is _Phase.CLOSE and not children and self._replacing is None:
            self._phase = _Phase.DONE
        elif now_s >= self._kill_s:
            # The registrar and etcd are asked to stop in CLOSE only.
            late = children if self._phase is _Phase.CLOSE else self._peers
            for managed in late:
                if managed.child is not None:
                    log.warning("the %s has not stopped in time: SIGKILL", managed.name)
                    managed.child.send(signal.SIGKILL)
            self._kill_s = now_s + LAST_TIMEOUT_S
        elif now_s >= self._next_notice_s:
            self._next_notice_s = now_s + 1.0
            names = [managed.name for managed in children]
            more = len(names) - MOST_NAMES
            if more > 0:
                names[MOST_NAMES:] = [f"and {more} more"]
            log.info("waiting for: %s", ", ".join(names))

    def _close(self) -> None:
        self._phase = _Phase.CLOSE
        self._registrar.next_start_s = None
        left = sum(peer.slot.lease_id != 0 for peer in self._peers)
        if left and self._registrar.child is None:
            log.warning(
                "no registrar to revoke %d records: their leases run out within %d s",
                left,
                self._settings.registry.lease_ttl_s,
            )
        self._close_lifeline()

    def _withdrawn(self, now_s: float) -> bool:
        if now_s >= self._stop_s + WITHDRAW_TIMEOUT_S:
            return True
        if self._replacing is not None:
            return False  # who is told to drain must have begun to serve
        return not any(peer.slot.lease_id for peer in self._peers)

    def _next_deadline_s(self) -> float:
        deadlines = [self._kill_s, self._next_notice_s]
        if self._phase is _Phase.WITHDRAW:
            deadlines.append(self._stop_s + WITHDRAW_TIMEOUT_S)
        return min(deadlines)

    # Set-up and tear-down

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals become bytes on a socketpair, and so events of the selector."""
        reader, writer = socket.socketpair()
        with reader, writer:
            reader.setblocking(False)
            writer.setblocking(False)
            previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            previous = {
                number: signal.signal(number, lambda *_: None)
                for number in (*STOP_SIGNALS, signal.SIGHUP)
            }
            self._selector.register(
                reader, selectors.EVENT_READ, lambda _: self._read_signals(reader)
            )
            try:
                yield
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(previous_fd)
                self._selector.close()

    def _read_signals(self, reader: socket.socket) -> None:
        for number in reader.recv(4096):
            if number == signal.SIGHUP and self._is_serving:
                log.info("SIGHUP: reloading")
                self.reload({})
            if number not in STOP_SIGNALS:
                continue
            if self._phase is _Phase.SERVING:
                name = signal.Signals(number).name
                log.info("%s: stopping; once more stops at once", name)
                self._begin_stop(STOP_SIGNALS[signal.Signals(number)])
            elif self._phase in (_Phase.WITHDRAW, _Phase.DRAIN):
                self._stop_now()

    def _open_control(self) -> None:
        try:
            commands: dict[str, Command] = {
                "status": lambda _: self.status(),
                "reload": self.reload,
                "restart": self.restart,
                "stop": self.stop,
                "events": self._history.since,
            }
            self._control = ControlServer(self._control_path, commands, self._selector)
        except (OSError, ControlError) as error:
            log.info("no control socket, so no 'peerd status': %s: %s", self._control_path, error)

    def _open_metrics(self) -> None:
        if self._metrics_socket is None:
            return
        # Not at the top: only who asks for metrics pays for prometheus_client. Not at the first
        # scrape either, since it takes the time of many.
        from peerd.supervisor.metrics import MetricsServer, ScoreboardCollector

        sockets = [peer.sock for peer in self._peers]
        collector = ScoreboardCollector(
            self._settings, sockets, self._board, self._status, self._history, self._version
        )
        self._metrics = MetricsServer(self._metrics_socket, collector, self._status, self._selector)

    def _release(self) -> None:
        """After the last phase there is nothing left to end here; after an exception there is."""
        self._close_lifeline()
        for managed in (*self._peers, self._etcd):
            if managed.child is not None:
                managed.child.send(signal.SIGKILL)
        for managed in (*self._peers, self._etcd, self._registrar):
            if managed.child is not None:
                managed.child.wait()
        for peer in self._peers:
            if peer.successor is not None:
                peer.successor.child.send(signal.SIGKILL)
                peer.successor.wait()
            for worker in (peer.worker, peer.successor):
                if worker is not None:
                    worker.close()
            peer.sock.close()
        if self._control is not None:
            self._control.close()
        if self._metrics is not None:
            self._metrics.close()
