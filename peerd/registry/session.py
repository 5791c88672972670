"""Keeps records in etcd for as long as their registrations are open.

A record is stored under a lease of its own, and etcd removes it when the lease has not been refreshed for
its TTL. One thread per Session works in rounds, a third of the shortest TTL apart, so that two rounds may
fail before a record is lost. A round refreshes all leases over one stream and then compares the mod
revisions of the records' keys with those of our own last writes:

    no answer             SUSPENDED: the leases may be alive or not. Retried every 0.5 s.
    TTL 0, or no answer   LOST: the record is gone, or about to go. It is put again under a new lease as
    for a whole TTL       soon as etcd answers, then CONNECTED.
    record removed or     LOST: it is put again in the same round, under the same lease.
    overwritten
    key taken by a live   The claim's ``conflict`` names the holder, and it is retried every second. This
    owner meanwhile       does not change the state: etcd answers, and the other records are in place.

A TTL is measured on the monotonic clock from the moment before the request was sent. etcd starts later and
is never early, so ``registered`` becomes false before the record goes.

etcd is never called under ``_lock``, which guards the set of claims. ``_claiming`` is held during each
change or comparison of claims, so that a withdrawn record does not come back from a claim under way, and
an update is not mistaken for another writer's.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from enum import Enum

from peerd.errors import PeerConflictError, RegistryError, RegistryUnavailableError
from peerd.name_list import shortened
from peerd.registry.claim import Claim, Claimant, HeldLease
from peerd.registry.etcd import Etcd
from peerd.registry.owner import Owner
from peerd.registry.records import PeerRecord

log = logging.getLogger(__name__)

MAX_ROUND_INTERVAL_S = 10.0
"""Also with a TTL of hours, a record that was removed by hand is noticed within this time."""

_RETRY_INTERVAL_S = 0.5
_CONFLICT_RETRY_INTERVAL_S = 1.0
_WARN_INTERVAL_S = 60.0
_MAX_WAIT_S = 3600.0
_MIN_REVOKE_TIMEOUT_S = 0.1
_MAX_UNANSWERED = 10_000


class SessionState(Enum):
    """The state of a Registry's own records, as a whole. Passed to its ``on_state``."""

    CONNECTED = "connected"
    """etcd answers, and every record is in etcd or in conflict."""

    SUSPENDED = "suspended"
    """etcd does not answer. The records are in etcd as far as is known."""

    LOST = "lost"
    """At least one record is not in etcd. It will be put again as soon as etcd answers."""


class Session:
    """All claims of one Registry, and the thread that maintains them. Owns the Etcd."""

    def __init__(
        self,
        etcd: Etcd,
        lease_ttl_s: int,
        on_state: Callable[[SessionState], None] | None,
        owner_pid: int,
    ) -> None:
        self._owner = Owner.of_process(owner_pid)
        self._etcd = etcd
        self._claimant = Claimant(etcd, self._owner, lease_ttl_s)
        self._on_state = on_state
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._claiming = threading.Lock()
        self._notifying = threading.RLock()  # reentrant, because a listener may register or close
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._claims: set[Claim] = set()
        # By key, our leases when etcd did not answer a registration or a withdrawal. A record that is
        # found under one of them later is no conflict.
        self._unanswered: dict[bytes, Collection[int]] = {}
        self._refresh_at_s = math.inf
        self._round_jitter = _jitter()
        self._answered = False
        self._state = SessionState.SUSPENDED
        self._warn_at_s = 0.0

    @property
    def state(self) -> SessionState:
        """SUSPENDED until etcd first answers. Without registrations etcd is not asked."""
        return self._state

    @property
    def is_of_this_process(self) -> bool:
        """False in a forked child, which has no such thread and where gRPC would hang."""
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
    ) -> Claim:
        """See ``Registry.register``."""
        self.check_usable()
        claim = Claim(key, record, self._owner, on_lease or (lambda lease_id: None))
        claim.own_lease_ids.extend(self._unanswered.pop(key, ()))
        if claim.own_lease_ids and not adopt_lease_id:
            adopt_lease_id = claim.own_lease_ids[-1]
        try:
            if adopt_lease_id:
                self._claimant.adopt(claim, adopt_lease_id)
            self._claimant.put(claim)
        except RegistryUnavailableError:
            self._remember([claim])
            self._on_answer(answered=False)
            raise
        except BaseException:
            # Not an adopted lease: it is of no use here, but may hold another process's key.
            if claim.lease is not None and claim.lease.lease_id != adopt_lease_id:
                self._revoke([claim.lease.lease_id], self._etcd.members.timeout_s)
            raise
        with self._lock:
            self.check_usable()  # closed meanwhile: the record is left to its TTL
            self._claims.add(claim)
            for lease in self._live_leases():
                self._schedule_refresh(lease)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="peerd-registry", daemon=True)
                thread.start()
                self._thread = thread  # now that close() can join it: Ctrl-C may come in between
        self._wake.set()
        self._on_answer(answered=True)
        return claim

    def update(self, claim: Claim, record: PeerRecord) -> PeerRecord:
        """See ``Registration.update``."""
        self.check_usable()
        with self._claiming:
            if claim.closed:
                raise RuntimeError(f"the registration of {record.peer_id!r} is closed")
            try:
                self._claimant.update(claim, record)
            finally:
                if not claim.holds:
                    self._wake.set()
        return record

    def withdraw(self, claims: Iterable[Claim], timeout_s: float | None = None) -> None:
        """Revoke the leases of all claims in parallel. Never raises. Does nothing in a forked child."""
        if not self.is_of_this_process:
            return  # the records are the parent's
        deadline_s = time.monotonic() + (timeout_s or self._etcd.members.timeout_s)
        with self._lock:
            claims = list(claims)
            for claim in claims:
                claim.closed = True
            self._claims.difference_update(claims)
        # A claim under way is completed first, so that its new lease is revoked as well.
        acquired = self._claiming.acquire(timeout=max(deadline_s - time.monotonic(), 0.0))
        lease_ids = []
        for claim in claims:
            lease, claim.lease = claim.lease, None
            if lease is not None:
                lease_ids.append(lease.lease_id)
        if acquired:
            self._claiming.release()
        timeout_s = max(deadline_s - time.monotonic(), _MIN_REVOKE_TIMEOUT_S)
        if not self._revoke(lease_ids, timeout_s):
            self._remember(claims)
        self._notify_state()

    def close(self) -> None:
        """Withdraw all claims, end the thread, close the connection, all within about the timeout.

        Never raises. Does nothing in a forked child.
        """
        if self._closing or not self.is_of_this_process:
            return
        deadline_s = time.monotonic() + self._etcd.members.timeout_s
        with self._lock:
            self._closing = True
        self._wake.set()
        thread = self._thread
        # A listener closes, and the thread ends after it; or an interrupt came before the thread's start.
        if thread is threading.current_thread() or (thread is not None and not thread.is_alive()):
            thread = None
        if thread is not None:
            thread.join(self._etcd.members.timeout_s / 4)  # returns immediately unless etcd hangs
        self.withdraw(self._claims, max(deadline_s - time.monotonic(), _MIN_REVOKE_TIMEOUT_S))
        self._etcd.close()  # and with it a call that the thread may still be in
        if thread is not None:
            thread.join(1.0)
            if thread.is_alive():
                log.warning("the registry's thread does not end: it is in on_state or on_lease")

    def _revoke(self, lease_ids: list[int], timeout_s: float) -> bool:
        try:
            if lease_ids:
                self._etcd.revoke(lease_ids, timeout_s)
        except RegistryError as error:
            log.info("%d records are left to their TTL: %s", len(lease_ids), error)
            return False
        return True

    def _remember(self, claims: Iterable[Claim]) -> None:
        with self._lock:
            for claim in claims:
                self._unanswered[claim.key] = claim.own_lease_ids
            while len(self._unanswered) > _MAX_UNANSWERED:
                del self._unanswered[next(iter(self._unanswered))]  # the oldest

    # The thread

    def _run(self) -> None:
        while not self._closing:
            try:
                if time.monotonic() >= self._refresh_at_s:
                    self._refresh()
                self._restore()
                due_s = self._next_due_s()
            except Exception as error:  # on_lease may raise anything, and the thread must go on
                self._on_failure(error)
                self._refresh_at_s = due_s = time.monotonic() + _RETRY_INTERVAL_S * _jitter()
            self._wake.wait(min(max(due_s - time.monotonic(), 0.0), _MAX_WAIT_S))
            self._wake.clear()

    def _refresh(self) -> None:
        """One round: refresh the leases, then look for records that another writer has changed."""
        now_s = time.monotonic()
        held: defaultdict[int, list[HeldLease]] = defaultdict(list)
        with self._lock:
            for lease in self._live_leases():
                # Two claims hold one lease if the second adopted the lease of the first.
                held[lease.lease_id].append(lease)
        if held:
            shortest_s = min(lease.ttl_s for leases in held.values() for lease in leases)
            timeout_s = min(self._etcd.members.timeout_s, max(shortest_s / 3, _RETRY_INTERVAL_S))
            for lease_id, ttl_s in self._etcd.keep_alive(held, timeout_s):
                for lease in held[lease_id]:
                    lease.ends_at_s = now_s + ttl_s if ttl_s > 0 else 0.0
            self._compare(timeout_s)
            self._answered = True
        with self._lock:
            self._refresh_at_s = math.inf
            # One for the whole round: the minimum of a thousand draws would always be the same.
            self._round_jitter = _jitter()
            for lease in self._live_leases():
                self._schedule_refresh(lease)

    def _compare(self, timeout_s: float) -> None:
        """Mark the records that another writer has removed or overwritten as lost."""
        with self._claiming:
            with self._lock:
                holding = [claim for claim in self._claims if claim.holds]
            try:
                changed = self._claimant.find_changed(holding, timeout_s)
            except RegistryUnavailableError:
                raise
            except RegistryError as error:  # refused, such as without the permission to read a key
                log.log(self._warning_level(), "the records are not compared: %s", error)
                return
            for claim in changed:
                claim.mod_revision = 0
        if changed:
            names = sorted(claim.record.peer_id for claim in changed)
            log.warning(
                "removed or overwritten in etcd by another writer, and put again: %s",
                shortened(names),
            )

    def _restore(self) -> None:
        """Claim again what was lost, until the next round is due."""
        self._notify_state()
        now_s = time.monotonic()
        with self._lock:
            lost = [each for each in self._claims if not each.holds and each.retry_at_s <= now_s]
        for claim in lost:
            if time.monotonic() >= self._refresh_at_s:
                break
            with self._claiming:
                if self._closing:
                    return
                if not claim.closed:
                    self._claim_again(claim)
        self._notify_state()

    def _claim_again(self, claim: Claim) -> None:
        try:
            self._claimant.put(claim)
        except PeerConflictError as error:
            if not claim.conflict:
                log.warning("%s", error)
            claim.conflict = str(error)
            claim.retry_at_s = time.monotonic() + _CONFLICT_RETRY_INTERVAL_S * _jitter()
        else:
            log.info("peer=%s: registered again", claim.record.peer_id)
        self._answered = True
        with self._lock:
            if claim.lease is not None:
                self._schedule_refresh(claim.lease)

    def _live_leases(self) -> list[HeldLease]:
        """With ``_lock`` held."""
        leases = (claim.lease for claim in self._claims)
        return [lease for lease in leases if lease is not None and lease.is_alive]

    def _schedule_refresh(self, lease: HeldLease) -> None:
        """With ``_lock`` held: the next round is no later than this lease needs it."""
        interval_s = min(lease.ttl_s / 3, MAX_ROUND_INTERVAL_S) * self._round_jitter
        self._refresh_at_s = min(self._refresh_at_s, time.monotonic() + interval_s)

    def _next_due_s(self) -> float:
        with self._lock:
            retries_s = (claim.retry_at_s for claim in self._claims if not claim.holds)
            return min(self._refresh_at_s, *retries_s, math.inf)

    def _on_failure(self, error: Exception) -> None:
        if self._closing:
            return
        level = self._warning_level()
        if isinstance(error, RegistryError):
            log.log(level, "%s", error)
            self._on_answer(answered=False)
        else:
            log.log(level, "a record cannot be put: on_lease raised", exc_info=error)

    def _warning_level(self) -> int:
        now_s = time.monotonic()
        if now_s < self._warn_at_s:
            return logging.DEBUG
        self._warn_at_s = now_s + _WARN_INTERVAL_S
        return logging.WARNING

    # The state

    def _on_answer(self, *, answered: bool) -> None:
        self._answered = answered
        self._notify_state()

    def _notify_state(self) -> None:
        with self._notifying:
            with self._lock:
                lost = any(not claim.holds and not claim.conflict for claim in self._claims)
            if lost:
                state = SessionState.LOST
            else:
                state = SessionState.CONNECTED if self._answered else SessionState.SUSPENDED
            if state is self._state:
                return
            self._state = state
            log.info("etcd at %s: %s", self._etcd.members.urls, state.value)
            if self._on_state is not None:
                try:
                    self._on_state(state)
                except Exception:
                    log.exception("on_state raised")


def _jitter() -> float:
    """Keeps a thousand processes that lost etcd at the same time from returning at the same time."""
    return random.uniform(0.8, 1.0)
