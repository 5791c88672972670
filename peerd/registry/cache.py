"""All peers, as of now, without asking etcd.

One thread takes what a Watch tells and keeps the records sorted. Readers get a tuple that it has
replaced as a whole, so they need no lock, see one state, and can read while etcd is away: then the
cache is what was last known, and says how old that is.

Each Registry has at most one, shared by all who ask for it; it ends with the last of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from peerd.errors import RegistryError
from peerd.registry.connection import PULSE_S
from peerd.registry.records import PeerRecord, select
from peerd.registry.watch import Event, Left, Watch

log = logging.getLogger(__name__)

CURRENT_S = 3 * PULSE_S
"""A cache that etcd has confirmed within this time is current. It does so each PULSE_S."""

_AUTH_RETRY_S = 1.0


class Snapshot:
    """The records that a Watch has told of, kept by a thread until ``close()``."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._peer_ids: list[str] = []
        self._listed = threading.Event()
        self._closed = threading.Event()
        self.records: tuple[PeerRecord, ...] = ()
        """Sorted by peer id."""

        self.by_peer_id: dict[str, PeerRecord] = {}
        self._thread = threading.Thread(target=self._keep, name="peerd-registry-cache", daemon=True)
        self._thread.start()

    @property
    def known_s(self) -> float:
        return self._watch.known_s

    def wait_listed(self, timeout_s: float) -> bool:
        return self._listed.wait(timeout_s)

    def close(self) -> None:
        self._closed.set()
        self._watch.close()
        self._thread.join(1.0)

    def _keep(self) -> None:
        while not self._closed.is_set():
            try:
                events = self._watch.take()
            except RegistryError as error:  # access is refused: somebody may correct it
                log.warning("the cache of peers is not current: %s", error)
                self._closed.wait(_AUTH_RETRY_S)
                continue
            if events is None:
                return
            if events:
                self._apply(events)
            if self._watch.known_s > 0:
                self._listed.set()

    def _apply(self, events: list[Event]) -> None:
        by_peer_id = dict(self.by_peer_id)
        for event in events:
            peer_id = event.record.peer_id
            if not isinstance(event, Left):
                by_peer_id[peer_id] = event.record
            elif (other := self._watch.last_told(peer_id)) is not None:
                by_peer_id[peer_id] = other
            else:
                by_peer_id.pop(peer_id, None)
        if by_peer_id.keys() != self.by_peer_id.keys():
            self._peer_ids = sorted(by_peer_id)  # nearly sorted already, as dict keeps its order
        self.by_peer_id = by_peer_id
        self.records = tuple(map(by_peer_id.__getitem__, self._peer_ids))


class Cache:
    """A live view of the peers below a Registry's prefix. A context manager.

    Reading never blocks and never raises for etcd's sake. In a forked child it raises RuntimeError.
    """

    def __init__(
        self, snapshot: Snapshot, check_process: Callable[[], None], release: Callable[[], None]
    ) -> None:
        self._snapshot = snapshot
        self._check_process = check_process
        self._release: Callable[[], None] | None = release

    def nodes(
        self,
        *,
        partition_key: str | None = None,
        protocol: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[PeerRecord]:
        """All peers that were there, sorted by peer id, or those that have what is given."""
        self._check_process()
        return select(self._snapshot.records, partition_key, protocol, metadata)

    def get(self, peer_id: str) -> PeerRecord | None:
        self._check_process()
        return self._snapshot.by_peer_id.get(peer_id)

    @property
    def age_s(self) -> float:
        """Since when nobody knows whether this is still so; ``inf`` before etcd's first answer."""
        self._check_process()
        return max(0.0, time.monotonic() - self._snapshot.known_s)

    @property
    def current(self) -> bool:
        """Whether etcd has confirmed it within CURRENT_S."""
        return self.age_s < CURRENT_S

    def wait_current(self, timeout_s: float) -> bool:
        """Waits for the first list, which ``cache()`` does not. Returns whether it came."""
        self._check_process()
        return self._snapshot.wait_listed(timeout_s) and self.current

    def close(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
