"""Recycling: workers that are too old or too large are replaced, one at a time (--max-age, --max-rss).

All workers that one check has found are replaced before the next check. Otherwise the first slots, which are
due again soon where there are many, would keep the last ones waiting.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping

from peerd._scoreboard import PeerState
from peerd.procfs import rss_bytes
from peerd.settings import SupervisorSettings
from peerd.supervisor.events import Stopping
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Loop, Timer
from peerd.supervisor.supervised_peer import SupervisedPeer

log = logging.getLogger(__name__)

RECYCLE_CHECK_INTERVAL_S = 2.0  # Interval between checks of worker age and memory
RETRY_DELAY_S = 60.0
"""After a worker could not be replaced: the next one would most likely load the same broken app."""


class Recycler:
    def __init__(
        self,
        settings: SupervisorSettings,
        loop: Loop,
        journal: Journal,
        peers: Mapping[int, SupervisedPeer],
    ) -> None:
        self._settings = settings
        self._loop = loop
        self._peers = peers
        self._due: deque[tuple[SupervisedPeer, str]] = deque()
        self._paused_until_s = 0.0
        self._large: dict[int, int] = {}
        """Slot -> pid of a worker that was too large at the last check."""

        self._timer = Timer()
        journal.subscribe(Stopping, lambda _: self._timer.cancel())

    def start(self) -> None:
        if self._settings.max_age_s is not None or self._settings.max_rss_bytes is not None:
            self._check()

    def _check(self) -> None:
        self._timer = self._loop.call_later(RECYCLE_CHECK_INTERVAL_S, self._check)
        if self._due or time.monotonic() < self._paused_until_s:
            return
        for peer in self._peers.values():
            why = None if peer.replacements.current else self._reason(peer)
            if why is not None:
                self._due.append((peer, why))
        self._replace_next()

    def _replace_next(self) -> None:
        while self._due and not _is_serving(self._due[0][0]):
            self._due.popleft()
        if self._due:
            peer, why = self._due[0]
            log.info("peer %s: its worker is replaced, %s", peer.peer_id, why)
            peer.replace().then(lambda _: self._on_replaced(), self._on_not_replaced)

    def _on_replaced(self) -> None:
        self._due.popleft()
        self._replace_next()

    def _on_not_replaced(self, why: str) -> None:
        peer, _ = self._due.popleft()
        if _is_serving(peer):
            log.error("not replaced, and tried again in %g s: %s", RETRY_DELAY_S, why)
            self._due.clear()
            self._paused_until_s = time.monotonic() + RETRY_DELAY_S
        self._replace_next()

    def _reason(self, peer: SupervisedPeer) -> str | None:
        worker, max_age_s = peer.worker, self._settings.max_age_s
        if worker is None or worker.ready_for_s is None:
            return None
        if max_age_s is not None and worker.ready_for_s >= max_age_s:
            return f"having been ready for {worker.ready_for_s:.0f} s (--max-age)"
        max_bytes = self._settings.max_rss_bytes
        if max_bytes is None:
            return None
        size_bytes, slot = rss_bytes(worker.pid), peer.slot.index
        if size_bytes <= max_bytes:
            self._large.pop(slot, None)
            return None
        # Twice in a row, because a handler may need much memory for a moment.
        if self._large.get(slot) != worker.pid:
            self._large[slot] = worker.pid
            return None
        return f"having {size_bytes} bytes of memory (--max-rss)"


def _is_serving(peer: SupervisedPeer) -> bool:
    return peer.slot.state is PeerState.READY and not peer.is_stopping
