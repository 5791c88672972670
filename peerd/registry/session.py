"""Keeps records in etcd for as long as their owner wants them there.

A record lives under a lease of its own, and etcd removes it when the lease is not refreshed for its
TTL. One thread refreshes all leases of a Session, over one stream, at a third of the TTL, so two
rounds may fail before a record goes. What can go wrong, and what follows:

    no answer             SUSPENDED: the leases may live, nothing is known. Asked again every 0.5 s.
    "TTL 0", or no answer LOST: the record is gone, or about to go. A new lease and the record again,
    for the whole TTL     as soon as etcd answers; then CONNECTED.
    the key was taken     The registration's ``conflict`` says by whom; tried again every second. That
    meanwhile             is no state: etcd answers, and the other records are well.

etcd's own measure of a TTL begins when a refresh reaches it and never ends early, so the one here, on
the monotonic clock from the moment before the question was sent, ends first: ``registered`` is never
true for a record that etcd has let go.

Claiming a key is one transaction that creates it. Where that finds the key, it is looked at who put
it there. Our own lease: an earlier attempt whose answer was lost, or the predecessor whose lease we
adopt. No lease: a leftover, such as FaasNet leaves; both are replaced, by compare-and-swap on the
revision that was seen. Any other lease: somebody lives there, PeerConflictError.

Calls to etcd are made outside of ``_lock``, which guards only the books. ``_claiming`` is held over
the claims of the thread, so that a withdrawn record cannot come back from a claim under way.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType

from peerd.errors import (
    InvalidRecordError,
    PeerConflictError,
    RegistryError,
    RegistryUnavailableError,
    SettingsError,
)
from peerd.registry.etcd import Etcd, KeyValue, LeaseNotFoundError
from peerd.registry.records import PeerRecord

log = logging.getLogger(__name__)

_RETRY_S = 0.5
"""Between two rounds while etcd does not answer."""

_CONFLICT_RETRY_S = 1.0
_WARN_EVERY_S = 60.0
_CLAIM_ATTEMPTS = 5
"""Each time, the key or the lease has changed between two calls: more than twice is no accident."""

_SHORTEST_TTL_S = 2
_LONGEST_TTL_S = 24 * 3600


class SessionState(Enum):
    CONNECTED = "connected"
    SUSPENDED = "suspended"
    LOST = "lost"


class Registration:
    """A record in etcd, until ``close()``. A context manager. Made by ``Registry.register``."""

    def __init__(
        self, session: Session, key: bytes, record: PeerRecord, on_lease: Callable[[int], None]
    ) -> None:
        self.record = record
        self._session = session
        self._key = key
        self._value = record.to_json()
        self._on_lease = on_lease
        self._lease: _Lease | None = None
        # The keys of our former leases are ours. The oldest are long gone.
        self._own_lease_ids: deque[int] = deque(maxlen=8)
        self._put = False
        self._closed = False
        self._conflict = ""
        self._retry_at_s = 0.0

    @property
    def registered(self) -> bool:
        """Whether the record is in etcd, as far as anyone can know: put, and its lease not over."""
        self._session.check_usable()
        lease = self._lease
        return self._put and lease is not None and lease.lives

    @property
    def lease_id(self) -> int:
        """0 when there is none at the moment."""
        self._session.check_usable()
        lease = self._lease
        return 0 if lease is None else lease.lease_id

    @property
    def conflict(self) -> str:
        """Who took the key while our lease was lost; empty when nobody did."""
        return self._conflict

    def close(self) -> None:
        """Removes the record by revoking its lease. When etcd is away, the TTL removes it.

        Raises nothing, and takes no longer than the registry's timeout.
        """
        self._session.withdraw([self])

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Session:
    """All registrations of one Registry. Its thread starts with the first one."""

    def __init__(
        self,
        etcd: Etcd,
        lease_ttl_s: int,
        on_state: Callable[[SessionState], None] | None = None,
    ) -> None:
        if not _SHORTEST_TTL_S <= lease_ttl_s <= _LONGEST_TTL_S:
            raise SettingsError(
                f"lease TTL of {lease_ttl_s} s: allowed are {_SHORTEST_TTL_S} s (etcd grants 2 for "
                f"1) to {_LONGEST_TTL_S} s (a dead peer is listed for as long as this)"
            )
        self._etcd = etcd
        self._lease_ttl_s = lease_ttl_s
        self._on_state = on_state
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._telling = threading.RLock()  # states are told in order; a listener may register
        self._claiming = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._registrations: set[Registration] = set()
        self._unsure: dict[bytes, int] = {}
        """The leases of attempts that ended without an answer, by key: the record may be there."""

        self._refresh_at_s = 0.0
        self._answered = False
        self._state = SessionState.SUSPENDED
        self._warn_at_s = 0.0

    @property
    def state(self) -> SessionState:
        """SUSPENDED until the first registration. Without any it stays as it last was."""
        return self._state

    def check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this registry was opened in process {self._pid}, and its connection and thread "
                "did not survive the fork: open one in this process"
            )
        if self._closing:
            raise RuntimeError("this registry is closed: open another")

    def register(
        self,
        key: bytes,
        record: PeerRecord,
        adopt_lease_id: int = 0,
        on_lease: Callable[[int], None] | None = None,
    ) -> Registration:
        """See ``Registry.register``."""
        self.check_usable()
        registration = Registration(self, key, record, on_lease or _ignore)
        adopted = adopt_lease_id or self._unsure.get(key, 0)
        try:
            if adopted:
                self._adopt(registration, adopted)
            self._claim(registration)
        except PeerConflictError:
            self._heard(answered=True)
            self._drop_unused_lease(registration, adopted)
            raise
        except RegistryError:
            self._heard(answered=False)
            if registration._lease is not None:
                self._unsure[key] = registration._lease.lease_id
            raise
        self._unsure.pop(key, None)
        with self._lock:
            self._registrations.add(registration)
            self._refresh_at_s = min(self._refresh_at_s, self._next_refresh_s())
            if self._thread is None:
                self._refresh_at_s = self._next_refresh_s()
                self._thread = threading.Thread(
                    target=self._keep_alive, name="peerd-registry", daemon=True
                )
                self._thread.start()
        self._wake.set()
        self._heard(answered=True)
        return registration

    def withdraw(self, registrations: Iterable[Registration], timeout_s: float = 0.0) -> None:
        """Revokes their leases, all at once. In a forked child it does nothing: they are not its own."""
