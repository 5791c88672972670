"""etcd's operations on keys and leases, in our own types.

The calls use the stubs of etcd3's client, not its methods: those have no deadline for streams, hide the
lease of a key, and lose the cause of an error.

An Etcd works only in the process that made it: gRPC's threads do not survive a fork, and a call on an
inherited channel hangs (``Session`` refuses it first).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import grpc

from peerd.errors import RegistryError, RegistryUnavailableError
from peerd.registry.connection import Members, etcd3, rpc
from peerd.registry.etcd_errors import CompactedError, LeaseNotFoundError, TooLargeError
from peerd.registry.etcd_types import KeyValue, Lease, Range
from peerd.registry.streams import KeepAliveStream
from peerd.settings import ANONYMOUS, EtcdAccess

_PAGE_KEYS = 1000
"""Of the first page, when the sizes of the values are unknown. Later pages are larger if that fits: each
page costs etcd and gRPC a millisecond in addition to its content."""

_PAGE_GROWTH = 4
_PAGE_BYTES = 8 * 1024 * 1024
"""The target, from the sizes seen so far; a quarter of what gRPC accepts."""

_MAX_COMPARED_KEYS = 100  # per transaction; etcd's own limit is 128 by default (``--max-txn-ops``)

_GRPC_GRACE_S = 0.5
"""How much longer than its deadline a call is waited for."""

_KEY, _VALUE = attrgetter("key"), attrgetter("value")
_RANGE, _PUT, _TXN = attrgetter("kv.Range"), attrgetter("kv.Put"), attrgetter("kv.Txn")
_GRANT = attrgetter("leases.LeaseGrant")

_Pages = list[tuple[Any, list[bytes]]]  # etcd's answers, each with the values in it


class Etcd:
    """An etcd with one member or several. The constructor neither connects nor blocks.

    Each method raises RegistryUnavailableError when no member answers within ``timeout_s``, and
    another RegistryError when etcd refuses.
    """

    def __init__(self, urls: str, timeout_s: float = 5.0, access: EtcdAccess = ANONYMOUS) -> None:
        self.members = Members(urls, access, timeout_s)
        self._first_limit = _PAGE_KEYS
        self._keep_alive_lock = threading.Lock()
        self._keep_alives: KeepAliveStream | None = None

    def close(self) -> None:
        """Close the connection. Calls under way in other threads raise RegistryUnavailableError."""
        self._end_keep_alives()
        self.members.close()

    # Keys

    def list(self, prefix: bytes, *, serializable: bool = False) -> Range:
        """All keys that start with ``prefix``, at one revision, in as many pages as necessary.

        ``serializable``: any member answers from its own state, without asking the others.
        """
        pages = self._pages(prefix, serializable)
        items = [KeyValue.of(item) for page, _ in pages for item in page.kvs]
        return Range(items, pages[0][0].header.revision)

    def values(self, prefix: bytes, *, serializable: bool = False) -> dict[bytes, bytes]:
        """Like ``list``, but only keys and values: for 10,000 keys in half the time."""
        found: dict[bytes, bytes] = {}
        for page, values in self._pages(prefix, serializable):
            # No tuple per item, which every run of the garbage collector would visit.
            found.update(zip(map(_KEY, page.kvs), values, strict=True))
        return found

    def _pages(self, prefix: bytes, serializable: bool) -> _Pages:
        """All at the revision of the first."""
        for _ in range(2):
            # Raised if the store is compacted between two pages, which does not soon happen again.
            with contextlib.suppress(CompactedError):
                return self._read_pages(prefix, serializable)
        return self._read_pages(prefix, serializable)

    def _read_pages(self, prefix: bytes, serializable: bool) -> _Pages:
        request = rpc.RangeRequest(
            key=prefix,
            range_end=etcd3.utils.increment_last_byte(prefix),
            limit=self._first_limit,
            serializable=serializable,
        )
        pages: _Pages = []
        keys = size_bytes = 0
        while True:
            page = self._page(request)
            values = list(map(_VALUE, page.kvs))
            pages.append((page, values))
            keys += len(values)
            size_bytes += sum(map(len, values))
            fit = _PAGE_BYTES * keys // max(size_bytes, 1)
            if not page.more:
                break
            request.revision = pages[0][0].header.revision
            request.key = page.kvs[-1].key + b"\0"  # the next possible key
            request.limit = max(_PAGE_KEYS, min(_PAGE_GROWTH * keys, fit))
        # The next listing is expected to be as large, with room for a quarter more.
        self._first_limit = max(_PAGE_KEYS, min(keys + keys // 4, fit))
        return pages

    def _page(self, request: Any) -> Any:
        """The answer to the request, with fewer keys if these values are larger than those before."""
        while True:
            try:
                return self.members.call(_RANGE, request)
            except TooLargeError:
                if request.limit == 1:
                    raise
                request.limit = max(request.limit // 8, 1)

    def get(self, key: bytes, revision: int = 0) -> KeyValue | None:
        """The key now, or at a revision. Raises CompactedError for a revision that is not in the store."""
        answer = self.members.call(_RANGE, rpc.RangeRequest(key=key, revision=revision))
        return KeyValue.of(answer.kvs[0]) if answer.kvs else None

    def put(self, key: bytes, value: bytes, lease_id: int = 0) -> None:
        """Raises LeaseNotFoundError if there is no such lease, like ``create`` and ``replace``."""
        self.members.call(_PUT, rpc.PutRequest(key=key, value=value, lease=lease_id))

    def create(self, key: bytes, value: bytes, lease_id: int) -> tuple[int, KeyValue | None]:
        """Put the key if it does not exist. Returns its mod revision and None, else 0 and what exists."""
        absent = rpc.Compare(
            key=key, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL, create_revision=0
        )
        answer = self._put_if(absent, key, value, lease_id)
        if answer.succeeded:
            return int(answer.header.revision), None
        return 0, KeyValue.of(answer.responses[0].response_range.kvs[0])

    def replace(self, key: bytes, value: bytes, lease_id: int, expected_mod_revision: int) -> int:
        """Put the key if it has that mod revision. Returns the new one; 0 if the key had changed.

        0 as well if etcd has put the key and the answer was lost.
        """
        unchanged = _has_mod_revision(key, expected_mod_revision)
        answer = self._put_if(unchanged, key, value, lease_id)
        return int(answer.header.revision) if answer.succeeded else 0

    def _put_if(self, condition: Any, key: bytes, value: bytes, lease_id: int) -> Any:
        put = rpc.PutRequest(key=key, value=value, lease=lease_id)
        request = rpc.TxnRequest(
            compare=[condition],
            success=[rpc.RequestOp(request_put=put)],
            failure=[rpc.RequestOp(request_range=rpc.RangeRequest(key=key))],
        )
        return self.members.call(_TXN, request)

    def find_changed(self, revisions: Mapping[bytes, int], timeout_s: float) -> set[bytes]:
        """The keys that do not have the given mod revision, or do not exist.

        etcd compares, so nothing but the keys and revisions travels as long as nothing has changed.
        """
        deadline_s = time.monotonic() + timeout_s
        changed: set[bytes] = set()
        keys = list(revisions)
        for start in range(0, len(keys), _MAX_COMPARED_KEYS):
            batch = keys[start : start + _MAX_COMPARED_KEYS]
            request = rpc.TxnRequest(
                compare=[_has_mod_revision(key, revisions[key]) for key in batch],
                # Without values, which another writer may have made as large as etcd allows.
                failure=[
                    rpc.RequestOp(request_range=rpc.RangeRequest(key=key, keys_only=True))
                    for key in batch
                ],
            )
            answer = self.members.call(_TXN, request, deadline_s)
            if answer.succeeded:
                continue
            for key, response in zip(batch, answer.responses, strict=True):
                found = response.response_range.kvs
                if not found or found[0].mod_revision != revisions[key]:
                    changed.add(key)
        return changed

    # Leases

    def grant(self, ttl_s: int) -> Lease:
        lease = self.members.call(_GRANT, rpc.LeaseGrantRequest(TTL=ttl_s))
        return Lease(lease.ID, lease.TTL)

    def keep_alive(
        self, lease_ids: Collection[int], timeout_s: float | None = None
    ) -> Iterator[Lease]:
        """Refresh all leases and yield each with its TTL, 0 for one that is gone.

        All calls use one stream, one call at a time; it is reopened only if it broke. A generator, so that
        the answers before a failure are not lost.
        """
        timeout_s = timeout_s or self.members.timeout_s
        if not self._keep_alive_lock.acquire(timeout=timeout_s):
            raise RegistryUnavailableError(
                f"etcd at {self.members.urls} has not answered the previous keep-alives"
            )
        is_complete = False
        try:
            if self._keep_alives is not None and not self._keep_alives.is_open:
                self._end_keep_alives()
            if self._keep_alives is None:
                self._keep_alives = KeepAliveStream(self.members, timeout_s)
            yield from self._keep_alives.refresh(lease_ids, timeout_s)
            is_complete = True
        finally:
            if not is_complete:  # the next call would take the remaining answers for its own
                self._end_keep_alives()
            self._keep_alive_lock.release()

    def _end_keep_alives(self) -> None:
        stream, self._keep_alives = self._keep_alives, None
        if stream is not None:
            stream.close()

    def revoke(self, lease_ids: Iterable[int], timeout_s: float | None = None) -> None:
        """Revoke all leases in parallel, which deletes their keys. A lease that is gone is no error."""
        members = self.members
        timeout_s = timeout_s or members.timeout_s
        deadline_s = time.monotonic() + timeout_s
        failure: RegistryError | None = None
        connection = members.connection()
        with members.translating_errors(connection, timeout_s):
            metadata = members.metadata(connection, timeout_s)
            answers = [
                connection.leases.LeaseRevoke.future(
                    rpc.LeaseRevokeRequest(ID=lease_id),
                    timeout=deadline_s - time.monotonic(),
                    metadata=metadata,
                )
                for lease_id in lease_ids
            ]
        for answer in answers:
            try:
                with members.translating_errors(connection, timeout_s):
                    # gRPC's own deadline ends the wait, unless a KeyboardInterrupt has left its locks held.
                    answer.result(max(deadline_s - time.monotonic(), 0.0) + _GRPC_GRACE_S)
            except LeaseNotFoundError:
                pass
            except grpc.FutureTimeoutError:
                failure = RegistryUnavailableError(f"no answer within {timeout_s:g} s")
            except RegistryError as error:
                failure = error
        if failure is not None:
            raise failure


def _has_mod_revision(key: bytes, revision: int) -> Any:
    return rpc.Compare(
        key=key, target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=revision
    )
