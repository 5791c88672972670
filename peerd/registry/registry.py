"""The public interface of the registry. No type of gRPC or etcd3 comes out of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any
from weakref import WeakSet

from peerd.registry.cache import Cache, Snapshot
from peerd.registry.claim import Claim
from peerd.registry.etcd import Etcd
from peerd.registry.records import PeerRecord, RecordReader, select
from peerd.registry.session import Session, SessionState
from peerd.registry.watch import Joined, Left, Updated, Watch
from peerd.settings import (
    ANONYMOUS,
    DEFAULT_ENDPOINT,
    DEFAULT_PREFIX,
    EtcdAccess,
    RegistrySettings,
)

__all__ = [
    "Cache",
    "EtcdAccess",
    "Joined",
    "Left",
    "Listing",
    "Registration",
    "Registry",
    "SessionState",
    "Updated",
    "Watch",
    "nodes",
]


@dataclass(frozen=True)
class Listing:
    """What ``Registry.scan`` returns."""

    records: tuple[PeerRecord, ...]
    """Sorted by peer id."""

    skipped: int
    """The number of values below the prefix that are no record, or name another peer id than their key."""


def nodes(
    endpoint: str | None = None, prefix: str | None = None, *, access: EtcdAccess = ANONYMOUS
) -> list[PeerRecord]:
    """All peers, sorted by peer id, over a connection for this one call.

    ``endpoint`` and ``prefix`` default to ``PEERD_ETCD`` and ``PEERD_PREFIX``, then to
    ``http://localhost:23790`` and ``peerd``. Raises the errors of ``Registry.nodes``.
    """
    endpoint = endpoint or os.environ.get("PEERD_ETCD") or DEFAULT_ENDPOINT
    prefix = prefix or os.environ.get("PEERD_PREFIX") or DEFAULT_PREFIX
    with Registry(endpoint, prefix, access=access) as registry:
        return registry.nodes()


class Registry:
    """The peers below one prefix of one etcd. A context manager; thread-safe.

    ``endpoint`` names one member or several (``http://a:2379,http://b:2379``): any member that answers is
    used, and one that stops answering is abandoned within 3 s.

    The constructor does not connect. Each method except ``close`` raises RegistryUnavailableError if etcd
    does not answer within ``timeout_s`` seconds, another RegistryError if etcd refuses, and RuntimeError in
    a forked child or after ``close``.

    ``on_state`` is called with each new state of the session, in the thread that notices it: it must not
    block. Without registrations etcd is not asked, and the state does not change.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        prefix: str = DEFAULT_PREFIX,
        *,
        access: EtcdAccess = ANONYMOUS,
        lease_ttl_s: int = 10,
        timeout_s: float = 5.0,
        on_state: Callable[[SessionState], None] | None = None,
        owner_pid: int | None = None,
    ) -> None:
        """Raises SettingsError for an endpoint, a prefix or a TTL that cannot work.

        ``owner_pid``: the process on whose behalf this one registers; None: itself. Once the owner has died
        without closing its registrations, a successor for the same address takes them over immediately.
        """
        RegistrySettings(endpoint=endpoint, access=access, prefix=prefix, lease_ttl_s=lease_ttl_s)
        self._folder = f"{prefix}/".encode()
        self._reader = RecordReader(self._folder)
        self._etcd = Etcd(endpoint, timeout_s, access)
        self._session = Session(self._etcd, lease_ttl_s, on_state, owner_pid or os.getpid())
        # The last listing. A program that lists repeatedly finds most of it unchanged.
        self._listing_lock = threading.Lock()
        self._last_values: dict[bytes, bytes] = {}
        self._last_records: dict[bytes, PeerRecord] = {}
        self._last_listing = Listing((), skipped=0)
        self._watches: WeakSet[Watch] = WeakSet()
        self._snapshot: Snapshot | None = None
        self._caches = 0
        self._cache_lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """The URL of the member in use."""
        return self._etcd.members.url

    @property
    def state(self) -> SessionState:
        """Whether etcd answers and this Registry's own records are in etcd."""
        return self._session.state

    def nodes(
        self,
        *,
        partition_key: str | None = None,
        protocol: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        serializable: bool = False,
    ) -> list[PeerRecord]:
        """All peers that match every argument, sorted by peer id (metadata: each of its items).

        ``serializable``: any member may answer from its own state, which may be old. This works also while
        the cluster has no majority.
        """
        records = self.scan(serializable=serializable).records
        return select(records, partition_key, protocol, metadata)

    def scan(self, *, serializable: bool = False) -> Listing:
        """All peers at one revision of etcd, and the number of values that are no record."""
        self._session.check_usable()
        values = self._etcd.values(self._folder, serializable=serializable)
        with self._listing_lock:
            if values != self._last_values:
                self._last_listing = self._parse(values)
            return self._last_listing

    def _parse(self, values: dict[bytes, bytes]) -> Listing:
        records: dict[bytes, PeerRecord] = {}
        for key, value in values.items():
            unchanged = self._last_values.get(key) == value
            record = self._last_records.get(key) if unchanged else None
            record = record or self._reader.read(key, value)
            if record is not None:
                records[key] = record
        self._last_values, self._last_records = values, records
        in_order = sorted(records.values(), key=attrgetter("peer_id"))
        return Listing(tuple(in_order), skipped=len(values) - len(records))

    def watch(self) -> Watch:
        """The present peers, then every change; see :class:`Watch`."""
        self._session.check_usable()
        watch = Watch(self._etcd, self._folder, self._reader, self._session.check_process)
        self._watches.add(watch)
        return watch

    def cache(self) -> Cache:
        """A live copy of all peers; see :class:`Cache`. Does not wait for the first list."""
        self._session.check_usable()
        with self._cache_lock:
            if self._snapshot is None:
                self._snapshot = Snapshot(self.watch())
            self._caches += 1
            return Cache(self._snapshot, self._session.check_process, self._release_cache)

    def _release_cache(self) -> None:
        if not self._session.is_of_this_process:
            return
        with self._cache_lock:
            self._caches -= 1
            snapshot = None
            if self._caches == 0:
                snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None:
            snapshot.close()

    def register(
        self,
        record: PeerRecord,
        *,
        adopt_lease_id: int = 0,
        on_lease: Callable[[int], None] | None = None,
    ) -> Registration:
        """Put the record under a lease and keep it in etcd until the registration is closed.

        Raises PeerConflictError, which names the holder, if the peer id belongs to another live lease.

        ``adopt_lease_id``: the lease of a predecessor that died. If it is alive, it is used further, so that
        the record does not disappear; if not, a new one is granted. ``on_lease`` is called with the lease
        id before the record is put under it, now and after each loss: a program that writes it down enables
        a successor to adopt it. The session's thread calls it, too, so it must not block.
        """
        key = self._folder + record.peer_id.encode()
        claim = self._session.register(key, record, adopt_lease_id, on_lease)
        return Registration(self._session, claim)

    def revoke(self, lease_id: int) -> None:
        """Revoke an abandoned lease, and with it its record. A lease that is gone is no error."""
        self._session.check_usable()
        self._etcd.revoke([lease_id])

    def close(self) -> None:
        """Remove all records that were registered here, and close the connection.

        Never raises and takes no longer than about ``timeout_s``: if etcd is unreachable, the TTL removes
        the records. Does nothing in a forked child.
        """
        if self._session.is_of_this_process:
            for watch in [*self._watches]:
                watch.close()
        self._session.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Registration:
    """A record in etcd, until ``close()``. A context manager. Made by ``Registry.register``."""

    def __init__(self, session: Session, claim: Claim) -> None:
        self._session = session
        self._claim = claim

    @property
    def record(self) -> PeerRecord:
        """The record as it was last put: registered, or updated with success."""
        return self._claim.record

    def update(
        self,
        *,
        metadata: Mapping[str, Any] | None = None,
        partition_key: str | None = None,
    ) -> PeerRecord:
        """Change the given fields, under the same lease, if the record in etcd is still ours.

        Returns the new record. Raises InvalidRecordError for values that cannot be stored,
        PeerConflictError if another process has put the key meanwhile, RegistryUnavailableError if etcd
        does not answer (either record may be in etcd then: try again) or the record has just been lost,
        RuntimeError after ``close()`` and in a forked child.
        """
        changes: dict[str, Any] = {}
        if metadata is not None:
            changes["metadata"] = metadata
        if partition_key is not None:
            changes["partition_key"] = partition_key
        return self._session.update(self._claim, replace(self._claim.record, **changes))

    @property
    def registered(self) -> bool:
        """Whether the record is in etcd: it was put, and its lease cannot have expired yet.

        A record that was removed or overwritten by hand is noticed within one round of keep-alives.
        """
        self._session.check_process()
        return self._claim.holds

    @property
    def registered_until_s(self) -> float:
        """When the lease expires on the monotonic clock unless it is refreshed; 0 for no record."""
        return self._claim.holds_until_s

    @property
    def lease_id(self) -> int:
        """0 if there is none."""
        self._session.check_process()
        lease = self._claim.lease
        return 0 if lease is None else lease.lease_id

    @property
    def conflict(self) -> str:
        """Describes the process that holds the key instead; empty without a conflict."""
        return self._claim.conflict

    def close(self) -> None:
        """Remove the record, by revoking its lease. If etcd is unreachable, the TTL removes it.

        Never raises, takes no longer than about the registry's timeout, does nothing in a forked child.
        """
        self._session.withdraw([self._claim])

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
