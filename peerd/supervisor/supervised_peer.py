"""One peer: its slot, its socket, and the workers that read it one after the other.

Restarting. A worker that dies is followed by another as restart.py says; what the dead one had in hand is
counted exactly (``Slot.unfinished``), and the socket is kept, so what came meanwhile is waiting there.

Replacing loses nothing. A successor loads the app beside the worker, which serves on, and waits. Then the
worker gets HAND_OVER, answers what it has read and exits, and the successor is told to go on: both never
read at once, so nothing is doubled or reordered. A successor that cannot start leaves the worker as it
was. One that asks while another replacement is under way waits its turn.

A worker that dies while its successor loads has it taking over sooner. HAND_OVER is sent to a worker that
is not ready yet as well: it installs the handler before it reads, so either it answers what it has
read, or it is ended by the signal and has read nothing.

Stuck workers (liveness.py) write their Python stack into the log and are killed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from peerd._scoreboard import PeerState, Slot
from peerd.health import Health
from peerd.settings import OnCrashloop, SupervisorSettings
from peerd.signals import DUMP_STACK, HAND_OVER
from peerd.supervisor.death import LAST_LINES, Death
from peerd.supervisor.journal import (
    CannotFork,
    CannotStart,
    Journal,
    PeerClosed,
    PeerParked,
    WorkerDied,
    WorkerNotReplaced,
    WorkerReady,
    WorkerReplaced,
    WorkerStuck,
)
from peerd.supervisor.kernel_drops import KernelDrops
from peerd.supervisor.lifecycle import TRANSITIONS, Event
from peerd.supervisor.liveness import is_stopped
from peerd.supervisor.loop import Loop, Timer
from peerd.supervisor.output import PeerLog, RecentLines
from peerd.supervisor.peer_health import PeerHealth
from peerd.supervisor.processes import Exit
from peerd.supervisor.promise import Promise
from peerd.supervisor.restart import Failure, RestartPolicy, next_restart
from peerd.supervisor.sockets import count_unread, has_datagrams, queue_state
from peerd.supervisor.worker_process import Worker, WorkerEntry, start_worker

EX_OK = 0

FORK_DELAY_S = 0.25
MAX_FORK_DELAY_S = 5.0
"""Between two tries to fork where there was no process to be had; it doubles."""

QUEUE_TRIES = 3
"""How many workers are started to serve the queue of a peer that stops and has none."""

STACK_S = 0.5
"""How long a worker that is about to be killed has to write its stack."""


@dataclass
class _Replacement:
    promise: Promise[WorkerReplaced]
    """For all who asked before it began: one will do for all of them."""

    old_pid: int = 0
    handed_over_s: float | None = None
    """When the worker was told to leave the socket, or was found to have left it."""


class Host(Protocol):
    """What a peer needs of its supervisor."""

    settings: SupervisorSettings
    loop: Loop
    journal: Journal
    worker_entry: WorkerEntry
    recent_lines: RecentLines

    def slot_has_changed(self) -> None: ...
    def peer_is_ready(self, peer: Peer) -> None: ...
    def peer_cannot_start(self, peer: Peer, why: str) -> bool:
        """Whether another try makes sense."""

    def peer_is_parked(self, peer: Peer) -> None: ...
    def peer_has_ended(self, peer: Peer) -> None: ...
    def was_oom_killed(self) -> bool:
        """Whether a process that ended by SIGKILL just now may have been."""


class Peer:
    def __init__(self, host: Host, slot: Slot, sock: socket.socket, drops: KernelDrops) -> None:
        self._host = host
        self.slot = slot
        self.sock = sock
        self.drops = drops
        self.peer_id = host.settings.peer_id(slot.index)
        self.port = host.settings.base_port + slot.index
        self.worker: Worker | None = None
        """Who serves, or starts where nobody serves."""

        self.successor: Worker | None = None
        """Who loads the app beside it."""

        self.last_death: Death | None = None
        self.last_gap_ms: float | None = None
        self.next_start_s: float | None = None
        self._log = PeerLog(slot, self.peer_id, self.port, host.recent_lines)
        self._generations = slot.generation
        self._policy = RestartPolicy()
        self._failures: deque[Failure] = deque(maxlen=64)
        self._was_parked = False
        self._restart = Timer()
        self._replacement: _Replacement | None = None
        self._waiting: _Replacement | None = None
        self._stops = False
        self._drains = False
        self._queue_tries = QUEUE_TRIES
        self._fork_failures = 0
        self.health = PeerHealth(slot, sock, host.settings, host.journal, self._log)

    # What it is told

    def start(self) -> bool:
        """Fork a worker for a socket that nobody reads. Whether that worked; if not, it is tried again."""
        self._cancel_restart()
        try:
            worker = self._fork()
        except OSError as error:
            self._cannot_fork(error)
            return False
        self._serve_with(worker)
        worker.is_noted()
        worker.watch(self._host.loop, lambda: self._reported(worker), lambda: self._exited(worker))
        worker.go()
        return True

    def replace(self) -> Promise[WorkerReplaced]:
        """By a worker that has loaded the app anew; also starts one where none serves."""
        promise = Promise[WorkerReplaced](self._host.loop)
        if self._stops:
            promise.reject(f"peer {self.peer_id} is stopping")
            return promise
        if self._waiting is None:
            self._waiting = _Replacement(promise)
        promise = self._waiting.promise
        self._next_replacement()
        return promise

    def stop(self) -> None:
        """Serve on, but become nothing new: the record goes. ``drain`` is next."""
        if self._stops:
            return
        self._stops = True
        self._cancel_restart()
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.promise.reject(f"peer {self.peer_id} is stopping")
        replacement, successor = self._replacement, self.successor
        if successor is not None and replacement is not None and not replacement.handed_over_s:
            successor.kill("stop")
        self._becomes(Event.STOP)
        self._has_perhaps_ended()

    def drain(self) -> None:
        """Answer what the queue holds, and exit. A worker that starts with a queue before it is let begin."""
        self._drains = True
        worker = self.worker
        if worker is not None and (worker.is_ready or not self.has_datagrams):
            worker.send(signal.SIGTERM)
        successor = self.successor
        if worker is None and successor and not (successor.is_prepared or self.has_datagrams):
            successor.kill("stop")

    def kill(self, why: str = "stop") -> None:
        self._queue_tries = 0
        for worker in (self.worker, self.successor):
            if worker is not None:
                worker.kill(why)

    def check_health(self) -> None:
        """Judge the worker, and end one that is stuck. Call it about twice per second."""
        self.health.check()
        worker, found = self.worker, self.health.diagnosis
        if worker is None or found is None or found.health is not Health.STUCK or worker.killed_for:
            return
        self._host.journal.publish(
            WorkerStuck(
                slot=self.slot.index,
                peer_id=self.peer_id,
                pid=worker.pid,
                for_s=round(found.for_s, 3),
            )
        )
        self._say(
            logging.ERROR,
            "worker pid %d is %s; its stack follows, then SIGKILL",
            worker.pid,
            found.sentence,
        )
        self._kill_with_stack(worker, "stuck")

    @property
    def has_ended(self) -> bool:
        """It was told to stop, and there is no process and nothing left to serve."""
        return self._stops and self.slot.state is PeerState.STOPPED

    @property
    def leaves(self) -> bool:
        """It was told to stop."""
        return self._stops

    @property
    def is_replacing(self) -> bool:
        return self._replacement is not None

    @property
    def ready_for_s(self) -> float | None:
        if self.worker is None or self.worker.ready_s is None:
            return None
        return time.monotonic() - self.worker.ready_s

    @property
    def queued_bytes(self) -> int:
        return queue_state(self.sock).queued_bytes

    @property
    def has_datagrams(self) -> bool:
        return has_datagrams(self.sock)

    def close(self, *, is_kept: bool = False) -> None:
        """After its end. Counts what is lost with the socket, if nobody keeps it."""
        self.drops.leave()
        if not is_kept and (unread := count_unread(self.sock)):
            self.slot.lost_unread += unread
            self._host.journal.publish(
                PeerClosed(slot=self.slot.index, peer_id=self.peer_id, lost_unread=unread)
            )
            self._say(
                logging.WARNING, "datagrams in the queue when its port was closed: %d", unread
            )
        self.sock.close()

    # Its worker

    def _fork(self) -> Worker:
        worker = start_worker(
            self._host.worker_entry, self.slot, self.sock, self._generations + 1, self._log
        )
        self._generations += 1
        self._fork_failures = 0
        return worker

    def _cannot_fork(self, error: OSError) -> None:
        """No process or descriptor to be had: the machine's fault, so it does not count as a failure of the
        app, and nobody is parked for it."""
        self._host.journal.publish(CannotFork(peer_id=self.peer_id, why=str(error)))
        if self._stops:
            self._say(logging.ERROR, "cannot fork a worker: %s", error)
            return
        delay_s = min(FORK_DELAY_S * 2.0 ** min(self._fork_failures, 32), MAX_FORK_DELAY_S)
        self._fork_failures += 1
        self._start_later(delay_s)
        self._becomes(Event.FAIL)
        self._say(logging.ERROR, "cannot fork a worker: %s; next try in %.2g s", error, delay_s)

    def _start_later(self, delay_s: float) -> None:
        self.next_start_s = time.monotonic() + delay_s
        self._restart = self._host.loop.call_at(self.next_start_s, self.start)

    def _serve_with(self, worker: Worker) -> None:
        self._cancel_restart()
        self.worker = worker
        self.slot.pid = worker.pid
        self.slot.generation = worker.generation
        if self.slot.state is not PeerState.READY:
            self._becomes(Event.START)
        self._limit_boot(worker)

    def _reported(self, worker: Worker) -> None:
        if worker is not self.worker or not worker.is_ready or worker.ready_s is None:
            return
        worker.deadline.cancel()
        self._becomes(Event.SERVE)
        self.health.on_ready()
        self._host.journal.publish(
            WorkerReady(slot=self.slot.index, peer_id=self.peer_id, pid=worker.pid)
        )
        if self._replacement is not None and self.successor is None:  # it is the successor
            self._replaced(self._replacement, worker.pid)
        if self._drains:
            worker.send(signal.SIGTERM)
        self._host.peer_is_ready(self)
        self._next_replacement()

    def _exited(self, worker: Worker) -> None:
        end = worker.wait()
        assert worker is self.worker
        self.worker = None
        self.slot.pid = 0
        self.slot.add_log_dropped(worker.lines_dropped)
        lost = self.slot.settle()
        self.slot.lost_in_flight += lost
        successor = self.successor
        if self._replacement is not None and successor and successor.killed_for != "stop":
            self._predecessor_has_ended(worker, end, lost)
        elif self._stops:
            is_strange = end.code != EX_OK and worker.killed_for != "stop" and worker.is_ready
            if is_strange or lost:
                self._certify(worker, end, lost, "stopping")
            self._fail_replacement("it is stopping")
            self._has_perhaps_ended()
        elif _has_left(worker, end, lost):
            # To a successor that has died meanwhile.
            self.slot.restarts += 1
            self.start()
        elif worker.failure is not None:
            self._host.journal.publish(
                CannotStart(slot=self.slot.index, peer_id=self.peer_id, why=worker.failure)
            )
            if self._host.peer_cannot_start(self, worker.failure):
                self._say(
                    logging.ERROR, "cannot start: %s; %s", worker.failure, self._plan_restart()
                )
                self._tell_if_parked()
        else:
            ready_for_s = 0.0 if worker.ready_s is None else time.monotonic() - worker.ready_s
            self._certify(worker, end, lost, self._plan_restart(ready_for_s))
            self._tell_if_parked()
            self._fail_replacement(f"the successor: {end}")
            self._next_replacement()

    def _certify(self, worker: Worker, end: Exit, lost: int, then: str) -> None:
        cause = worker.killed_for or ("exit" if end.signal is None else "signal")
        if (
            worker.killed_for is None
            and end.signal == signal.SIGKILL
            and self._host.was_oom_killed()
        ):
            cause = "oom"
        now_s = time.monotonic()
        death = Death(
            pid=worker.pid,
            generation=worker.generation,
            at_s=now_s,
            how=str(end),
            cause=cause,
            ready_for_s=None if worker.ready_s is None else round(now_s - worker.ready_s, 3),
            lost_in_flight=lost,
            next=then,
            last_lines=tuple(self._log.last_of(worker.generation, LAST_LINES)),
        )
        self.last_death = death
        self._host.journal.publish(
            WorkerDied(slot=self.slot.index, peer_id=self.peer_id, death=death)
        )
        self._log.log(
            logging.ERROR,
            "%s",
            death.sentence,
            pid=worker.pid,
            generation=worker.generation,
        )

    def _plan_restart(self, ready_for_s: float = 0.0) -> str:
        """When, in words."""
        now_s = time.monotonic()
        was_parked = self._was_parked
        self._failures.append(Failure(now_s, ready_for_s, was_parked))
        restart = next_restart(self._policy, list(self._failures), os.urandom(1)[0] / 255)
        self.slot.restarts += 1
        self._start_later(restart.delay_s)
        self._was_parked = restart.crashloop
        self._becomes(Event.PARK if restart.crashloop else Event.FAIL)
        if not restart.crashloop:
            if not restart.delay_s:
                return "restarted at once"
            return f"restarted in {restart.delay_s:.2g} s"
        policy = self._policy
        why = (
            f"parked again, as it was not ready for {policy.reset_after_ready_s:g} s"
            if was_parked
            else f"parked, as it failed {policy.max_failures + 1} times within {policy.window_s:g} s"
        )
        if self._host.settings.on_crashloop is OnCrashloop.EXIT:
            return f"{why}; the supervisor stops (--on-crashloop)"
        return (
            f"{why}; tried again in {restart.delay_s:g} s, or by 'peerd restart {self.slot.index}'"
        )

    def _tell_if_parked(self) -> None:
        """After the certificate."""
        if self.slot.state is PeerState.CRASHLOOP:
            self._host.journal.publish(
                PeerParked(
                    slot=self.slot.index,
                    peer_id=self.peer_id,
                    retry_in_s=self._policy.parked_delay_s,
                )
            )
            self._host.peer_is_parked(self)

    def _limit_boot(self, worker: Worker) -> None:
        worker.deadline.cancel()
        limit_s = self._host.settings.boot_timeout_s
        worker.deadline = self._host.loop.call_later(limit_s, lambda: self._is_late(worker))

    def _is_late(self, worker: Worker) -> None:
        limit_s = self._host.settings.boot_timeout_s
        self._say(
            logging.ERROR,
            "worker pid %d is not ready after %g s (--boot-timeout); its stack follows, then SIGKILL",
            worker.pid,
            limit_s,
        )
        self._kill_with_stack(worker, "late")

    def _kill_with_stack(self, worker: Worker, why: str) -> None:
        worker.killed_for = why
        worker.send(DUMP_STACK)

        def kill() -> None:
            if worker not in (self.worker, self.successor):
                return
            has_recovered = worker.is_ready if why == "late" else self.health.has_recovered()
            if has_recovered and worker.killed_for == why:
                worker.killed_for = None
                self._say(
                    logging.WARNING, "worker pid %d has recovered and is not killed", worker.pid
                )
            else:
                worker.kill(why)

        self._host.loop.call_later(STACK_S, kill)

    # Replacing it

    def _next_replacement(self) -> None:
        if self._replacement is not None or self._waiting is None or self._stops:
            return
        replacement, self._waiting = self._waiting, None
        self._replacement = replacement
        self._cancel_restart()  # this is it
        replacement.old_pid = self.slot.pid
        try:
            successor = self.successor = self._fork()
            self.slot.successor_pid = successor.pid
            successor.is_noted()
        except OSError as error:
            if self.worker is None:
                self._cannot_fork(error)
            else:
                self._host.journal.publish(CannotFork(peer_id=self.peer_id, why=str(error)))
            self._not_replaced(f"cannot fork a successor: {error}")
            return
        successor.watch(
            self._host.loop,
            lambda: self._successor_reported(successor),
            lambda: self._successor_exited(successor),
        )
        self._limit_boot(successor)

    def _successor_reported(self, successor: Worker) -> None:
        replacement = self._replacement
        if successor is not self.successor:
            self._reported(successor)  # it has taken over
        elif not successor.is_prepared or replacement is None or successor.killed_for:
            return
        elif self.worker is None:
            self._take_over()
        elif replacement.handed_over_s is None:
            if is_stopped(self.worker.pid):
                # It would wait for whoever has stopped it, and so would everybody behind it.
                successor.kill("stopped")
                return
            # There is no deadline for it but the stuck clock: it may have much in hand.
            self.worker.send(HAND_OVER)
            self.worker.leaves = True
            replacement.handed_over_s = time.monotonic()
            successor.deadline.cancel()

    def _predecessor_has_ended(self, worker: Worker, end: Exit, lost: int) -> None:
        """As it was told to, or because it died."""
        replacement, successor = self._replacement, self.successor
        assert replacement is not None
        assert successor is not None
        if not (_has_left(worker, end, lost) or worker.killed_for == "stop"):
            self._certify(worker, end, lost, "its successor, which was starting, takes over")
        if replacement.handed_over_s is None:
            replacement.handed_over_s = time.monotonic()
            self.slot.restarts += 1
            self._becomes(Event.START)
        if successor.is_prepared and not successor.killed_for:
            self._take_over()

    def _take_over(self) -> None:
        worker, self.successor = self.successor, None
        assert worker is not None
        self._serve_with(worker)
        self.slot.successor_pid = 0
        worker.go()

    def _successor_exited(self, successor: Worker) -> None:
        if successor is not self.successor:
            self._exited(successor)
            return
        end = successor.wait()
        self.slot.add_log_dropped(successor.lines_dropped)
        self.successor = None
        self.slot.successor_pid = 0
        why = successor.failure or f"the successor ended before it was ready: {end}"
        if successor.killed_for == "stopped":
            why = "its worker is stopped (SIGSTOP, or a debugger): continue it first"
        if self._stops and successor.killed_for == "stop":
            why = "it is stopping"
        self._not_replaced(why)
        self._has_perhaps_ended()

    def _replaced(self, replacement: _Replacement, pid: int) -> None:
        self._replacement = None
        self._was_parked = False  # somebody has asked for this one, and may have mended the app
        now_s = time.monotonic()
        gap_s = now_s - (replacement.handed_over_s or now_s)
        done = WorkerReplaced(
            slot=self.slot.index,
            peer_id=self.peer_id,
            old_pid=replacement.old_pid or None,
            pid=pid,
            gap_ms=round(gap_s * 1e3, 3),
        )
        self.last_gap_ms = done.gap_ms
        self._host.journal.publish(done)
        self._say(
            logging.INFO,
            "worker pid %d has taken over from %s; gap %.1f ms",
            pid,
            f"pid {done.old_pid}" if done.old_pid else "nobody",
            done.gap_ms,
        )
        replacement.promise.resolve(done)

    def _not_replaced(self, why: str) -> None:
        if self.worker is None and not self._restart.is_waiting and not self._stops:
            self._say(logging.ERROR, "no worker: %s", self._plan_restart())
            self._tell_if_parked()
        self._fail_replacement(why)
        self._next_replacement()

    def _fail_replacement(self, why: str) -> None:
        replacement, self._replacement = self._replacement, None
        if replacement is not None:
            self._host.journal.publish(
                WorkerNotReplaced(slot=self.slot.index, peer_id=self.peer_id, why=why)
            )
            replacement.promise.reject(f"peer {self.peer_id}: {why}")

    # Its state

    def _becomes(self, event: Event) -> None:
        self.slot.since_ns = time.monotonic_ns()
        self.slot.state = TRANSITIONS[self.slot.state, event]
        self._host.slot_has_changed()

    def _has_perhaps_ended(self) -> None:
        if not self._stops or self.worker is not None or self.successor is not None:
            return
        while self._queue_tries and self.has_datagrams:
            # Nobody serves it, and it will be closed: what is in it is still owed an answer.
            self._queue_tries -= 1
            if self.start():
                return
        if not self.has_ended:
            self._becomes(Event.END)
            self._host.peer_has_ended(self)

    def _cancel_restart(self) -> None:
        self._restart.cancel()
        self.next_start_s = None

    def _say(self, level: int, message: str, *args: object) -> None:
        self._log.log(level, message, *args)


def _has_left(worker: Worker, end: Exit, lost: int) -> bool:
    """Whether that is the end of one that was told to leave its socket, and no death."""
    return worker.leaves and not lost and (end.code == EX_OK or end.signal == HAND_OVER)
