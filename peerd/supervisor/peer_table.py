"""The peers of a supervisor, by slot. PeerTable adds and removes them; all other parts read PeerView.

A socket is in systemd's descriptor store exactly while its peer is in the table. It leaves the store before
it is closed: after that, no datagram can arrive in a socket that a later supervisor would inherit.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from peerd._scoreboard import PeerState, Scoreboard
from peerd.supervisor.events import PeersChanged, RecordInConflict, RecordRecovered, RecordsChanged
from peerd.supervisor.journal import Journal
from peerd.supervisor.notify import Notifier, socket_name
from peerd.supervisor.resources import PeerEnvironment
from peerd.supervisor.socket_queue import KernelDrops
from peerd.supervisor.supervised_peer import SupervisedPeer

PeerView: TypeAlias = Mapping[int, SupervisedPeer]
"""The read view: slot -> peer, in the order of the slots."""


def are_all_ready(peers: PeerView) -> bool:
    return all(peer.slot.state is PeerState.READY for peer in peers.values())


class PeerTable:
    def __init__(
        self,
        environment: PeerEnvironment,
        board: Scoreboard,
        notifier: Notifier,
        sockets: Sequence[socket.socket],
    ) -> None:
        """One peer for each socket, which the table owns from here on."""
        self._environment = environment
        self._board = board
        self._notifier = notifier
        self._by_slot: dict[int, SupervisedPeer] = {}
        self._drops: dict[int, KernelDrops] = {}
        """Outlive the peers, so that the counts never go back when a slot is used again."""

        self.view: PeerView = MappingProxyType(self._by_slot)
        for index, sock in enumerate(sockets):
            self._add(index, sock)

    def add(self, sockets: Mapping[int, socket.socket]) -> list[SupervisedPeer]:
        """One provisional peer for each slot and socket."""
        peers = [self._add(index, sock, is_provisional=True) for index, sock in sockets.items()]
        self._environment.journal.publish(PeersChanged())
        return peers

    def remove(self, peer: SupervisedPeer) -> None:
        """Remove a peer that has ended, and close its socket."""
        del self._by_slot[peer.slot.index]
        self._notifier.discard(socket_name(peer.port))
        peer.close()
        self._environment.journal.publish(PeersChanged())

    def release(self) -> None:
        """End what is left, at the end of the supervisor."""
        for peer in self._by_slot.values():
            peer.kill()
        for peer in self._by_slot.values():
            for worker in peer.workers:
                worker.wait()
            peer.close(is_kept=self._notifier.has_manager)

    def _add(
        self, index: int, sock: socket.socket, *, is_provisional: bool = False
    ) -> SupervisedPeer:
        self._board.grow(index + 1)
        slot = self._board.slots[index]
        drops = self._drops.setdefault(index, KernelDrops())
        drops.follow(sock)
        peer = SupervisedPeer(self._environment, slot, sock, drops, is_provisional=is_provisional)
        self._by_slot[index] = peer
        self._notifier.store(socket_name(peer.port), sock)
        return peer


class RecordConflicts:
    """Publishes that another process holds the record of a peer, and that it does not any more.

    The registrar writes both to the scoreboard and reports only that some record has changed.
    """

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
