"""Whose key is it: one record that is to be in etcd, and the transactions that put it there.

Claiming a key is a transaction that creates it. If the key exists, the claimant reads who put it:

    one of our own leases      An earlier attempt whose answer was lost, or the predecessor whose lease was
                               adopted. Its value is replaced unless it is this record already.
    no lease                   A leftover, such as FaasNet leaves, or a value put by hand: replaced.
    the lease of a process     It ran on this machine (owner.py) and had our address: a predecessor that
    that has died              could not hand its lease over. Replaced.
    any other lease            A live owner: PeerConflictError.

A value is replaced by compare-and-swap on the revision that was read, so a claim never overwrites what it
has not seen. Two owners with live leases never overwrite each other. A writer without a lease that keeps
overwriting the key is overwritten in turn, but ever more rarely (``_Brake``), and is reported as a
conflict in between: two such writers would otherwise keep etcd and every watch busy.

A record can vanish or change while its lease lives: ``etcdctl del``, ``etcdctl put``, another program that
writes the same key. Only the key's mod revision shows that, so a Claim keeps the one of its own last
write, and ``Claimant.find_changed`` compares it with etcd's. Rejected: a watch on each key. It would notice
earlier, but needs a stream and a thread, and must be resumed and verified after each broken connection.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from peerd.errors import InvalidRecordError, PeerConflictError, RegistryUnavailableError
from peerd.registry.etcd import Etcd
from peerd.registry.etcd_errors import LeaseNotFoundError
from peerd.registry.etcd_types import KeyValue, Lease
from peerd.registry.owner import Owner
from peerd.registry.records import PeerRecord

MAX_ATTEMPTS = 5
"""An attempt fails only if the key or the lease changes between two calls. More often is no accident."""

_MAX_OWN_LEASES = 8

_FIRST_PAUSE_S = 5.0
_MAX_PAUSE_S = 60.0


class Claim:
    """One record that is to be in etcd, and what is known of it there."""

    def __init__(
        self, key: bytes, record: PeerRecord, owner: Owner, on_lease: Callable[[int], None]
    ) -> None:
        self.key = key
        self.record = record
        self.value = owner.put_into(record.to_json())
        self.on_lease = on_lease
        self.lease: HeldLease | None = None
        self.own_lease_ids: deque[int] = deque(maxlen=_MAX_OWN_LEASES)
        """The current lease and the former ones."""

        self.mod_revision = 0  # of our last write; 0 while the record is not in etcd
        self.conflict = ""
        self.retry_at_s = 0.0
        self.closed = False
        self.brake = _Brake()

    @property
    def holds(self) -> bool:
        """Whether the record is in etcd, as far as is known: its lease cannot have expired yet."""
        return self.mod_revision > 0 and self.lease is not None and self.lease.is_alive

    @property
    def holds_until_s(self) -> float:
        """When the lease expires on the monotonic clock unless it is refreshed; 0 for no record."""
        return self.lease.ends_at_s if self.mod_revision and self.lease is not None else 0.0


@dataclass
class HeldLease:
    lease_id: int
    ttl_s: int
    ends_at_s: float  # on the monotonic clock; 0 once etcd has reported it gone

    @property
    def is_alive(self) -> bool:
        return time.monotonic() < self.ends_at_s


@dataclass
class _Brake:
    """Spaces out the times at which another writer's value is overwritten. The first time is free."""

    pause_s: float = 0.0
    free_at_s: float = field(default=-_MAX_PAUSE_S)

    def may_overwrite(self) -> bool:
        """Records an overwrite if it returns True."""
        now_s = time.monotonic()
        if now_s < self.free_at_s:
            return False
        is_calm = now_s > self.free_at_s + _MAX_PAUSE_S
        self.pause_s = _FIRST_PAUSE_S if is_calm else min(2 * self.pause_s, _MAX_PAUSE_S)
        self.free_at_s = now_s + self.pause_s * random.uniform(0.5, 1.0)
        return True


class Claimant:
    """Claims keys on behalf of one owner. Not thread-safe for two calls about the same Claim."""

    def __init__(self, etcd: Etcd, owner: Owner, lease_ttl_s: int) -> None:
        self._etcd = etcd
        self._owner = owner
        self._lease_ttl_s = lease_ttl_s

    def adopt(self, claim: Claim, lease_id: int) -> None:
        """Continue to use the lease of a predecessor, if it is still alive."""
        claim.own_lease_ids.append(lease_id)
        asked_at_s = time.monotonic()
        for lease in self._etcd.keep_alive([lease_id]):
            if lease.ttl_s > 0:
                _hold(claim, lease, asked_at_s)

    def put(self, claim: Claim) -> None:
        """Put the record under a live lease. Raises PeerConflictError or another RegistryError."""
        for _ in range(MAX_ATTEMPTS):
            lease = claim.lease
            if lease is None or not lease.is_alive:
                asked_at_s = time.monotonic()
                lease = _hold(claim, self._etcd.grant(self._lease_ttl_s), asked_at_s)
            try:
                claim.mod_revision = self._create_or_replace(claim, lease)
            except LeaseNotFoundError:
                lease.ends_at_s = 0.0
            if claim.mod_revision:
                claim.conflict = ""
                return
        raise self._changed_each_time(claim, "put")

    def update(self, claim: Claim, record: PeerRecord) -> None:
        """Replace the record under the same lease. Also completes an update whose answer was lost.

        A record that is not in etcd any more is marked as lost.
        """
        key, lease, value = claim.key, claim.lease, self._owner.put_into(record.to_json())
        for _ in range(MAX_ATTEMPTS):
            found = self._etcd.get(key)
            if lease is None or found is None:
                claim.mod_revision = 0
                raise RegistryUnavailableError(
                    f"{key.decode()} is not in etcd at {self._etcd.members.urls} now: it will be put again "
                    "soon, and can be updated then"
                )
            if found.lease_id != lease.lease_id:
                claim.mod_revision = 0
                raise PeerConflictError(_describe_holder(claim.record, found))
            revision = found.mod_revision
            if found.value != value:
                revision = self._etcd.replace(key, value, lease.lease_id, revision)
            if revision:
                claim.record, claim.value, claim.mod_revision = record, value, revision
                return
        raise self._changed_each_time(claim, "update")

    def _changed_each_time(self, claim: Claim, action: str) -> RegistryUnavailableError:
        return RegistryUnavailableError(
            f"{claim.key.decode()} in etcd at {self._etcd.members.urls} changed under each of "
            f"{MAX_ATTEMPTS} attempts to {action} it: find out what else writes it"
        )

    def find_changed(self, claims: Collection[Claim], timeout_s: float) -> list[Claim]:
        """Those whose key was removed or written since our last write. One question per 100 keys."""
        revisions: dict[bytes, int] = {}
        for claim in claims:
            # Two claims have one key where the second adopted the lease of the first.
            revisions[claim.key] = max(claim.mod_revision, revisions.get(claim.key, 0))
        changed = self._etcd.find_changed(revisions, timeout_s)
        return [claim for claim in claims if claim.key in changed]

    def _create_or_replace(self, claim: Claim, lease: HeldLease) -> int:
        """The mod revision of the record; 0 if the key changed between two calls."""
        key, value = claim.key, claim.value
        revision, found = self._etcd.create(key, value, lease.lease_id)
        if found is None:
            return revision
        if not _is_free(claim, found):
            raise PeerConflictError(_describe_holder(claim.record, found))
        owner = Owner.in_value(found.value)
        is_ours = owner is not None and owner.is_same_process(self._owner)
        # Not compared with claim.value: an adopted record keeps the time since when it is there.
        if (
            owner is not None
            and is_ours
            and found.lease_id == lease.lease_id
            and found.value == owner.put_into(claim.record.to_json())
        ):
            return found.mod_revision
        if not is_ours and not claim.brake.may_overwrite():
            raise PeerConflictError(_describe_holder(claim.record, found))
        return self._etcd.replace(key, value, lease.lease_id, found.mod_revision)


def _hold(claim: Claim, lease: Lease, asked_at_s: float) -> HeldLease:
    held = HeldLease(lease.lease_id, lease.ttl_s, asked_at_s + lease.ttl_s)
    claim.lease = held
    claim.own_lease_ids.append(lease.lease_id)
    claim.mod_revision = 0
    # Before the key is put: a listener that writes the lease down can then find every record again.
    claim.on_lease(lease.lease_id)
    return held


def _is_free(claim: Claim, found: KeyValue) -> bool:
    """Whether the key may be taken from whichever process put what was found there."""
    if not found.lease_id or found.lease_id in claim.own_lease_ids:
        return True
    owner = Owner.in_value(found.value)
    try:
        theirs = PeerRecord.from_json(found.value)
    except InvalidRecordError:
        return False
    ours = claim.record
    return (
        owner is not None
        and owner.has_died()
        and (ours.url, ours.port, ours.protocol) == (theirs.url, theirs.port, theirs.protocol)
    )


def _describe_holder(record: PeerRecord, found: KeyValue) -> str:
    try:
        holder = PeerRecord.from_json(found.value)
        who = f"{holder.url}:{holder.port}"
    except InvalidRecordError:
        who = "a value that is no record"
    owner = Owner.in_value(found.value)
    if owner is not None:
        who += f" (process {owner.pid} on {owner.host}, since {owner.since})"
    if found.lease_id:
        return (
            f"peer id {record.peer_id!r} belongs to {who} under the live lease {found.lease_id:x}: "
            "choose another one, or wait until that peer is gone"
        )
    return (
        f"peer id {record.peer_id!r} is repeatedly overwritten, without a lease, by {who}: "
        "find out what else writes this key, or choose another peer id"
    )
