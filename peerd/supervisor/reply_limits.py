"""Publishes that a peer's replies were withheld, because they looked like a loop of two servers.

The worker counts each such reply and logs the first ones (peerd/serving/loop_logs.py); this one says
in ``peerd events`` that it happened, at most once per minute for a peer.
"""

from __future__ import annotations

import time

from peerd._scoreboard import Slot
from peerd.supervisor.journal import Journal, RepliesWithheld

MIN_INTERVAL_S = 60.0


class ReplyLimits:
    def __init__(self, slot: Slot, peer_id: str, journal: Journal) -> None:
        self._slot = slot
        self._peer_id = peer_id
        self._journal = journal
        self._published = self._counts()
        self._next_s = 0.0

    def check(self) -> None:
        """Call it about twice per second."""
        if time.monotonic() < self._next_s or (counts := self._counts()) == self._published:
            return
        to_peers, over_rate = (
            now - then for now, then in zip(counts, self._published, strict=True)
        )
        self._journal.publish(
            RepliesWithheld(
                slot=self._slot.index,
                peer_id=self._peer_id,
                to_peers=to_peers,
                over_rate=over_rate,
            )
        )
        self._published = counts
        self._next_s = time.monotonic() + MIN_INTERVAL_S

    def _counts(self) -> tuple[int, int]:
        counters = self._slot.counters()
        return counters["tx_loop"], counters["tx_dropped_rate"]
