"""Scaling: more peers on the ports behind the last one, or fewer, the highest first.

Nothing changes unless everything can: all new sockets are bound before a process is forked, and if one of the
new peers cannot start, all of them are removed. To remove a peer, its record is revoked first, then its
queue is served, and at last its port is closed. Scalings that are requested meanwhile wait in order.
"""

from __future__ import annotations

import logging
import resource
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from peerd.address import MAX_PORT
from peerd.errors import BindError, ControlError
from peerd.settings import MAX_PEERS, SupervisorSettings
from peerd.supervisor import events
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Loop, Promise
from peerd.supervisor.peer_table import PeerTable
from peerd.supervisor.sockets import bind_all, resolve
from peerd.supervisor.stopping import WITHDRAW_TIMEOUT_S
from peerd.supervisor.supervised_peer import SupervisedPeer
from peerd.supervisor.worker_process import DESCRIPTORS

log = logging.getLogger(__name__)

DESCRIPTORS_PER_PEER = 1 + 2 * DESCRIPTORS  # Its socket, a worker, and a successor
OTHER_DESCRIPTORS = 160  # Control and metrics clients, the registrar, etcd, what Python has open
ScaleResult = dict[str, object]


@dataclass(eq=False, repr=False)
class _Scaling:
    """One request, and how far it is."""

    target: Callable[[int], int]  # Number of peers before -> after
    promise: Promise[ScaleResult]
    before: int = 0
    started: list[SupervisedPeer] = field(default_factory=list)
    starting: set[int] = field(default_factory=set)  # Slots of those that are not ready yet
    ending: dict[int, float] = field(default_factory=dict)
    """Slot -> monotonic time of the begin of its end."""

    stopped: dict[int, dict[str, object]] = field(default_factory=dict)
    failure: str | None = None


class Scaler:
    def __init__(
        self, settings: SupervisorSettings, loop: Loop, journal: Journal, table: PeerTable
    ) -> None:
        self._settings = settings
        self._loop = loop
        self._journal = journal
        self._table = table
        self._peers = table.view
        # Resolved now, because a name server may take its time.
        _, self._address = resolve(settings.host, "--host")
        self._waiting: deque[_Scaling] = deque()
        self._current: _Scaling | None = None
        self._signals: _Scaling | None = None
        """The scaling that takes in further signals, because it has not begun."""

        self._signalled = 0
        journal.subscribe(events.WorkerReady, self._on_worker_ready)
        journal.subscribe(events.CannotStart, self._on_peer_failed)
        journal.subscribe(events.PeerParked, self._on_peer_failed)
        journal.subscribe(events.RecordsChanged, lambda _: self._drain_withdrawn())
        journal.subscribe(events.PeerEnded, self._on_peer_ended)
        journal.subscribe(events.Stopping, lambda _: self._on_stopping())

    def scale_to(self, peers: int) -> Promise[ScaleResult]:
        scaling = _Scaling(lambda _: peers, Promise(self._loop))
        self._enqueue(scaling)
        return scaling.promise

    def scale_by(self, difference: int) -> None:
        """For SIGTTIN and SIGTTOU, which add up while an earlier scaling runs. Never below one peer."""
        self._signalled += difference
        if self._signals is None:
            scaling = self._signals = _Scaling(self._target_of_signals, Promise(self._loop))
            scaling.promise.then(lambda _: None, lambda why: log.error("not scaled: %s", why))
            self._enqueue(scaling)

    def _target_of_signals(self, before: int) -> int:
        self._signals = None
        difference, self._signalled = self._signalled, 0
        return max(1, min(before + difference, MAX_PEERS))

    def _enqueue(self, scaling: _Scaling) -> None:
        self._waiting.append(scaling)
        self._begin_next()

    def _begin_next(self) -> None:
        while self._current is None and self._waiting:
            scaling = self._waiting.popleft()
            scaling.before = len(self._peers)
            target = scaling.target(scaling.before)
            try:
                self._check(target)
                slots = range(scaling.before, target)
                port, flag = self._settings.base_port + slots.start, "number of peers"
                size = self._settings.recv_buffer_bytes
                sockets = bind_all(self._address, port, len(slots), size, flag=flag, warns=False)
            except (BindError, ControlError) as error:
                self._journal.publish(events.NotScaled(why=str(error)))
                scaling.promise.reject(str(error))
                continue
            self._current = scaling
            try:
                self._begin(target, dict(zip(slots, sockets, strict=True)))
            except BaseException:  # a defect; it must not hold up the scalings that wait
                self._current = None
                scaling.promise.reject("internal error: see the supervisor's log")
                raise

    def _begin(self, target: int, sockets: Mapping[int, socket.socket]) -> None:
        scaling = self._current
        assert scaling is not None
        scaling.started = self._table.add(sockets)
        scaling.starting = set(sockets)
        for peer in scaling.started:
            peer.start()
        self._end([self._peers[slot] for slot in range(scaling.before - 1, target - 1, -1)])
        self._finish_if_done()

    def _check(self, target: int) -> None:
        """Raises ControlError."""
        cannot, last_port = f"cannot scale to {target} peers", self._settings.base_port + target - 1
        if not 1 <= target <= MAX_PEERS:
            raise ControlError(f"{cannot}: give a number from 1 to {MAX_PEERS}")
        if last_port > MAX_PORT:
            most = MAX_PORT - self._settings.base_port + 1
            raise ControlError(f"{cannot}: the last port would be {last_port}; {most} fit")
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = DESCRIPTORS_PER_PEER * target + OTHER_DESCRIPTORS
        if limit != resource.RLIM_INFINITY and needed > limit:
            files = f"{needed} open files, and the limit is {limit} (ulimit -n)"
            raise ControlError(f"{cannot}: that takes {files}")

    def _end(self, peers: Sequence[SupervisedPeer]) -> None:
        """Begin to remove peers."""
        scaling = self._current
        assert scaling is not None
        for peer in peers:
            scaling.ending.setdefault(peer.slot.index, time.monotonic())
            peer.stop()
        self._loop.call_later(WITHDRAW_TIMEOUT_S, lambda: self._drain(peers))
        self._loop.call_later(self._settings.stop_timeout_s, lambda: self._kill(peers))
        self._drain_withdrawn()  # those that have no record

    def _drain_withdrawn(self) -> None:
        """Drain the peers whose record is revoked."""
        for slot in self._current.ending if self._current else ():
            peer = self._peers[slot]
            if not peer.slot.lease_id:
                peer.drain()

    def _drain(self, peers: Sequence[SupervisedPeer]) -> None:
        for peer in peers:
            if self._peers.get(peer.slot.index) is peer:
                peer.drain()

    def _kill(self, peers: Sequence[SupervisedPeer]) -> None:
        for peer in peers:
            if self._peers.get(peer.slot.index) is peer:
                log.warning("the worker of %s has not stopped in time: SIGKILL", peer.peer_id)
                peer.kill()

    def _on_worker_ready(self, event: events.WorkerReady) -> None:
        if self._current is not None and event.slot in self._current.starting:
            self._current.starting.remove(event.slot)
            self._finish_if_done()

    def _on_peer_failed(self, event: events.CannotStart | events.PeerParked) -> None:
        """If it is one that is being added, remove all that were added with it."""
        scaling = self._current
        if scaling is not None and event.slot in scaling.starting:
            scaling.failure = scaling.failure or event.why
            scaling.starting.clear()
            self._end(scaling.started)

    def _on_peer_ended(self, event: events.PeerEnded) -> None:
        scaling = self._current
        if scaling is None or event.slot not in scaling.ending:
            return
        took_ms = round((time.monotonic() - scaling.ending.pop(event.slot)) * 1e3, 3)
        stopped = {"slot": event.slot, "peer_id": event.peer_id, "took_ms": took_ms}
        scaling.stopped[event.slot] = stopped
        self._table.remove(self._peers[event.slot])
        self._finish_if_done()

    def _on_stopping(self) -> None:
        """The current scaling has no result any more, but the peers that it removes still leave the table."""
        waiting, self._waiting = self._waiting, deque()
        for scaling in (*waiting, *([self._current] if self._current else [])):
            scaling.promise.reject("the supervisor is stopping")

    def _finish_if_done(self) -> None:
        scaling = self._current
        if scaling is None or scaling.starting or scaling.ending or scaling.promise.is_settled:
            return
        self._current = None
        peers = len(self._peers)
        if scaling.failure is not None:
            self._journal.publish(events.NotScaled(why=scaling.failure))
            still = f"the number of peers is still {peers}"
            scaling.promise.reject(f"not scaled, {still}: {scaling.failure}")
        else:
            if scaling.before != peers:
                self._journal.publish(events.Scaled(before=scaling.before, peers=peers))
            scaling.promise.resolve(_result(scaling, peers))
        self._begin_next()


def _result(scaling: _Scaling, peers: int) -> ScaleResult:
    started = [
        {"slot": each.slot.index, "peer_id": each.peer_id, "pid": each.slot.pid}
        for each in scaling.started
    ]
    stopped = [scaling.stopped[slot] for slot in sorted(scaling.stopped, reverse=True)]
    return {"before": scaling.before, "peers": peers, "started": started, "stopped": stopped}
