"""All peers as of now, without a call to etcd.

One thread reads a Watch and keeps the records sorted. Readers get a tuple that the thread replaces as a
whole: they need no lock, see one state, and can read while etcd is unreachable. The cache then holds the
last known state and reports its age.

Each Registry has at most one Snapshot, shared by all of its caches; it ends with the last of them. If its
thread ends through an error, the caches are not current any more and raise that error to their readers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from peerd.errors import RegistryError
from peerd.registry.connection import PROBE_INTERVAL_S
from peerd.registry.records import PeerRecord, select
from peerd.registry.watch import Event, Left, Watch

log = logging.getLogger(__name__)

CURRENT_S = 3 * PROBE_INTERVAL_S
"""A cache that etcd has confirmed within this time is current. A healthy etcd does so with every probe."""

_AUTH_RETRY_INTERVAL_S = 1.0


class Cache:
    """A live view of the peers below a Registry's prefix. A context manager.

    Reading never blocks and never raises because of etcd. It raises RuntimeError in a forked child, and
    the error that ended the cache's thread, should one have done so.
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
        """The last known peers that match every argument, sorted by peer id; see ``Registry.nodes``."""
        self._check_usable()
        return select(self._snapshot.records, partition_key, protocol, metadata)

    def get(self, peer_id: str) -> PeerRecord | None:
        """The last known record of one peer; None if there is no such peer."""
        self._check_usable()
        return self._snapshot.by_peer_id.get(peer_id)

    @property
    def skipped(self) -> int:
        """The number of values below the prefix that are no record, as in ``Listing``."""
        self._check_usable()
        return self._snapshot.watch.skipped

    @property
    def age_s(self) -> float:
        """Seconds since etcd last confirmed this view; ``inf`` before its first answer."""
        self._check_process()
        return max(0.0, time.monotonic() - self._snapshot.watch.confirmed_at_s)

    @property
    def current(self) -> bool:
        """Whether etcd has confirmed this view within CURRENT_S and the cache still follows it."""
        return self.age_s < CURRENT_S and self._snapshot.is_followed

    def wait_current(self, timeout_s: float) -> bool:
        """Wait for the first list, which ``Registry.cache`` does not. Returns whether the view is current."""
        self._check_usable()
        listed = self._snapshot.listed.wait(timeout_s)
        self._check_usable()
        return listed and self.current

    def close(self) -> None:
        """Release the cache: the last one of a Registry ends the thread and the watch. Never raises."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        self._check_process()
        if self._snapshot.failure is not None:
            raise self._snapshot.failure


class Snapshot:
    """The records that a Watch reports, kept up to date by a thread until ``close()``."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._peer_ids: list[str] = []
        self._closed = threading.Event()
        self.listed = threading.Event()  # set after the first list, and when the thread has failed
        self.failure: BaseException | None = None  # the error that ended the thread
        self.records: tuple[PeerRecord, ...] = ()  # sorted by peer id
        self.by_peer_id: dict[str, PeerRecord] = {}
        self._thread = threading.Thread(target=self._run, name="peerd-registry-cache", daemon=True)
        self._thread.start()

    @property
    def is_followed(self) -> bool:
        """Whether a thread keeps the records up to date."""
        is_ending = self.failure is not None or self.watch.is_closed
        return self._thread.is_alive() and not is_ending

    def close(self) -> None:
        self._closed.set()
        self.watch.close()
        self._thread.join(1.0)

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException as error:
            log.exception("the cache of peers has ended")
            self.failure = error
            self.listed.set()
            self.watch.close()

    def _follow(self) -> None:
        while not self._closed.is_set():
            try:
                events = self.watch.take()
            except RegistryError as error:  # access is refused, which an operator can change
                log.warning("the cache of peers is not current: %s", error)
                self._closed.wait(_AUTH_RETRY_INTERVAL_S)
                continue
            if events is None:
                return
            if events:
                self._apply(events)
            if self.watch.confirmed_at_s > 0:
                self.listed.set()

    def _apply(self, events: list[Event]) -> None:
        by_peer_id = dict(self.by_peer_id)
        for event in events:
            peer_id = event.record.peer_id
            if not isinstance(event, Left):
                by_peer_id[peer_id] = event.record
            elif (other := self.watch.last_known(peer_id)) is not None:
                by_peer_id[peer_id] = other
            else:
                by_peer_id.pop(peer_id, None)
        if by_peer_id.keys() != self.by_peer_id.keys():
            self._peer_ids = sorted(by_peer_id)  # a dict keeps its order, so this is nearly sorted
        self.by_peer_id = by_peer_id
        self.records = tuple(map(by_peer_id.__getitem__, self._peer_ids))
