"""One peer: its slot, its socket, and the workers that read it one after the other. Restart and stop.

A worker that dies is followed by another one, as restart.py says. The datagrams that it had in hand are
counted exactly (``Slot.unfinished``), and the socket stays open: datagrams that arrive meanwhile wait in the
kernel's buffer. replacement.py has the other way in which one worker follows another.

A stop has two steps. stop(): the peer serves on, but nothing new begins, so the registrar can revoke its
record. drain(): the worker answers what the queue holds, and exits. If there is no worker while the queue
holds datagrams, one is started for them, a bounded number of times.

Stuck workers (peer_health.py) write their Python stack to the log and are killed.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from peerd._scoreboard import PeerState, Slot
from peerd.health import Health
from peerd.supervisor import events
from peerd.supervisor.death import Death, WorkerExit, certify
from peerd.supervisor.lifecycle import TRANSITIONS, LifecycleAction, LifecycleEvent
from peerd.supervisor.loop import Promise
from peerd.supervisor.output import PeerLog
from peerd.supervisor.peer_health import PeerHealth, ReplyLimits
from peerd.supervisor.peer_restarts import PeerRestarts
from peerd.supervisor.replacement import Replacements
from peerd.supervisor.resources import PeerEnvironment
from peerd.supervisor.socket_queue import KernelDrops, count_unread, has_datagrams
from peerd.supervisor.worker_process import Worker, start_worker

MAX_QUEUE_STARTS = 3
"""Workers that are started to serve the queue of a peer that stops and has none."""


class SupervisedPeer:
    def __init__(
        self,
        environment: PeerEnvironment,
        slot: Slot,
        sock: socket.socket,
        drops: KernelDrops,
        *,
        is_provisional: bool = False,
    ) -> None:
        """``is_provisional``: it is being added. Until it is ready, a failure is not retried: the scaling
        is undone."""
        self.slot = slot
        self.sock = sock
        self.drops = drops
        self.peer_id = environment.settings.peer_id(slot.index)
        self.port = environment.settings.base_port + slot.index
        self.worker: Worker | None = None
        """The one that serves, or is about to; a successor that loads the app beside it is in
        ``replacements``."""

        self.last_death: Death | None = None
        self.last_gap_ms: float | None = None
        self.is_provisional = is_provisional
        self.is_stopping = False  # stop() was called
        self.log = PeerLog(slot, self.peer_id, self.port, environment.recent_lines)
        self.restarts = PeerRestarts(self, environment)
        self.replacements = Replacements(self, environment)
        self._environment = environment
        self._generations = slot.generation
        self._is_draining = False
        self._queue_starts_left = MAX_QUEUE_STARTS
        self.health = PeerHealth(slot, sock, environment.settings, self.publish, self.log)
        self._reply_limits = ReplyLimits(slot, self.publish)
        self._actions: dict[LifecycleAction, Callable[[], object]] = {
            LifecycleAction.LIMIT_BOOT: self._limit_boot,
            LifecycleAction.ANNOUNCE: self._announce,
            LifecycleAction.ANNOUNCE_AND_DRAIN: self._announce_and_drain,
            LifecycleAction.RETRY: self.restarts.arm,
            LifecycleAction.RETRY_SLOWLY: self.restarts.arm_slowly,
            LifecycleAction.WITHDRAW: self._withdraw,
            LifecycleAction.REPORT_END: lambda: self.publish(events.PeerEnded),
            LifecycleAction.NOTHING: lambda: None,
        }

    def start(self) -> bool:
        """Fork a worker for a socket that no process reads. Returns False if that failed; it is retried."""
        self.restarts.cancel()
        try:
            worker = self.fork()
        except OSError as error:
            self.restarts.on_fork_failed(error)
            return False
        self.adopt(worker)
        worker.allow_load()
        worker.allow_serving()
        return True

    def replace(self) -> Promise[events.WorkerReplaced]:
        """Replace the worker by one that has loaded the app anew; start one where none serves."""
        return self.replacements.request()

    def stop(self) -> None:
        """Serve on, but begin nothing new. ``drain`` is next."""
        if not self.is_stopping:
            self.is_stopping = True
            self.transition(LifecycleEvent.STOP)
            self.finish_if_idle()

    def drain(self) -> None:
        """Answer what the queue holds, and end. A worker that starts with a queue before it may begin."""
        self._is_draining = True
        worker, replacement = self.worker, self.replacements.current
        if worker is not None and (worker.is_ready or not has_datagrams(self.sock)):
            worker.send(signal.SIGTERM)
        if worker is None and replacement is not None and not has_datagrams(self.sock):
            replacement.cancel_load()

    def kill(self) -> None:
        """End now, whatever the queue holds."""
        self._queue_starts_left = 0
        for worker in self.workers:
            worker.kill("stop")

    @property
    def workers(self) -> list[Worker]:
        """The worker and its successor, as far as there are any."""
        replacement = self.replacements.current
        successor = None if replacement is None else replacement.successor
        return [worker for worker in (self.worker, successor) if worker is not None]

    @property
    def has_ended(self) -> bool:
        """It was asked to stop, and there is no process and nothing left to serve."""
        return self.is_stopping and self.slot.state is PeerState.STOPPED

    def check_health(self) -> None:
        """Judge the worker, and end one that is stuck. Call it about twice per second."""
        self._reply_limits.check()
        self.health.check()
        worker, found = self.worker, self.health.diagnosis
        if worker is None or found is None or found.health is not Health.STUCK or worker.killed_for:
            return
        self.publish(
            events.WorkerStuck, pid=worker.pid, for_s=round(found.for_s, 3), sentence=found.sentence
        )
        worker.kill_with_stack("stuck", self.health.has_recovered)

    def close(self, *, is_kept: bool = False) -> None:
        """Close the socket after the end. Counts what is lost with it, unless another process keeps it."""
        self.drops.leave()
        if not is_kept and (unread := count_unread(self.sock)):
            self.slot.lost_unread += unread
            self.publish(events.PeerClosed, lost_unread=unread)
            self.log.log(
                logging.WARNING, "datagrams in the queue when its port was closed: %d", unread
            )
        self.sock.close()

    # For its restarts and replacements

    def fork(self) -> Worker:
        """Raises OSError."""
        loop, entry = self._environment.loop, self._environment.worker_entry
        generation = self._generations + 1
        worker = start_worker(loop, entry, self.slot, self.sock, generation, self.log)
        self._generations = generation
        self.restarts.on_forked()
        worker.watch(lambda: self._on_report(worker), lambda: self._on_exit(worker))
        return worker

    def adopt(self, worker: Worker) -> None:
        self.restarts.cancel()
        self.worker = worker
        self.slot.pid = worker.pid
        self.slot.generation = worker.generation
        self.transition(LifecycleEvent.START)

    def transition(self, event: LifecycleEvent) -> None:
        state, action = TRANSITIONS[self.slot.state, event]
        self.slot.since_ns = time.monotonic_ns()
        self.slot.state = state
        self.publish(events.SlotChanged)
        self._actions[action]()

    def certify(self, exit_: WorkerExit, then: str) -> None:
        self.last_death = certify(exit_, then, self.log, self._environment.claim_oom_kill)
        self.publish(events.WorkerDied, death=self.last_death)

    def publish(self, kind: type[events.PeerEvent], **details: Any) -> None:
        self._environment.journal.publish(
            kind(slot=self.slot.index, peer_id=self.peer_id, **details)
        )

    def finish_if_idle(self) -> None:
        """If it is stopping and has no worker: serve what is left in the queue, then end."""
        if not self.is_stopping or self.workers:
            return
        while self._queue_starts_left and has_datagrams(self.sock):
            self._queue_starts_left -= 1
            if self.start():
                return
        if not self.has_ended:
            self.transition(LifecycleEvent.END)

    # Actions of the lifecycle

    def _limit_boot(self) -> None:
        assert self.worker is not None
        self.worker.limit_boot(self._environment.settings.boot_timeout_s)

    def _announce(self) -> None:
        worker = self.worker
        assert worker is not None
        worker.cancel_boot_limit()
        self.health.on_ready()
        self.is_provisional = False
        self.publish(events.WorkerReady, pid=worker.pid)
        self.replacements.on_worker_ready()

    def _announce_and_drain(self) -> None:
        self._announce()
        if self._is_draining and self.worker is not None:
            self.worker.send(signal.SIGTERM)

    def _withdraw(self) -> None:
        self.restarts.cancel()
        self.replacements.cancel()

    # Its workers

    def _on_report(self, worker: Worker) -> None:
        if worker is not self.worker:
            if self.replacements.current is not None:
                self.replacements.current.on_report()
        elif worker.is_ready:
            self.transition(LifecycleEvent.SERVE)

    def _on_exit(self, worker: Worker) -> None:
        replacement = self.replacements.current
        if worker is not self.worker:
            assert replacement is not None
            replacement.on_successor_exit()
            return
        end = worker.wait()
        self.worker = None
        self.slot.pid = 0
        self.slot.add_log_dropped(worker.lines_dropped)
        exit_ = WorkerExit(worker, end, self.slot.settle())
        self.slot.lost_in_flight += exit_.lost_in_flight
        if replacement is not None and replacement.can_inherit:
            replacement.on_worker_exit(exit_)
        elif self.is_stopping:
            if exit_.is_unclean_stop:
                self.certify(exit_, "stopping")
            self.replacements.on_worker_died("it is stopping")
            self.finish_if_idle()
        elif exit_.is_hand_over:  # to a successor that has died meanwhile
            self.slot.restarts += 1
            self.start()
        elif worker.failure is not None:
            self.restarts.on_start_failed(worker.failure)
        else:
            self.restarts.on_death(exit_)
            self.replacements.on_worker_died(f"the successor: {end}")
