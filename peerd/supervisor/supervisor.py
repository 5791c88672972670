"""Keeps one worker process per peer running, plus the registrar and, optionally, an embedded etcd.

One thread and one loop (loop.py): pidfds report deaths, pipes readiness and output, a socketpair signals.
There is no gRPC and no other thread in this process, so fork is safe at any time (gRPC's threads hang up to
17 of 20 forked children).

This file puts the parts together, and each has its theory in its own file: one peer and its workers
(supervised_peer.py), the other children (services.py), reloads.py, scaler.py, recycler.py, the end
(stopping.py), the commands (control_commands.py). The journal (journal.py) reports to each part what happened
in the others.

The functions that run in the children are handed in: nothing here imports the worker or the registrar.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Mapping

from setproctitle import setproctitle

from peerd import control
from peerd._scoreboard import Scoreboard
from peerd.errors import ControlError
from peerd.settings import MAX_PEERS, OnCrashloop, SupervisorSettings
from peerd.supervisor import events
from peerd.supervisor.cgroup import OomKills
from peerd.supervisor.control_commands import ControlCommands
from peerd.supervisor.control_server import ControlServer
from peerd.supervisor.event_log import EventLog
from peerd.supervisor.journal import History, Journal
from peerd.supervisor.loop import Loop, watch_signals
from peerd.supervisor.manager_status import ManagerStatus
from peerd.supervisor.metrics import Metrics
from peerd.supervisor.metrics_server import MetricsServer
from peerd.supervisor.output import RecentLines
from peerd.supervisor.peer_table import PeerTable, RecordConflicts
from peerd.supervisor.processes import reap_orphans
from peerd.supervisor.recycler import Recycler
from peerd.supervisor.reloads import Reloads
from peerd.supervisor.resources import ChildEntryPoints, PeerEnvironment, Resources
from peerd.supervisor.scaler import Scaler
from peerd.supervisor.services import EtcdService, RegistrarService
from peerd.supervisor.status import StatusReport
from peerd.supervisor.stopping import Stop

log = logging.getLogger(__name__)

EX_CRASHLOOP = os.EX_SOFTWARE

STOP_SIGNALS: Mapping[signal.Signals, int] = {
    signal.SIGTERM: os.EX_OK,
    signal.SIGINT: 128 + signal.SIGINT,
}
"""Signal -> exit code of the supervisor that it stops."""

OTHER_SIGNALS = (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU)
"""Reload, one more peer, one peer fewer."""

HEALTH_CHECK_INTERVAL_S = 0.5  # Interval between checks of the workers' heartbeats


class Supervisor:
    def __init__(
        self, settings: SupervisorSettings, entry_points: ChildEntryPoints, resources: Resources
    ) -> None:
        self._settings = settings
        self._resources = resources
        self._loop = Loop()
        self._journal = Journal(self._loop)
        self._oom_kills = OomKills()
        self._was_ready = False
        self._board = Scoreboard(len(resources.sockets), capacity=MAX_PEERS)
        recent_lines = RecentLines()
        environment = PeerEnvironment(
            settings=settings,
            loop=self._loop,
            journal=self._journal,
            worker_entry=entry_points.worker,
            recent_lines=recent_lines,
            claim_oom_kill=self._oom_kills.claim,
            has_been_ready=lambda: self._was_ready,
        )
        self._table = PeerTable(environment, self._board, resources.notifier, resources.sockets)
        self._peers = self._table.view
        endpoint = settings.registry.endpoint
        self._registrar = RegistrarService(
            self._loop, self._journal, entry_points.registrar, self._board, settings.registry
        )
        self._etcd: EtcdService | None = None
        if resources.etcd is not None:
            self._etcd = EtcdService(self._loop, self._journal, resources.etcd, endpoint)
        # From here on, in the order in which they get each event.
        history = History(self._journal)
        RecordConflicts(self._peers, self._journal)
        EventLog(self._journal, self._peers, endpoint)
        self._status = StatusReport(settings, self._peers, self._board, resources)
        self._manager = ManagerStatus(
            self._loop, self._journal, resources.notifier, self._peers, self._status
        )
        self._reloads = Reloads(self._loop, self._journal, self._peers)
        self._scaler = Scaler(settings, self._loop, self._journal, self._table)
        self._recycler = Recycler(settings, self._loop, self._journal, self._peers)
        self._commands = ControlCommands(
            loop=self._loop,
            peers=self._peers,
            status=self._status,
            reloads=self._reloads,
            scaler=self._scaler,
            history=history,
            recent_lines=recent_lines,
            is_stopping=lambda: self._stop is not None,
            stop=self._on_stop_command,
            stop_timeout_s=settings.stop_timeout_s,
        )
        self._servers = contextlib.ExitStack()
        self._stop: Stop | None = None
        self._exit_code = os.EX_OK
        self._journal.subscribe(events.WorkerReady, self._on_worker_ready)
        self._journal.subscribe(events.CannotStart, self._on_cannot_start)
        self._journal.subscribe(events.PeerParked, self._on_peer_parked)
        self._journal.subscribe(events.PeersChanged, lambda _: self._set_title())

    def run(self) -> int:
        """Serve until a signal ends it; returns the exit code."""
        self._set_title()
        with watch_signals(self._loop, (*STOP_SIGNALS, *OTHER_SIGNALS), self._on_signal):
            try:
                self._open_control()
                self._open_metrics()
                # Before etcd: if this process is killed, the registrar removes etcd's directory.
                self._registrar.start()
                for peer in self._peers.values():
                    peer.start()
                if self._etcd is not None:
                    self._etcd.start()
                self._loop.call_later(HEALTH_CHECK_INTERVAL_S, self._check_health)
                self._recycler.start()
                self._manager.feed_watchdog()
                while self._stop is None or not self._stop.is_done:
                    self._loop.run_once()
            finally:
                self._release()
        self._loop.close()
        return self._exit_code

    def _on_worker_ready(self, _event: events.WorkerReady) -> None:
        self._was_ready = True

    def _on_cannot_start(self, event: events.CannotStart) -> None:
        # No peer was ever ready: it is the configuration, and the same for every worker.
        if not event.is_retried and not event.is_provisional and self._stop is None:
            log.critical("%s", event.why)
            self._begin_stop(os.EX_CONFIG)

    def _on_peer_parked(self, event: events.PeerParked) -> None:
        is_fatal = self._settings.on_crashloop is OnCrashloop.EXIT and not event.is_provisional
        if is_fatal and self._stop is None:
            log.critical("peer %s is in a crash loop: stopping (--on-crashloop)", event.peer_id)
            self._begin_stop(EX_CRASHLOOP)

    def _on_signal(self, number: signal.Signals) -> None:
        if number in STOP_SIGNALS and self._stop is not None:
            self._stop.another_signal()
        elif number in STOP_SIGNALS:
            log.info("%s: stopping; once more stops at once", number.name)
            self._begin_stop(STOP_SIGNALS[number])
        elif self._stop is not None:
            pass
        elif number == signal.SIGHUP:
            log.info("SIGHUP: reloading")
            # For systemd, which waits for a notification that comes after its signal.
            self._journal.publish(events.ReloadChanged(is_running=self._reloads.is_running))
            self._reloads.reload()
        else:
            self._scaler.scale_by(1 if number == signal.SIGTTIN else -1)

    def _on_stop_command(self) -> None:
        if self._stop is None:
            log.info("asked to stop")
            self._begin_stop(os.EX_OK)

    def _begin_stop(self, exit_code: int) -> None:
        self._journal.publish(events.Stopping(exit_code=exit_code))
        self._exit_code = exit_code
        self._stop = Stop(
            self._loop, self._journal, self._settings, self._peers, self._registrar, self._etcd
        )

    def _check_health(self) -> None:
        if os.getpid() == 1:
            reap_orphans()
        if self._stop is None:
            self._oom_kills.update()
            for peer in self._peers.values():
                peer.check_health()
            self._manager.update()
            self._loop.call_later(HEALTH_CHECK_INTERVAL_S, self._check_health)

    def _set_title(self) -> None:
        first, last = self._settings.base_port, self._settings.base_port + len(self._peers) - 1
        setproctitle(f"peerd: supervisor of ports {first} to {last}")

    def _open_control(self) -> None:
        path = self._resources.control_path
        try:
            server = ControlServer(path, self._commands.table(), self._loop)
            self._servers.callback(server.close)
        except (OSError, ControlError) as error:
            is_default = path == control.default_path(self._settings.base_port)
            why = f"{path}: {error.strerror or error}" if isinstance(error, OSError) else error
            level = logging.INFO if is_default else logging.WARNING
            log.log(level, "no control socket, so no 'peerd status': %s", why)

    def _open_metrics(self) -> None:
        sock = self._resources.metrics_socket
        if sock is not None:
            metrics = Metrics(
                self._peers, self._board, self._status, self._journal, self._resources
            )
            self._servers.callback(MetricsServer(sock, metrics, self._status, self._loop).close)

    def _release(self) -> None:
        """After a stop nothing is left to end here; after an exception there is."""
        self._table.release()
        self._registrar.release()
        if self._etcd is not None:
            self._etcd.release()
        self._servers.close()
        self._resources.notifier.close()
