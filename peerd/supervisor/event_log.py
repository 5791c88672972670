"""Log lines for events of the journal."""

from __future__ import annotations

import logging
import time

from peerd.supervisor import events
from peerd.supervisor.journal import Journal
from peerd.supervisor.peer_table import PeerView, are_all_ready

log = logging.getLogger(__name__)


class EventLog:
    def __init__(self, journal: Journal, peers: PeerView, endpoint: str) -> None:
        """``endpoint``: of etcd, named in the line that says that all peers are registered."""
        self._peers = peers
        self._endpoint = endpoint
        self._begun_s = time.monotonic()
        self._were_all_ready = False
        self._were_all_registered = False
        journal.subscribe(events.WorkerReady, lambda _: self._on_worker_ready())
        journal.subscribe(events.WorkerDied, self._on_worker_died)
        journal.subscribe(events.WorkerReplaced, self._on_worker_replaced)
        journal.subscribe(events.WorkerStuck, self._on_worker_stuck)
        journal.subscribe(events.RecordsChanged, lambda _: self._on_records_changed())
        journal.subscribe(events.Stopping, lambda _: self._on_stopping())
        journal.subscribe(
            events.Scaled,
            lambda event: log.info("scaled from %d to %d peers", event.before, event.peers),
        )

    def _on_worker_ready(self) -> None:
        if not self._were_all_ready and are_all_ready(self._peers):
            self._were_all_ready = True
            passed_ms = (time.monotonic() - self._begun_s) * 1e3
            log.info("%s ready, %.0f ms after start", self._all_peers(), passed_ms)

    def _on_worker_died(self, event: events.WorkerDied) -> None:
        death = event.death
        self._peers[event.slot].log.log(
            logging.ERROR, "%s", death.sentence, pid=death.pid, generation=death.generation
        )

    def _on_worker_replaced(self, event: events.WorkerReplaced) -> None:
        before = f" from pid {event.old_pid}" if event.old_pid else ", there was none before"
        text = "worker pid %d has taken over%s; gap %.1f ms"
        self._peers[event.slot].log.log(logging.INFO, text, event.pid, before, event.gap_ms)

    def _on_worker_stuck(self, event: events.WorkerStuck) -> None:
        text = "worker pid %d is %s; its stack follows, then SIGKILL"
        self._peers[event.slot].log.log(logging.ERROR, text, event.pid, event.sentence)

    def _on_records_changed(self) -> None:
        if not self._were_all_registered and all(
            peer.slot.registered for peer in self._peers.values()
        ):
            self._were_all_registered = True
            log.info("%s registered in etcd at %s", self._all_peers(), self._endpoint)

    def _on_stopping(self) -> None:
        self._were_all_registered = True  # not worth a line any more

    def _all_peers(self) -> str:
        return "the peer is" if len(self._peers) == 1 else f"all {len(self._peers)} peers are"
