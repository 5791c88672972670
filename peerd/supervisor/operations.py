"""What changes a running set of peers: reloads, scaling, recycling.

Nothing here answers "busy". What concerns one peer waits in that peer's own queue (peer.py), so a restart
of one does not wait for the reload of another; scalings wait for each other; a reload that has not
begun is joined by those that are asked for meanwhile, as one will do for all of them.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from peerd._scoreboard import PeerState
from peerd.address import MAX_PORT
from peerd.errors import BindError, ControlError
from peerd.settings import MAX_PEERS, SupervisorSettings
from peerd.supervisor.journal import Journal, NotScaled, Scaled, WorkerReplaced
from peerd.supervisor.loop import Callback, Loop
from peerd.supervisor.promise import Promise
from peerd.supervisor.sockets import bind_one, resolve
from peerd.supervisor.stopping import WITHDRAW_TIMEOUT_S
from peerd.supervisor.supervised_peer import Peer
from peerd.supervisor.worker_process import DESCRIPTORS

log = logging.getLogger(__name__)

Answer = Promise[dict[str, object]]

DESCRIPTORS_PER_PEER = 1 + 2 * DESCRIPTORS
"""Its socket, a worker, and a successor."""

OTHER_DESCRIPTORS = 160
"""Control and metrics clients, the registrar, etcd, what Python has open."""

RECYCLE_REST_S = 60.0
"""After a worker could not be replaced: the next one would most likely load the same broken app."""


class Reloads:
    """Replaces all workers, one at a time; the first that cannot be ends it, and the rest stay."""

    def __init__(self, loop: Loop, peers: Mapping[int, Peer], on_change: Callback) -> None:
        self._loop = loop
        self._peers = peers
        self._on_change = on_change
        self._waiting: Answer | None = None
        self._current: Answer | None = None
        self._todo: deque[Peer] = deque()
        self._done: list[WorkerReplaced] = []
        self._total = 0
        self._is_abandoned = False

    @property
    def is_under_way(self) -> bool:
        return self._current is not None

    def reload(self) -> Answer:
        answer = self._waiting = self._waiting or Answer(self._loop)
        if self._current is None:
            self._begin()
        return answer

    def abandon(self) -> None:
        """The supervisor stops."""
        self._is_abandoned = True
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.reject("the supervisor is stopping")

    def _begin(self) -> None:
        self._current, self._waiting = self._waiting, None
        self._todo = deque(self._peers.values())
        self._total, self._done = len(self._todo), []
        self._on_change()
        self._next()

    def _next(self) -> None:
        while self._todo and self._is_leaving(self._todo[0]):
            self._todo.popleft()
        if self._todo:
            peer = self._todo.popleft()
            peer.replace().then(self._on_replaced, lambda why: self._on_not_replaced(peer, why))
        else:
            current = self._current
            assert current is not None
            current.resolve({"replaced": [asdict(each) for each in self._done]})
            self._end()

    def _on_replaced(self, replaced: WorkerReplaced) -> None:
        self._done.append(replaced)
        self._next()

    def _on_not_replaced(self, peer: Peer, why: str) -> None:
        if self._is_leaving(peer):
            self._next()
            return
        kept = f"; {len(self._done)} of {self._total} were replaced before" if self._done else ""
        log.error("reload: not replaced%s: %s", kept, why)
        assert self._current is not None
        self._current.reject(why + kept)
        self._end()

    def _is_leaving(self, peer: Peer) -> bool:
        """It is being scaled away, and nobody has to load the app for it. (Its slot may have another peer
        by now.)"""
        return peer.leaves and not self._is_abandoned

    def _end(self) -> None:
        self._current = None
        self._on_change()
        if self._waiting is not None:
            self._begin()


@dataclass
class _Scaling:
    target: Callable[[int], int]
    answer: Answer


class Scaler:
    """More peers on the ports behind the last one, or fewer, the highest first."""

    def __init__(
        self,
        settings: SupervisorSettings,
        loop: Loop,
        peers: Mapping[int, Peer],
        add: Callable[[int, socket.socket], Peer],
        remove: Callable[[Peer], None],
        journal: Journal,
        on_change: Callback,
    ) -> None:
        """``add`` makes a peer of a slot and its socket, ``remove`` forgets one that has ended."""
        self._settings = settings
        self._loop = loop
        self._peers = peers
        self._add = add
        self._remove = remove
        self._journal = journal
        self._on_change = on_change
        # Now, since a name server may take its time.
        _, self._address = resolve(settings.host, "--host")
        self._waiting: deque[_Scaling] = deque()
        self._current: _Scaling | None = None
        self._before = 0
        self._starting: dict[int, Peer] = {}
        self._ending: dict[int, float] = {}
        self._started: list[Peer] = []
        self._stopped: list[dict[str, object]] = []
        self._failure: str | None = None
        self._by_signals: _Scaling | None = None
        self._signalled = 0

    def scale_to(self, peers: int) -> Answer:
        scaling = _Scaling(lambda _: peers, Answer(self._loop))
        self._ask(scaling)
        return scaling.answer

    def scale_by(self, difference: int) -> None:
        """SIGTTIN and SIGTTOU, which add up while an earlier scaling is under way. Never below one peer."""
        self._signalled += difference
        if self._by_signals is None:
            scaling = self._by_signals = _Scaling(self._after_signals, Answer(self._loop))
            scaling.answer.then(lambda _: None, lambda why: log.error("not scaled: %s", why))
            self._ask(scaling)

    def abandon(self) -> None:
        """The supervisor stops."""
        waiting, self._waiting = self._waiting, deque()
        current, self._current = self._current, None
        for each in (*waiting, *([current] if current else [])):
            each.answer.reject("the supervisor is stopping")

    def is_ready(self, peer: Peer) -> None:
        if self._starting.pop(peer.slot.index, None) is not None:
            self._advance()

    def cannot_start(self, peer: Peer, why: str) -> bool:
        """Whether it was one that this is adding: then none of them stays."""
        if self._starting.pop(peer.slot.index, None) is None:
            return False
        self._failure = self._failure or why
        self._end(self._started)
        return True

    def is_withdrawn(self) -> None:
        """Records have been revoked."""
        for index in list(self._ending):
            peer = self._peers[index]
            if not peer.slot.lease_id:
                peer.drain()

    def has_ended(self, peer: Peer) -> None:
        begun_s = self._ending.pop(peer.slot.index, None)
        if begun_s is None:
            return
        took_ms = round((time.monotonic() - begun_s) * 1e3, 3)
        self._stopped.append({"slot": peer.slot.index, "peer_id": peer.peer_id, "took_ms": took_ms})
        self._remove(peer)
        self._advance()

    def _after_signals(self, now: int) -> int:
        self._by_signals = None
        difference, self._signalled = self._signalled, 0
        return max(1, min(now + difference, MAX_PEERS))

    def _ask(self, scaling: _Scaling) -> None:
        self._waiting.append(scaling)
        self._next()

    def _next(self) -> None:
        while self._current is None and self._waiting:
            scaling = self._current = self._waiting.popleft()
            self._before, self._failure = len(self._peers), None
            self._started, self._stopped = [], []
            target = scaling.target(self._before)
            try:
                self._begin(target)
            except (BindError, ControlError) as error:
                self._current = None
                self._journal.publish(NotScaled(why=str(error)))
                scaling.answer.reject(str(error))
            except BaseException:  # a defect: it must not hold up all that come behind it
                self._current = None
                scaling.answer.reject("internal error: see the supervisor's log")
                raise
            else:
                self._advance()

    def _begin(self, target: int) -> None:
        self._check(target)
        # All of them, before anything changes.
        sockets: dict[int, socket.socket] = {}
        try:
            for index in range(self._before, target):
                sockets[index] = bind_one(
                    self._address,
                    self._settings.base_port + index,
                    self._settings.recv_buffer_bytes,
                    "number of peers",
                )
        except BindError:
            for sock in sockets.values():
                sock.close()
            raise
        for index, sock in sockets.items():
            peer = self._starting[index] = self._add(index, sock)
            self._started.append(peer)
        self._on_change()
        for peer in self._started:
            peer.start()
        self._end([self._peers[index] for index in range(self._before - 1, target - 1, -1)])

    def _check(self, target: int) -> None:
        last_port = self._settings.base_port + target - 1
        if not 1 <= target <= MAX_PEERS:
            raise ControlError(
                f"cannot scale to {target} peers: give a number from 1 to {MAX_PEERS}"
            )
        if last_port > MAX_PORT:
            most = MAX_PORT - self._settings.base_port + 1
            raise ControlError(
                f"cannot scale to {target} peers: the last port would be {last_port}; {most} fit"
            )
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = DESCRIPTORS_PER_PEER * target + OTHER_DESCRIPTORS
        if limit != resource.RLIM_INFINITY and needed > limit:
            raise ControlError(
                f"cannot scale to {target} peers: that takes {needed} open files, and the limit is "
                f"{limit} (ulimit -n)"
            )

    def _end(self, peers: Sequence[Peer]) -> None:
        ending = [peer for peer in peers if peer.slot.index not in self._ending]
        # All of them are noted before the first is told: one without a worker has ended at once.
        for peer in ending:
            self._starting.pop(peer.slot.index, None)
            self._ending[peer.slot.index] = time.monotonic()
        self._loop.call_later(WITHDRAW_TIMEOUT_S, lambda: self._drain(ending))
        self._loop.call_later(self._settings.stop_timeout_s, lambda: self._kill(ending))
        for peer in ending:
            peer.stop()
        self.is_withdrawn()  # where there was no record

    def _drain(self, ending: Sequence[Peer]) -> None:
        for peer in ending:
            if self._peers.get(peer.slot.index) is peer:
                peer.drain()

    def _kill(self, ending: Sequence[Peer]) -> None:
        for peer in ending:
            if self._peers.get(peer.slot.index) is peer:
                log.warning("the worker of %s has not stopped in time: SIGKILL", peer.peer_id)
                peer.kill()

    def _advance(self) -> None:
        if self._starting or self._ending or self._current is None:
            return
        scaling, self._current = self._current, None
        self._on_change()
        if self._failure is not None:
            self._journal.publish(NotScaled(why=self._failure))
            scaling.answer.reject(
                f"not scaled, the number of peers is still {len(self._peers)}: {self._failure}"
            )
        else:
            if self._before != len(self._peers):
                self._journal.publish(Scaled(before=self._before, peers=len(self._peers)))
                log.info("scaled from %d to %d peers", self._before, len(self._peers))
            started = [
                {"slot": each.slot.index, "peer_id": each.peer_id, "pid": each.slot.pid}
                for each in self._started
            ]
            scaling.answer.resolve(
                {
                    "before": self._before,
                    "peers": len(self._peers),
                    "started": started,
                    "stopped": sorted(self._stopped, key=_slot, reverse=True),
                }
            )
        self._next()


def _slot(row: dict[str, object]) -> int:
    slot = row["slot"]
    assert isinstance(slot, int)
    return slot


class Recycler:
    """Replaces workers that are too old or too large, one at a time: each has loaded the app anew.

    All that one look has found are replaced before the next one, so the first slots, which are due again
    soon where there are many, cannot keep the last ones waiting.
    """

    def __init__(self, settings: SupervisorSettings, peers: Mapping[int, Peer]) -> None:
        self._settings = settings
        self._peers = peers
        self._due: deque[tuple[Peer, str]] = deque()
        self._rests_until_s = 0.0
        self._large: dict[int, int] = {}

    def look(self) -> None:
        """To be called every few seconds."""
        if self._due or time.monotonic() < self._rests_until_s:
            return
        for peer in self._peers.values():
            why = None if peer.is_replacing else self._reason(peer)
            if why is not None:
                self._due.append((peer, why))
        self._next()

    def _next(self) -> None:
        while self._due and not _serves(self._due[0][0]):
            self._due.popleft()
        if self._due:
            peer, why = self._due[0]
            log.info("peer %s: its worker is replaced, %s", peer.peer_id, why)
            peer.replace().then(lambda _: self._on_replaced(), self._on_not_replaced)

    def _on_replaced(self) -> None:
        self._due.popleft()
        self._next()

    def _on_not_replaced(self, why: str) -> None:
        peer, _ = self._due.popleft()
        if _serves(peer):
            log.error("not replaced, and tried again in %g s: %s", RECYCLE_REST_S, why)
            self._due.clear()
            self._rests_until_s = time.monotonic() + RECYCLE_REST_S
        self._next()

    def _reason(self, peer: Peer) -> str | None:
        ready_for_s, limit_s = peer.ready_for_s, self._settings.max_age_s
        if ready_for_s is None or peer.worker is None:
            return None
        if limit_s is not None and ready_for_s >= limit_s:
            return f"having been ready for {ready_for_s:.0f} s (--max-age)"
        limit_bytes = self._settings.max_rss_bytes
        if limit_bytes is None:
            return None
        pid, rss_bytes = peer.worker.pid, _rss_bytes(peer.worker.pid)
        if rss_bytes <= limit_bytes:
            self._large.pop(peer.slot.index, None)
            return None
        # Twice in a row: a handler may need much for a moment.
        if self._large.get(peer.slot.index) != pid:
            self._large[peer.slot.index] = pid
            return None
        return f"having {rss_bytes} bytes of memory (--max-rss)"


def _serves(peer: Peer) -> bool:
    return peer.slot.state is PeerState.READY and not peer.leaves


def _rss_bytes(pid: int) -> int:
    """proc(5); 0 for a process that is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
