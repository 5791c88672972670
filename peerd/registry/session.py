"""Keeps records in etcd for as long as their owners want them there.

A record lives under a lease of its own, and etcd removes it when the lease is not refreshed for its
TTL. One thread refreshes all leases of a Session, over one stream, at a third of the TTL, so that two
rounds may fail before a record goes. What can go wrong, and what follows:

    no answer            SUSPENDED: the leases may live, nobody knows. Asked again every 0.5 s.
    TTL 0, or no answer  LOST: the record is gone, or about to go. A new lease and the record again as
    for a whole TTL      soon as etcd answers, then CONNECTED.
    the key was taken    The registration's ``conflict`` says by whom, and each second it is tried
    meanwhile            again. This is no state: etcd answers, and the other records are well.

A TTL is measured on the monotonic clock from the moment before the question was sent. etcd begins
later and is never early, so ``registered`` ends before the record does.

Claiming a key is a transaction that creates it. Where it exists already, its lease tells who put it.
One of our own: an earlier attempt whose answer was lost, or the predecessor whose lease was adopted.
None: a leftover, such as FaasNet leaves. One whose owner, a process of this machine, has died
(owner.py) and that has our address: the predecessor that nobody told us of. All these are replaced, by
compare-and-swap on the revision that was seen. Any other: somebody lives there, PeerConflictError.

etcd is never called under ``_lock``, which guards the books. ``_claiming`` is held for each claim of
the thread, so that a withdrawn record does not come back from a claim that was under way.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from peerd.errors import (
    InvalidRecordError,
    PeerConflictError,
    RegistryError,
    RegistryUnavailableError,
)
from peerd.registry.etcd import Etcd, KeyValue, Lease, LeaseNotFoundError
from peerd.registry.owner import Owner
from peerd.registry.records import PeerRecord

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_CONFLICT_RETRY_S = 1.0
_WARN_EVERY_S = 60.0
_LONGEST_WAIT_S = 3600.0

_CLAIM_ATTEMPTS = 5
"""Each one fails only if the key or the lease went between two calls. So often is no accident."""

_SHORTEST_REVOKE_S = 0.1
_MOST_UNANSWERED = 10_000


class SessionState(Enum):
    """What is known about the records of a Registry. Passed to its ``on_state``."""

    CONNECTED = "connected"
    SUSPENDED = "suspended"
    LOST = "lost"


class Registration:
    """A record in etcd, until ``close()``. A context manager. Made by ``Registry.register``."""

    def __init__(
        self, session: Session, key: bytes, record: PeerRecord, on_lease: Callable[[int], None]
    ) -> None:
        self._session = session
        self._record = record
        self._key = key
        self._value = session.owner.put_into(record.to_json())
        self._on_lease = on_lease
        self._lease: _HeldLease | None = None
        self._own_lease_ids: deque[int] = deque(maxlen=8)  # the former ones, too
        self._put = False
        self._conflict = ""
        self._retry_at_s = 0.0
        self._closed = False

    @property
    def record(self) -> PeerRecord:
        """The record as it was last registered or updated."""
        return self._record

    def update(
        self,
        *,
        metadata: Mapping[str, Any] | None = None,
        partition_key: str | None = None,
    ) -> PeerRecord:
        """Changes what is given, under the same lease, if the record in etcd is still ours.

        Returns the new record. Raises InvalidRecordError for what cannot be stored, PeerConflictError
        when somebody else has put the key meanwhile, RegistryUnavailableError when etcd does not
        answer (then either may stand there; ask again) or the record is lost just now, RuntimeError
        after ``close()`` and in a forked child.
        """
        changes: dict[str, Any] = {}
        if metadata is not None:
            changes["metadata"] = metadata
        if partition_key is not None:
            changes["partition_key"] = partition_key
        return self._session.update(self, replace(self._record, **changes))

    @property
    def registered(self) -> bool:
        """Whether the record is in etcd: it was put, and its lease cannot have run out yet."""
        self._session.check_process()
        return self._stands

    @property
    def lease_id(self) -> int:
        """0 while there is none."""
        self._session.check_process()
        lease = self._lease
        return 0 if lease is None else lease.lease_id

    @property
    def conflict(self) -> str:
        """Who took the key after our lease was lost; empty when nobody did."""
        return self._conflict

    def close(self) -> None:
        """Removes the record, by revoking its lease. When etcd is away, the TTL removes it.

        Never raises, takes no longer than about the registry's timeout, does nothing in a forked child.
        """
        self._session.withdraw([self])

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def registered_until_s(self) -> float:
        """When the lease runs out on the monotonic clock if it is not refreshed; 0 for no record."""
        lease = self._lease
        return lease.ends_at_s if self._put and lease is not None else 0.0

    @property
    def _stands(self) -> bool:
        lease = self._lease
        return self._put and lease is not None and lease.lives


class Session:
    """All registrations of one Registry, and the thread that keeps them. Owns the Etcd."""

    def __init__(
        self,
        etcd: Etcd,
        lease_ttl_s: int,
        on_state: Callable[[SessionState], None] | None,
        owner_pid: int,
    ) -> None:
        self.owner = Owner.of_process(owner_pid)
        self._etcd = etcd
        self._lease_ttl_s = lease_ttl_s
        self._on_state = on_state
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._claiming = threading.Lock()
        self._telling = threading.RLock()  # reentrant, as a listener may register or close
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._registrations: set[Registration] = set()
        # By key, our leases when etcd did not answer a registering or a withdrawal. A record that is
        # found under one of them later is no conflict.
        self._unanswered: dict[bytes, Collection[int]] = {}
        self._refresh_at_s = math.inf
        self._round_jitter = _jitter()
        self._answered = False
        self._state = SessionState.SUSPENDED
        self._warn_at_s = 0.0

    @property
    def state(self) -> SessionState:
        """SUSPENDED until etcd first answers. Without registrations nobody asks, and it stays."""
        return self._state

    @property
    def is_of_this_process(self) -> bool:
        """False in a forked child, where the thread is missing and gRPC would hang."""
        return os.getpid() == self._pid

    def check_process(self) -> None:
        """Raises RuntimeError in a forked child."""
        if not self.is_of_this_process:
            raise RuntimeError(
                f"this Registry belongs to process {self._pid} and does not work in its forked "
                f"child {os.getpid()}: open another one there"
            )

    def check_usable(self) -> None:
        """Raises RuntimeError in a forked child, and after ``close()``."""
        self.check_process()
        if self._closing:
            raise RuntimeError("this Registry is closed: open another one")

    def register(
        self,
        key: bytes,
        record: PeerRecord,
        adopt_lease_id: int = 0,
        on_lease: Callable[[int], None] | None = None,
    ) -> Registration:
        """See ``Registry.register``."""
        self.check_usable()
        registration = Registration(self, key, record, on_lease or (lambda lease_id: None))
        registration._own_lease_ids.extend(self._unanswered.pop(key, ()))
        if registration._own_lease_ids and not adopt_lease_id:
            adopt_lease_id = registration._own_lease_ids[-1]
        try:
            if adopt_lease_id:
                self._adopt(registration, adopt_lease_id)
            self._claim(registration)
        except RegistryUnavailableError:
            self._remember([registration])
            self._heard(answered=False)
            raise
        except BaseException:
            # Not an adopted one: it turned out to be of no use here, and may hold another's key.
            lease = registration._lease
            if lease is not None and lease.lease_id != adopt_lease_id:
                self._revoke([lease.lease_id], self._etcd.timeout_s)
            raise
        with self._lock:
            self.check_usable()  # closed meanwhile: the record is left to its TTL
            self._registrations.add(registration)
            for lease in self._live_leases():
                self._expect_refresh(lease)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._keep, name="peerd-registry", daemon=True
                )
                self._thread.start()
        self._wake.set()
        self._heard(answered=True)
        return registration

    def update(self, registration: Registration, record: PeerRecord) -> PeerRecord:
        """See ``Registration.update``."""
        self.check_usable()
        value = self.owner.put_into(record.to_json())
        with self._claiming:
            if registration._closed:
                raise RuntimeError(f"the registration of {record.peer_id!r} is closed")
            self._replace(registration, value)
            registration._record, registration._value = record, value
        return record

    def _replace(self, registration: Registration, value: bytes) -> None:
        """With ``_claiming`` held. Again where only the answer of an attempt before was lost."""
        key, lease = registration._key, registration._lease
        for _ in range(_CLAIM_ATTEMPTS):
            found = self._etcd.get(key)
            if lease is None or found is None:
                raise RegistryUnavailableError(
                    f"{key.decode()} is not in etcd at {self._etcd.urls} now: it is put again soon, "
                    "and can be updated then"
                )
            if found.lease_id != lease.lease_id:
                raise PeerConflictError(_who_holds(registration.record, found))
            if found.value == value or self._etcd.replace(
                key, value, lease.lease_id, found.mod_revision
            ):
                return
        raise RegistryUnavailableError(
            f"{key.decode()} in etcd at {self._etcd.urls} changed under each of {_CLAIM_ATTEMPTS} "
            "attempts to update it: see who else writes it"
        )

    def withdraw(
        self, registrations: Iterable[Registration], timeout_s: float | None = None
    ) -> None:
        """Revokes their leases, all at once. Never raises. In a forked child it does nothing."""
        if not self.is_of_this_process:
            return  # they are the parent's
        deadline_s = time.monotonic() + (timeout_s or self._etcd.timeout_s)
        with self._lock:
            registrations = list(registrations)
            for registration in registrations:
                registration._closed = True
            self._registrations.difference_update(registrations)
        # A claim under way comes first, so that the lease which it takes is revoked as well.
        waited = self._claiming.acquire(timeout=max(deadline_s - time.monotonic(), 0.0))
        lease_ids = []
        for registration in registrations:
            lease, registration._lease = registration._lease, None
            if lease is not None:
                lease_ids.append(lease.lease_id)
        if waited:
            self._claiming.release()
        timeout_s = max(deadline_s - time.monotonic(), _SHORTEST_REVOKE_S)
        if not self._revoke(lease_ids, timeout_s):
            self._remember(registrations)
        self._tell_state()

    def close(self) -> None:
        """Withdraws all, ends the thread, closes the connection: within about the timeout, always.

        Never raises. In a forked child it does nothing.
        """
        if self._closing or not self.is_of_this_process:
            return
        deadline_s = time.monotonic() + self._etcd.timeout_s
        with self._lock:
            self._closing = True
        self._wake.set()
        thread = self._thread
        if thread is threading.current_thread():  # a listener closes: the thread ends after it
            thread = None
        if thread is not None:
            thread.join(self._etcd.timeout_s / 4)  # no time at all, unless etcd hangs
        self.withdraw(self._registrations, max(deadline_s - time.monotonic(), _SHORTEST_REVOKE_S))
        self._etcd.close()  # and with it a call that the thread may still be in
        if thread is not None:
            thread.join(1.0)
            if thread.is_alive():
                log.warning("the registry's thread does not end: it is in on_state or on_lease")

    # Claiming a key

    def _adopt(self, registration: Registration, lease_id: int) -> None:
        registration._own_lease_ids.append(lease_id)
        asked_at_s = time.monotonic()
        for lease in self._etcd.keep_alive([lease_id]):
            if lease.ttl_s > 0:
                self._hold(registration, lease, asked_at_s)

    def _claim(self, registration: Registration) -> None:
        """Puts the record under a live lease of ours. Raises PeerConflictError, or RegistryError."""
        key, value = registration._key, registration._value
        for _ in range(_CLAIM_ATTEMPTS):
            lease = registration._lease
            if lease is None or not lease.lives:
                asked_at_s = time.monotonic()
                granted = self._etcd.grant(self._lease_ttl_s)
                lease = self._hold(registration, granted, asked_at_s)
            try:
                found = self._etcd.create(key, value, lease.lease_id)
                if found is not None:
                    if not _is_free(registration, found):
                        raise PeerConflictError(_who_holds(registration.record, found))
                    if not self._is_it(registration, lease, found) and not (
                        self._etcd.replace(key, value, lease.lease_id, found.mod_revision)
                    ):
                        continue
            except LeaseNotFoundError:
                lease.ends_at_s = 0.0
            else:
                registration._put = True
                return
        raise RegistryUnavailableError(
            f"{key.decode()} in etcd at {self._etcd.urls} changed under each of {_CLAIM_ATTEMPTS} "
            "attempts to put it: see who else writes it"
        )

    def _is_it(self, registration: Registration, lease: _HeldLease, found: KeyValue) -> bool:
        """Whether that is our record already. An adopted one keeps the time since when it is there."""
        owner = Owner.in_value(found.value)
        return (
            found.lease_id == lease.lease_id
            and owner is not None
            and owner.is_same_process(self.owner)
            and owner.put_into(registration.record.to_json()) == found.value
        )

    def _hold(self, registration: Registration, lease: Lease, asked_at_s: float) -> _HeldLease:
        held = _HeldLease(lease.lease_id, lease.ttl_s, asked_at_s + lease.ttl_s)
        registration._lease = held
        registration._own_lease_ids.append(lease.lease_id)
        registration._put = False
        # Before the key is put: whoever writes the lease down there finds every record again.
        registration._on_lease(lease.lease_id)
        return held

    def _revoke(self, lease_ids: list[int], timeout_s: float) -> bool:
        try:
            if lease_ids:
                self._etcd.revoke(lease_ids, timeout_s)
        except RegistryError as error:
            log.info("%d records are left to their TTL: %s", len(lease_ids), error)
            return False
        return True

    def _remember(self, registrations: Iterable[Registration]) -> None:
        with self._lock:
            for registration in registrations:
                self._unanswered[registration._key] = registration._own_lease_ids
            while len(self._unanswered) > _MOST_UNANSWERED:
                del self._unanswered[next(iter(self._unanswered))]  # the oldest

    # The thread

    def _keep(self) -> None:
        while not self._closing:
            try:
                self._refresh()
                self._restore()
                due_s = self._due_s()
            except Exception as error:  # on_lease may raise anything, and the thread must go on
                self._failed(error)
                self._refresh_at_s = due_s = time.monotonic() + _RETRY_S * _jitter()
            self._wake.wait(min(max(due_s - time.monotonic(), 0.0), _LONGEST_WAIT_S))
            self._wake.clear()

    def _refresh(self) -> None:
        """One round of keep-alives, if it is time."""
        now_s = time.monotonic()
        if now_s < self._refresh_at_s:
            return
        held: defaultdict[int, list[_HeldLease]] = defaultdict(list)
        with self._lock:
            for lease in self._live_leases():
                held[lease.lease_id].append(
                    lease
                )  # two registrations where one adopted the other's
        if held:
            shortest_s = min(lease.ttl_s for leases in held.values() for lease in leases)
            timeout_s = min(self._etcd.timeout_s, max(shortest_s / 3, _RETRY_S))
            for lease_id, ttl_s in self._etcd.keep_alive(held, timeout_s):
                for lease in held[lease_id]:
                    lease.ends_at_s = now_s + ttl_s if ttl_s > 0 else 0.0
            self._answered = True
        with self._lock:
            self._refresh_at_s = math.inf
            # One for all: the earliest of a thousand drawn ones would be the same each time.
            self._round_jitter = _jitter()
            for lease in self._live_leases():
                self._expect_refresh(lease)

    def _restore(self) -> None:
        """Claims again what was lost, until it is time for keep-alives."""
        self._tell_state()
        now_s = time.monotonic()
        with self._lock:
            lost = [r for r in self._registrations if not r._stands and r._retry_at_s <= now_s]
        for registration in lost:
            if time.monotonic() >= self._refresh_at_s:
                break
            with self._claiming:
                if self._closing:
                    return
                if not registration._closed:
                    self._claim_again(registration)
        self._tell_state()

    def _claim_again(self, registration: Registration) -> None:
        peer_id = registration.record.peer_id
        try:
            self._claim(registration)
        except PeerConflictError as error:
            if not registration._conflict:
                log.warning("%s", error)
            registration._conflict = str(error)
            registration._retry_at_s = time.monotonic() + _CONFLICT_RETRY_S * _jitter()
        else:
            log.info("peer=%s: registered again, under a new lease", peer_id)
            registration._conflict = ""
        self._answered = True
        with self._lock:
            if registration._lease is not None:
                self._expect_refresh(registration._lease)

    def _live_leases(self) -> list[_HeldLease]:
        """With ``_lock`` held."""
        leases = (registration._lease for registration in self._registrations)
        return [lease for lease in leases if lease is not None and lease.lives]

    def _expect_refresh(self, lease: _HeldLease) -> None:
        """With ``_lock`` held: the next round is not later than this lease needs it."""
        at_s = time.monotonic() + lease.ttl_s / 3 * self._round_jitter
        self._refresh_at_s = min(self._refresh_at_s, at_s)

    def _due_s(self) -> float:
        with self._lock:
            retries_s = (r._retry_at_s for r in self._registrations if not r._stands)
            return min(self._refresh_at_s, *retries_s, math.inf)

    def _failed(self, error: Exception) -> None:
        if self._closing:
            return
        now_s = time.monotonic()
        level = logging.DEBUG
        if now_s >= self._warn_at_s:
            level = logging.WARNING
            self._warn_at_s = now_s + _WARN_EVERY_S
        if isinstance(error, RegistryError):
            log.log(level, "%s", error)
            self._heard(answered=False)
        else:
            log.log(level, "a record cannot be put: on_lease raised", exc_info=error)

    # What listeners are told

    def _heard(self, answered: bool) -> None:
        self._answered = answered
        self._tell_state()

    def _tell_state(self) -> None:
        with self._telling:
            with self._lock:
                lost = any(not r._stands and not r._conflict for r in self._registrations)
            if lost:
                state = SessionState.LOST
            else:
                state = SessionState.CONNECTED if self._answered else SessionState.SUSPENDED
            if state is self._state:
                return
            self._state = state
            log.info("etcd at %s: %s", self._etcd.urls, state.value)
            if self._on_state is not None:
                try:
                    self._on_state(state)
                except Exception:
                    log.exception("on_state raised")


@dataclass
class _HeldLease:
    lease_id: int
    ttl_s: int
    ends_at_s: float
    """On the monotonic clock; 0 once etcd has said that it is gone."""

    @property
    def lives(self) -> bool:
        return time.monotonic() < self.ends_at_s


def _jitter() -> float:
    """So that a thousand processes that lost etcd at once do not come back at once."""
    return random.uniform(0.8, 1.0)


def _is_free(registration: Registration, found: KeyValue) -> bool:
    """Whether the key may be taken from whoever put what was found there."""
    if not found.lease_id or found.lease_id in registration._own_lease_ids:
        return True
    owner = Owner.in_value(found.value)
    try:
        theirs = PeerRecord.from_json(found.value)
    except InvalidRecordError:
        return False
    ours = registration.record
    return (
        owner is not None
        and owner.has_died()
        and (ours.url, ours.port, ours.protocol) == (theirs.url, theirs.port, theirs.protocol)
    )


def _who_holds(record: PeerRecord, found: KeyValue) -> str:
    try:
        holder = PeerRecord.from_json(found.value)
        who = f"{holder.url}:{holder.port}"
    except InvalidRecordError:
        who = "a value that is no record"
    owner = Owner.in_value(found.value)
    if owner is not None:
        who += f" (process {owner.pid} on {owner.host}, since {owner.since})"
    return (
        f"peer id {record.peer_id!r} belongs to {who} under the live lease {found.lease_id:x}: "
        "choose another one, or wait until that peer is gone"
    )
