"""Keeps one worker a peer running, and with them the registrar and, if asked, an etcd.

One thread and one loop (loop.py): pidfds tell of deaths, pipes of readiness and of output, a socketpair of
signals. There is no gRPC here and there never was a thread, so fork is safe at any time (gRPC's
threads hang a forked child in up to 17 of 20 cases).

This file puts the parts together; each has its theory in its own file: one peer and its workers
(peer.py), the other children (services.py), reload and scale (operations.py), the end (stopping.py).

What runs in a child is handed in: nothing here imports the worker or the registrar.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

from setproctitle import setproctitle

from peerd import control
from peerd._scoreboard import PeerState, Scoreboard
from peerd.errors import ControlError
from peerd.settings import MAX_PEERS, OnCrashloop, SupervisorSettings
from peerd.supervisor.cgroup import OomKills
from peerd.supervisor.control_server import Command, ControlServer
from peerd.supervisor.history import History
from peerd.supervisor.journal import Journal, Stopping
from peerd.supervisor.kernel_drops import KernelDrops
from peerd.supervisor.loop import Loop
from peerd.supervisor.metrics import Metrics
from peerd.supervisor.metrics_server import MetricsServer
from peerd.supervisor.notify import socket_name
from peerd.supervisor.operations import Recycler, Reloads, Scaler
from peerd.supervisor.output import RecentLines
from peerd.supervisor.processes import reap_stranger
from peerd.supervisor.promise import Promise
from peerd.supervisor.record_conflicts import RecordConflicts
from peerd.supervisor.services import EtcdService, RegistrarService
from peerd.supervisor.status import StatusReport
from peerd.supervisor.stopping import Stop
from peerd.supervisor.supervised_peer import Peer
from peerd.supervisor.surroundings import Entries, Surroundings

log = logging.getLogger(__name__)

EX_OK = 0
EX_CRASHLOOP = 70
EX_CONFIG = 78

Since = Callable[[Mapping[str, object]], list[dict[str, object]]]

STOP_SIGNALS: Mapping[signal.Signals, int] = {
    signal.SIGTERM: EX_OK,
    signal.SIGINT: 128 + signal.SIGINT,
}
"""What asks the supervisor to stop, and the exit code it then ends with."""

OTHER_SIGNALS = (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU)
"""Reload, one peer more, one fewer."""

LOOK_S = 0.5
"""How often the workers' heartbeats are looked at."""

RECYCLE_S = 2.0
"""How often their age and memory are."""


class Supervisor:
    def __init__(
        self, settings: SupervisorSettings, entries: Entries, surroundings: Surroundings
    ) -> None:
        sockets = surroundings.sockets
        self.settings = settings
        self.worker_entry = entries.worker
        self.loop = Loop()
        self.journal = Journal(self.loop)
        self.history = History(self.journal)
        self.recent_lines = RecentLines()
        # In a container, all of them have the same pid.
        self._name = f"{os.getpid()}-{time.monotonic_ns()}"
        self._is_running = False
        self._surroundings = surroundings
        self._notifier = surroundings.notifier
        self._board = Scoreboard(len(sockets), capacity=MAX_PEERS)
        self._drops = dict[int, KernelDrops]()
        self._peers: dict[int, Peer] = {}
        """By slot, in order."""

        for index, sock in enumerate(sockets):
            self._add_peer(index, sock)
        self._registrar = RegistrarService(
            self.loop,
            self.journal,
            entries.registrar,
            self._board,
            settings.registry,
            self._registrations_have_changed,
        )
        self._conflicts = RecordConflicts(self._peers, self.journal)
        self._etcd: EtcdService | None = None
        if surroundings.etcd is not None:
            endpoint = settings.registry.endpoint
            self._etcd = EtcdService(self.loop, self.journal, surroundings.etcd, endpoint)
        self._status = StatusReport(settings, self._peers, self._board, surroundings)
        self._reloads = Reloads(self.loop, self._peers, self._reload_has_changed)
        self._scaler = Scaler(
            settings,
            self.loop,
            self._peers,
            self._add_peer,
            self._remove_peer,
            self.journal,
            self._tell_manager,
        )
        self._recycler = Recycler(settings, self._peers)
        self._oom_kills = OomKills()
        self._control: ControlServer | None = None
        self._metrics: MetricsServer | None = None
        self._stop: Stop | None = None
        self._is_done = False
        self._exit_code = EX_OK
        self._begun_s = time.monotonic()
        self._was_ready = False
        self._all_ready_told = False
        self._all_registered_told = False

    def run(self) -> int:
        """Serve until a signal ends it; the exit code."""
        self._set_title()
        self._is_running = True
        with self._signals():
            try:
                self._open_control()
                self._open_metrics()
                for peer in self._peers.values():
                    self._notifier.store(socket_name(peer.port), peer.sock)
                # Before the etcd, whose folder it removes if this process is killed.
                self._registrar.start()
                for peer in self._peers.values():
                    peer.start()
                if self._etcd is not None:
                    self._etcd.start()
                self.loop.call_later(LOOK_S, self._look)
                self._recycle()
                self._feed_watchdog()
                while not self._is_done:
                    self.loop.run_once()
            finally:
                self._release()
        return self._exit_code

    # Commands

    def status(self, _arguments: Mapping[str, object]) -> dict[str, object]:
        return self._status.build(self._state)

    def reload(self, _arguments: Mapping[str, object]) -> Promise[dict[str, object]]:
        """Replace all workers, one at a time; stop at the first that fails."""
        self._refuse_while_stopping()
        return self._reloads.reload()

    def restart(self, arguments: Mapping[str, object]) -> Promise[dict[str, object]]:
        """Replace the worker of one slot, or start it if it is parked."""
        self._refuse_while_stopping()
        answer = Promise[dict[str, object]](self.loop)
        self._peer_at(arguments.get("slot")).replace().then(
            lambda replaced: answer.resolve({"replaced": [asdict(replaced)]}), answer.reject
        )
        return answer

    def scale(self, arguments: Mapping[str, object]) -> Promise[dict[str, object]]:
        """So many peers, on the ports from the first on."""
        self._refuse_while_stopping()
        peers = arguments.get("peers")
        if type(peers) is not int:
            raise ControlError(f"cannot scale to {peers!r} peers: give a number")
        return self._scaler.scale_to(peers)

    def stop(self, _arguments: Mapping[str, object]) -> dict[str, object]:
        """Begin to stop, as SIGTERM does."""
        if self._stop is None:
            log.info("asked to stop")
            self._begin_stop(EX_OK)
        return {"pid": os.getpid(), "stop_timeout_s": self.settings.stop_timeout_s}

    def events(self, arguments: Mapping[str, object]) -> object:
        return self._as_asked(arguments, self.history.since)

    def logs(self, arguments: Mapping[str, object]) -> object:
        """Of ``slot``, which may be gone, as long as there are lines; None: of all."""
        slot = arguments.get("slot")
        if slot is not None and not self.recent_lines.has(slot):
            self._peer_at(slot)
        return self._as_asked(arguments, self.recent_lines.since)

    def _as_asked(self, arguments: Mapping[str, object], since: Since) -> object:
        """The entries; for who says whose it has seen (``supervisor``), with whose they are.

        The numbers of another supervisor mean nothing here: then they are all new.
        """
        if "supervisor" not in arguments:
            return since(arguments)
        is_known = arguments["supervisor"] == self._name
        entries = since(arguments if is_known else {**arguments, "after": 0})
        return {"supervisor": self._name, "entries": entries}

    def _peer_at(self, slot: object) -> Peer:
        peer = self._peers.get(slot) if type(slot) is int else None
        if peer is None:
            raise ControlError(f"no slot {slot!r}: there are 0 to {len(self._peers) - 1}")
        return peer

    def _refuse_while_stopping(self) -> None:
        if self._stop is not None:
            raise ControlError("the supervisor is stopping")

    @property
    def _state(self) -> str:
        if self._stop is not None:
            return "stopping"
        return "ready" if self._status.all_healthy else "degraded"

    # What the peers tell

    def slot_has_changed(self) -> None:
        self._registrar.wake()

    def peer_is_ready(self, peer: Peer) -> None:
        self._was_ready = True
        self._scaler.is_ready(peer)
        self._tell_manager()
        if self._all_are_ready and not self._all_ready_told:
            self._all_ready_told = True
            passed_ms = (time.monotonic() - self._begun_s) * 1e3
            log.info("%s ready, %.0f ms after start", self._all_peers(), passed_ms)

    def peer_cannot_start(self, peer: Peer, why: str) -> bool:
        if self._scaler.cannot_start(peer, why):
            return False
        if self._was_ready:
            return True
        # Nobody was ever ready: it is the configuration, and the same for every worker.
        if self._stop is None:
            log.critical("%s", why)
            self._begin_stop(EX_CONFIG)
        return False

    def peer_is_parked(self, peer: Peer) -> None:
        self._tell_manager()
        death = peer.last_death
        if self._scaler.cannot_start(
            peer, death.what_happened if death else f"peer {peer.peer_id} cannot be started"
        ):
            return
        if self.settings.on_crashloop is OnCrashloop.EXIT and self._stop is None:
            log.critical("peer %s is in a crash loop: stopping (--on-crashloop)", peer.peer_id)
            self._begin_stop(EX_CRASHLOOP)

    def peer_has_ended(self, peer: Peer) -> None:
        self._scaler.has_ended(peer)
        if self._stop is not None:
            self._stop.advance()

    def was_oom_killed(self) -> bool:
        return self._oom_kills.claim()

    # The peers

    def _add_peer(self, index: int, sock: socket.socket) -> Peer:
        self._board.grow(index + 1)
        slot = self._board.slots[index]
        drops = self._drops.setdefault(index, KernelDrops())
        drops.follow(sock)
        peer = self._peers[index] = Peer(self, slot, sock, drops)
        self._peers_have_changed(peer, stored=True)
        return peer

    def _remove_peer(self, peer: Peer) -> None:
        del self._peers[peer.slot.index]
        self._peers_have_changed(peer, stored=False)
        peer.close()  # after systemd has been told to discard it: nobody sends to a socket that is kept

    def _peers_have_changed(self, peer: Peer, *, stored: bool) -> None:
        if self._is_running:
            self._set_title()
            if stored:
                self._notifier.store(socket_name(peer.port), peer.sock)
            else:
                self._notifier.discard(socket_name(peer.port))

    @property
    def _all_are_ready(self) -> bool:
        return all(peer.slot.state is PeerState.READY for peer in self._peers.values())

    def _all_peers(self) -> str:
        return "the peer is" if len(self._peers) == 1 else f"all {len(self._peers)} peers are"

    def _set_title(self) -> None:
        first, last = self.settings.base_port, self.settings.base_port + len(self._peers) - 1
        setproctitle(f"peerd: supervisor of ports {first} to {last}")

    def _registrations_have_changed(self) -> None:
        self._conflicts.update()
        self._scaler.is_withdrawn()
        if self._stop is not None:
            self._stop.advance()
        elif not self._all_registered_told and all(
            peer.slot.registered for peer in self._peers.values()
        ):
            self._all_registered_told = True
            endpoint = self.settings.registry.endpoint
            log.info("%s registered in etcd at %s", self._all_peers(), endpoint)

    # What is done again and again

    def _look(self) -> None:
        if os.getpid() == 1:
            reap_stranger()
        if self._stop is None:
            self._oom_kills.update()
            for peer in self._peers.values():
                peer.check_health()
            self._tell_manager()
            self.loop.call_later(LOOK_S, self._look)

    def _recycle(self) -> None:
        if self.settings.max_age_s is None and self.settings.max_rss_bytes is None:
            return
        if self._stop is None:
            self._recycler.look()
            self.loop.call_later(RECYCLE_S, self._recycle)

    def _feed_watchdog(self) -> None:
        """Only while most workers are healthy: a service whose peers all hang should be restarted."""
        interval_s = self._notifier.watchdog_interval_s
        if interval_s is None:
            return
        ready = [peer for peer in self._peers.values() if peer.slot.state is PeerState.READY]
        if self._stop is not None or 2 * sum(peer.health.is_healthy for peer in ready) >= len(
            ready
        ):
            self._notifier.watchdog()
        self.loop.call_later(interval_s, self._feed_watchdog)

    def _tell_manager(self) -> None:
        """systemd's status line, and its READY: when all peers are, and no reload is under way."""
        if self._stop is not None or not self._is_running or not self._notifier.is_heard:
            return
        status = self._status.line()
        # Once it was, a reload ends with READY whatever it found: systemd waits for that.
        is_up = self._all_are_ready or self._all_ready_told
        if is_up and not self._reloads.is_under_way:
            self._notifier.ready(status)
        else:
            self._notifier.status(status)

    def _reload_has_changed(self) -> None:
        if self._reloads.is_under_way and self._stop is None:
            self._notifier.reloading()
        else:
            self._tell_manager()

    # Its end

    def _begin_stop(self, exit_code: int) -> None:
        self.journal.publish(Stopping(exit_code=exit_code))
        self._exit_code = exit_code
        self._notifier.stopping("stopping")
        self._reloads.abandon()
        self._stop = Stop(
            self.loop, self.settings, self._peers, self._registrar, self._etcd, self._finish
        )
        self._scaler.abandon()

    def _finish(self) -> None:
        self._is_done = True

    # Set-up and tear-down

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals become bytes on a socketpair, and so events of the loop.

        Afterwards they are ignored: one more changes nothing about how this process ends.
        """
        reader, writer = socket.socketpair()
        with reader, writer:
            reader.setblocking(False)
            writer.setblocking(False)
            previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            for number in (*STOP_SIGNALS, *OTHER_SIGNALS):
                signal.signal(number, lambda *_: None)
            self.loop.watch(reader.fileno(), lambda: self._read_signals(reader))
            try:
                yield
            finally:
                for number in (*STOP_SIGNALS, *OTHER_SIGNALS):
                    signal.signal(number, signal.SIG_IGN)
                signal.set_wakeup_fd(previous_fd)
                self.loop.close()

    def _read_signals(self, reader: socket.socket) -> None:
        for number in reader.recv(4096):
            if number in STOP_SIGNALS:
                self._stop_signal(signal.Signals(number))
            elif self._stop is not None:
                continue
            elif number == signal.SIGHUP:
                log.info("SIGHUP: reloading")
                self._reload_has_changed()  # systemd waits for a word that comes after its signal
                self._reloads.reload()
            elif number == signal.SIGTTIN:
                self._scaler.scale_by(1)
            elif number == signal.SIGTTOU:
                self._scaler.scale_by(-1)

    def _stop_signal(self, number: signal.Signals) -> None:
        if self._stop is not None:
            self._stop.another_signal()
            return
        log.info("%s: stopping; once more stops at once", number.name)
        self._begin_stop(STOP_SIGNALS[number])

    def _open_control(self) -> None:
        commands: dict[str, Command] = {
            "status": self.status,
            "reload": self.reload,
            "restart": self.restart,
            "scale": self.scale,
            "stop": self.stop,
            "events": self.events,
            "logs": self.logs,
        }
        path = self._surroundings.control_path
        try:
            self._control = ControlServer(path, commands, self.loop)
        except (OSError, ControlError) as error:
            is_default = path == control.default_path(self.settings.base_port)
            why = f"{path}: {error.strerror or error}" if isinstance(error, OSError) else error
            level = logging.INFO if is_default else logging.WARNING
            log.log(level, "no control socket, so no 'peerd status': %s", why)

    def _open_metrics(self) -> None:
        if self._surroundings.metrics_socket is None:
            return
        metrics = Metrics(self._peers, self._board, self._status, self.journal, self._surroundings)
        self._metrics = MetricsServer(
            self._surroundings.metrics_socket, metrics, self._status, self.loop
        )

    def _release(self) -> None:
        """After the last phase there is nothing left to end here; after an exception there is."""
        for peer in self._peers.values():
            peer.kill()
        for peer in self._peers.values():
            for worker in (peer.worker, peer.successor):
                if worker is not None:
                    worker.wait()
            peer.close(is_kept=self._notifier.is_heard)
        self._registrar.release()
        if self._etcd is not None:
            self._etcd.release()
        if self._control is not None:
            self._control.close()
        if self._metrics is not None:
            self._metrics.close()
        self._notifier.close()
