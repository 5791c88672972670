"""Publishes that another process holds the record of a peer, and that it does not any more.

The registrar writes both to the scoreboard and does not know the journal; it reports only that some
record has changed.
"""

from __future__ import annotations

from collections.abc import Mapping

from peerd.supervisor.journal import Journal, RecordInConflict, RecordRecovered, RecordsChanged
from peerd.supervisor.supervised_peer import SupervisedPeer


class RecordConflicts:
    def __init__(self, peers: Mapping[int, SupervisedPeer], journal: Journal) -> None:
        self._peers = peers
        self._journal = journal
        self._known: set[int] = set()
        journal.subscribe(RecordsChanged, lambda _: self._on_records_changed())

    def _on_records_changed(self) -> None:
        for slot, peer in self._peers.items():
            holder = peer.slot.holder
            if holder and slot not in self._known:
                self._known.add(slot)
                self._journal.publish(RecordInConflict(slot=slot, peer_id=peer.peer_id, why=holder))
            elif not holder and slot in self._known:
                self._known.discard(slot)
                self._journal.publish(RecordRecovered(slot=slot, peer_id=peer.peer_id))
        self._known.intersection_update(self._peers)
