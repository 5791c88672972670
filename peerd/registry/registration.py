"""A registered record as its program sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peerd.registry.claim import Claim
from peerd.registry.records import PeerRecord
from peerd.registry.session import Session


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
