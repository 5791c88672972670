"""What systemd is notified of: READY, reloads, the status line, the watchdog (notify.py has the protocol)."""

from __future__ import annotations

from peerd._scoreboard import PeerState
from peerd.supervisor import events
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Loop
from peerd.supervisor.notify import Notifier
from peerd.supervisor.peer_table import PeerView, are_all_ready
from peerd.supervisor.status import StatusReport


class ManagerStatus:
    def __init__(
        self,
        loop: Loop,
        journal: Journal,
        notifier: Notifier,
        peers: PeerView,
        status: StatusReport,
    ) -> None:
        self._loop = loop
        self._notifier = notifier
        self._peers = peers
        self._status = status
        self._was_up = False
        self._is_reloading = False
        self._is_stopping = False
        for kind in (
            events.WorkerReady,
            events.PeerParked,
            events.PeersChanged,
            events.Scaled,
            events.NotScaled,
        ):
            journal.subscribe(kind, lambda _: self.update())
        journal.subscribe(events.ReloadChanged, self._on_reload_changed)
        journal.subscribe(events.Stopping, lambda _: self._on_stopping())

    def update(self) -> None:
        """Send the status line, and READY when all peers are ready and no reload is under way."""
        if self._is_stopping or not self._notifier.has_manager:
            return
        # Once up, a reload ends with READY whatever became of it, because systemd waits for that.
        self._was_up = self._was_up or are_all_ready(self._peers)
        if self._was_up and not self._is_reloading:
            self._notifier.ready(self._status.line())
        else:
            self._notifier.status(self._status.line())

    def feed_watchdog(self) -> None:
        """Feed it from now on, while most workers are healthy: a service whose peers all hang should be
        restarted."""
        interval_s = self._notifier.watchdog_interval_s
        if interval_s is None:
            return
        ready = [peer for peer in self._peers.values() if peer.slot.state is PeerState.READY]
        if self._is_stopping or 2 * sum(peer.health.is_healthy for peer in ready) >= len(ready):
            self._notifier.watchdog()
        self._loop.call_later(interval_s, self.feed_watchdog)

    def _on_reload_changed(self, event: events.ReloadChanged) -> None:
        self._is_reloading = event.is_running
        if self._is_stopping:
            return
        if event.is_running:
            self._notifier.reloading()
        else:
            self.update()

    def _on_stopping(self) -> None:
        self._is_stopping = True
        self._notifier.stopping("stopping")
