"""The registry as a program sees it: records in, records out, every failure an error of ours."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from peerd.errors import InvalidRecordError
from peerd.registry.etcd import Etcd
from peerd.registry.records import PeerRecord
from peerd.registry.session import Registration, Session, SessionState
from peerd.settings import DEFAULT_ENDPOINT, DEFAULT_PREFIX, RegistrySettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    records: tuple[PeerRecord, ...]
    """Sorted by peer id."""

    skipped: int
    """Values below the prefix that are no record."""


def nodes(endpoint: str | None = None, prefix: str | None = None) -> list[PeerRecord]:
    """All peers, sorted by peer id, over a connection of this one call.

    What is not given comes from ``PEERD_ETCD`` and ``PEERD_PREFIX``, then from the defaults.
    """
    endpoint = endpoint or os.environ.get("PEERD_ETCD") or DEFAULT_ENDPOINT
    prefix = prefix or os.environ.get("PEERD_PREFIX") or DEFAULT_PREFIX
    with Registry(endpoint, prefix) as registry:
        return registry.nodes()


class Registry:
    """The peers below one prefix of one etcd. A context manager; usable from any thread.

    Making one does not connect. Each method but ``close`` raises RegistryUnavailableError when etcd
    does not answer within ``timeout_s``, another RegistryError when it refuses, and RuntimeError in a
    forked child or after ``close``.

    ``on_state`` is told each change of the session's state, in the thread that notices it: it must
    not block. Without registrations nobody asks etcd, and the state stays as it was.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        prefix: str = DEFAULT_PREFIX,
        *,
        lease_ttl_s: int = 10,
        timeout_s: float = 5.0,
        on_state: Callable[[SessionState], None] | None = None,
    ) -> None:
        """Raises SettingsError for an endpoint, a prefix or a TTL that cannot work."""
        RegistrySettings(endpoint=endpoint, prefix=prefix, lease_ttl_s=lease_ttl_s)
        self._folder = f"{prefix}/".encode()
        self._etcd = Etcd(endpoint, timeout_s)
        self._session = Session(self._etcd, lease_ttl_s, on_state)

    @property
    def state(self) -> SessionState:
        return self._session.state

    def nodes(self) -> list[PeerRecord]:
        """All peers, sorted by peer id."""
        return list(self.scan().records)

    def scan(self) -> Listing:
        """All peers at one revision of etcd, and how many values were no record."""
        self._session.check_usable()
        records = []
        items = self._etcd.list(self._folder).items
        for item in items:
            try:
                records.append(PeerRecord.from_json(item.value))
            except InvalidRecordError as error:
                log.debug("key=%r skipped: %s", item.key, error)
        records.sort(key=lambda record: record.peer_id)
        return Listing(tuple(records), skipped=len(items) - len(records))

    def register(
        self,
        record: PeerRecord,
        *,
        adopt_lease_id: int = 0,
        on_lease: Callable[[int], None] | None = None,
    ) -> Registration:
        """Puts the record under a lease and keeps it there until the registration is closed.

        Raises PeerConflictError, saying who, when the peer id belongs to another's live lease.

        ``adopt_lease_id``: the lease of a predecessor that died. If it still lives, it goes on being
        used, so the record does not disappear; if not, a new one is granted. ``on_lease`` is called
        with the lease id before the record is put under it, now and after each loss: written down,
        it is what a successor adopts. It is called from the session's thread too, and must not block.
        """
        key = self._folder + record.peer_id.encode()
        return self._session.register(key, record, adopt_lease_id, on_lease)

    def revoke(self, lease_id: int) -> None:
        """Ends a lease that nobody keeps any more, and its record. One that is gone is fine."""
        self._session.check_usable()
        self._etcd.revoke([lease_id])

    def close(self) -> None:
        """Removes all records that were registered here, at once, and closes the connection.

        Never raises and takes no longer than about ``timeout_s``: when etcd is away, the TTL removes
        them. In a forked child it does nothing.
        """
        self._session.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
