"""The replacement of a worker by one that has loaded the app anew, without a loss.

A successor loads the app while the worker serves on, and then waits. The worker gets HAND_OVER, answers
what it has read, and exits; only then may the successor read. The two never read at the same time, so
no datagram is answered twice or out of order. A successor that cannot start changes nothing.

    LOADING       the successor loads the app; the worker serves
    ALONE         the same, with no worker: there was none, or it died meanwhile
    HANDING_OVER  the worker answers what it has read, and exits
    TAKING_OVER   the successor may read, and is the peer's worker now; its loop has not run yet

HAND_OVER may be sent to a worker that is not ready yet. It installs the handler before it reads: either it
answers what it has read, or the signal ends it and it has read nothing.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from peerd.supervisor.death import WorkerExit
from peerd.supervisor.events import CannotFork, WorkerNotReplaced, WorkerReplaced
from peerd.supervisor.lifecycle import LifecycleEvent
from peerd.supervisor.liveness import is_stopped
from peerd.supervisor.loop import Promise
from peerd.supervisor.resources import PeerEnvironment
from peerd.supervisor.worker_process import Worker

if TYPE_CHECKING:
    from peerd.supervisor.supervised_peer import SupervisedPeer


class ReplacementPhase(enum.Enum):
    LOADING = enum.auto()
    ALONE = enum.auto()
    HANDING_OVER = enum.auto()
    TAKING_OVER = enum.auto()


class ReplacementEvent(enum.Enum):
    PREPARED = enum.auto()  # The successor has loaded the app
    PREPARED_BUT_STOPPED = enum.auto()
    """The same, but the worker is stopped (SIGSTOP, a debugger), so it could not leave."""

    WORKER_ENDED = enum.auto()
    SUCCESSOR_ENDED = enum.auto()
    READY = enum.auto()  # The successor's loop has run


class ReplacementAction(enum.Enum):
    HAND_OVER = enum.auto()
    KILL_SUCCESSOR = enum.auto()
    WAIT_FOR_SUCCESSOR = enum.auto()
    TAKE_OVER = enum.auto()
    SUCCEED = enum.auto()
    FAIL = enum.auto()
    NOTHING = enum.auto()


_Phase: TypeAlias = ReplacementPhase
_Event: TypeAlias = ReplacementEvent
_Action: TypeAlias = ReplacementAction

TABLE: Mapping[tuple[_Phase, _Event], tuple[_Phase, _Action]] = {
    (_Phase.LOADING, _Event.PREPARED): (_Phase.HANDING_OVER, _Action.HAND_OVER),
    (_Phase.LOADING, _Event.PREPARED_BUT_STOPPED): (_Phase.LOADING, _Action.KILL_SUCCESSOR),
    (_Phase.LOADING, _Event.WORKER_ENDED): (_Phase.ALONE, _Action.WAIT_FOR_SUCCESSOR),
    (_Phase.LOADING, _Event.SUCCESSOR_ENDED): (_Phase.LOADING, _Action.FAIL),
    (_Phase.ALONE, _Event.PREPARED): (_Phase.TAKING_OVER, _Action.TAKE_OVER),
    (_Phase.ALONE, _Event.SUCCESSOR_ENDED): (_Phase.ALONE, _Action.FAIL),
    (_Phase.HANDING_OVER, _Event.PREPARED): (_Phase.HANDING_OVER, _Action.NOTHING),
    (_Phase.HANDING_OVER, _Event.PREPARED_BUT_STOPPED): (_Phase.HANDING_OVER, _Action.NOTHING),
    (_Phase.HANDING_OVER, _Event.WORKER_ENDED): (_Phase.TAKING_OVER, _Action.TAKE_OVER),
    (_Phase.HANDING_OVER, _Event.SUCCESSOR_ENDED): (_Phase.HANDING_OVER, _Action.FAIL),
    (_Phase.TAKING_OVER, _Event.READY): (_Phase.TAKING_OVER, _Action.SUCCEED),
}
"""A successor that dies while it takes over is the peer's worker, and its death is a worker's."""


class Replacement:
    def __init__(self, peer: SupervisedPeer, replacements: Replacements) -> None:
        self.successor: Worker | None = None  # None before it begins, and once it has taken over
        self._peer = peer
        self._replacements = replacements
        self._phase = ReplacementPhase.LOADING
        self._old_pid: int | None = None
        self._unread_since_s: float | None = None
        """When the worker was asked to leave the socket, or was found to have left it."""

        self._actions: dict[ReplacementAction, Callable[[], None]] = {
            ReplacementAction.HAND_OVER: self._hand_over,
            ReplacementAction.KILL_SUCCESSOR: lambda: self._kill_successor("stopped"),
            ReplacementAction.WAIT_FOR_SUCCESSOR: self._wait_for_successor,
            ReplacementAction.TAKE_OVER: self._take_over,
            ReplacementAction.SUCCEED: self._succeed,
            ReplacementAction.FAIL: self._fail,
            ReplacementAction.NOTHING: lambda: None,
        }

    def begin(self, boot_timeout_s: float) -> None:
        """Fork the successor. Raises OSError."""
        peer = self._peer
        self._old_pid = peer.slot.pid or None
        if peer.worker is None:
            self._phase = ReplacementPhase.ALONE
        self.successor = peer.fork()
        peer.slot.successor_pid = self.successor.pid
        self.successor.allow_load()
        self.successor.limit_boot(boot_timeout_s)

    @property
    def can_inherit(self) -> bool:
        """Whether the successor is to take over when the worker ends."""
        return self.successor is not None and self.successor.killed_for != "stop"

    def cancel(self) -> None:
        """Kill the successor, unless the worker was asked to leave: then it has to serve the queue."""
        if self._unread_since_s is None:
            self._kill_successor("stop")

    def cancel_load(self) -> None:
        """Kill the successor, unless it has loaded the app."""
        if self.successor is not None and not self.successor.is_prepared:
            self._kill_successor("stop")

    def on_report(self) -> None:
        if self.successor is None or not self.successor.is_prepared or self.successor.killed_for:
            return
        worker = self._peer.worker
        is_held = worker is not None and is_stopped(worker.pid)
        self._handle(_Event.PREPARED_BUT_STOPPED if is_held else _Event.PREPARED)

    def on_worker_exit(self, exit_: WorkerExit) -> None:
        if not (exit_.is_hand_over or exit_.worker.killed_for == "stop"):
            self._peer.certify(exit_, "its successor, which was starting, takes over")
        self._handle(ReplacementEvent.WORKER_ENDED)

    def on_successor_exit(self) -> None:
        self._handle(ReplacementEvent.SUCCESSOR_ENDED)

    def on_ready(self) -> None:
        if self._phase is ReplacementPhase.TAKING_OVER:
            self._handle(ReplacementEvent.READY)

    def _handle(self, event: ReplacementEvent) -> None:
        self._phase, action = TABLE[self._phase, event]
        self._actions[action]()

    def _hand_over(self) -> None:
        worker, successor = self._peer.worker, self.successor
        assert worker is not None
        assert successor is not None
        # The worker has no deadline but that of the liveness check: it may have much in hand.
        worker.hand_over()
        self._unread_since_s = time.monotonic()
        successor.cancel_boot_limit()

    def _kill_successor(self, why: str) -> None:
        if self.successor is not None:
            self.successor.kill(why)

    def _wait_for_successor(self) -> None:
        self._unread_since_s = time.monotonic()
        self._peer.slot.restarts += 1
        self._peer.transition(LifecycleEvent.LOSE)

    def _take_over(self) -> None:
        successor, self.successor = self.successor, None
        assert successor is not None
        self._peer.adopt(successor)
        self._peer.slot.successor_pid = 0
        successor.allow_serving()

    def _succeed(self) -> None:
        now_s = time.monotonic()
        gap_ms = round((now_s - (self._unread_since_s or now_s)) * 1e3, 3)
        slot, peer_id = self._peer.slot, self._peer.peer_id
        self._replacements.on_replaced(
            WorkerReplaced(
                slot=slot.index, peer_id=peer_id, old_pid=self._old_pid, pid=slot.pid, gap_ms=gap_ms
            )
        )

    def _fail(self) -> None:
        successor, self.successor, slot = self.successor, None, self._peer.slot
        assert successor is not None
        end = successor.wait()
        slot.add_log_dropped(successor.lines_dropped)
        slot.successor_pid = 0
        why = successor.failure or f"the successor ended before it was ready: {end}"
        if successor.killed_for == "stopped":
            why = "its worker is stopped (SIGSTOP, or a debugger): continue it first"
        elif successor.killed_for == "stop":
            why = "it is stopping"
        self._replacements.on_not_replaced(why)


class Replacements:
    """The replacements of one peer's workers, one after the other.

    All requests that come while one is under way are served by the next one.
    """

    def __init__(self, peer: SupervisedPeer, environment: PeerEnvironment) -> None:
        self.current: Replacement | None = None
        self._peer = peer
        self._environment = environment
        self._promise: Promise[WorkerReplaced] | None = None  # Of the current one
        self._next: Promise[WorkerReplaced] | None = None

    def request(self) -> Promise[WorkerReplaced]:
        promise = self._next or Promise[WorkerReplaced](self._environment.loop)
        if self._peer.is_stopping:
            promise.reject(f"peer {self._peer.peer_id} is stopping")
        else:
            self._next = promise
            self.begin_next()
        return promise

    def begin_next(self) -> None:
        """Begin what was requested, if none is under way."""
        peer = self._peer
        if self.current is not None or self._next is None or peer.is_stopping:
            return
        self._promise, self._next = self._next, None
        self.current = Replacement(peer, self)
        peer.restarts.cancel()  # this is the restart
        try:
            self.current.begin(self._environment.settings.boot_timeout_s)
        except OSError as error:
            if peer.worker is None:
                peer.restarts.on_fork_failed(error)
            else:
                self._environment.journal.publish(CannotFork(peer_id=peer.peer_id, why=str(error)))
            self.on_not_replaced(f"cannot fork a successor: {error}")

    def cancel(self) -> None:
        """The peer stops."""
        if self._next is not None:
            self._next.reject(f"peer {self._peer.peer_id} is stopping")
            self._next = None
        if self.current is not None:
            self.current.cancel()

    def on_worker_ready(self) -> None:
        if self.current is not None:
            self.current.on_ready()
        self.begin_next()

    def on_worker_died(self, why: str) -> None:
        """The worker died and has no successor. If it was one, it had not taken over completely."""
        if self.current is not None and self.current.successor is None:
            self._fail_current(why)
        self.begin_next()

    def on_replaced(self, done: WorkerReplaced) -> None:
        promise, self.current = self._promise, None
        assert promise is not None
        # It was requested, by a user who may have mended the app.
        self._peer.restarts.was_parked = False
        self._peer.last_gap_ms = done.gap_ms
        self._environment.journal.publish(done)
        promise.resolve(done)

    def on_not_replaced(self, why: str) -> None:
        self._peer.restarts.on_replacement_failed()
        self._fail_current(why)
        self.begin_next()
        self._peer.finish_if_idle()

    def _fail_current(self, why: str) -> None:
        promise, self.current = self._promise, None
        assert promise is not None
        self._peer.publish(WorkerNotReplaced, why=why)
        promise.reject(f"peer {self._peer.peer_id}: {why}")
