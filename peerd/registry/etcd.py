"""etcd's operations in our own types.

The calls go through etcd3's client and its stubs, not through its methods: those have no deadline for
streams, hide the lease of a key, and lose the cause of an error.

An Etcd is to be used in the process that made it; gRPC's threads do not survive a fork, and a call
on an inherited channel hangs (``Session`` refuses it before it comes here).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from operator import attrgetter
from queue import SimpleQueue
from typing import Any, NamedTuple

from peerd.errors import RegistryError, RegistryUnavailableError
from peerd.registry.connection import (
    CompactedError,
    Connection,
    LeaseNotFoundError,
    Members,
    TooLargeError,
    etcd3,
    rpc,
)
from peerd.settings import ANONYMOUS, EtcdAccess

__all__ = [
    "Change",
    "CompactedError",
    "Etcd",
    "KeyValue",
    "Lease",
    "LeaseNotFoundError",
    "Range",
    "TooLargeError",
    "WatchStream",
]

_PAGE_KEYS = 1000
"""Of the first page, where nothing is known of the sizes. Others are larger if that fits, since a page
costs etcd and gRPC a millisecond beside what is in it."""

_PAGE_GROWTH = 4
_PAGE_BYTES = 8 * 1024 * 1024
"""Aimed at, by what was seen so far; a quarter of what gRPC takes."""

_MAX_COMPARED_KEYS = 100
"""Per transaction; etcd's own limit is 128 by default (``--max-txn-ops``)."""

_KEY, _VALUE = attrgetter("key"), attrgetter("value")


class KeyValue(NamedTuple):
    key: bytes
    value: bytes
    lease_id: int
    """0: no lease."""

    mod_revision: int


class Lease(NamedTuple):
    lease_id: int
    ttl_s: int
    """As granted: etcd raises what it finds too short."""


class Range(NamedTuple):
    items: list[KeyValue]
    """In the order of their keys."""

    revision: int
    """Of the store, the same for all items."""


class Change(NamedTuple):
    item: KeyValue
    """Without value and lease where it is deleted. Its mod revision is when that happened."""

    deleted: bool
    """By whoever, or since its lease ran out."""


class Etcd:
    """An etcd of one member or several. Making one neither connects nor blocks.

    Each method raises RegistryUnavailableError when no member answers within ``timeout_s``, and
    another RegistryError when etcd refuses.
    """

    def __init__(self, urls: str, timeout_s: float = 5.0, access: EtcdAccess = ANONYMOUS) -> None:
        self._members = Members(urls, access, timeout_s)
        self._first_limit = _PAGE_KEYS
        self._keeping = threading.Lock()
        self._keep_alives: _KeepAliveStream | None = None

    @property
    def urls(self) -> str:
        return self._members.urls

    @property
    def member_url(self) -> str:
        """Of the member that is asked first."""
        return self._members.url

    @property
    def timeout_s(self) -> float:
        return self._members.timeout_s

    @property
    def heard_s(self) -> float:
        """When etcd last answered, on the monotonic clock. Once a second while there is a watch."""
        return self._members.heard_s

    def close(self) -> None:
        """Ends the connection. Calls under way in other threads raise RegistryUnavailableError."""
        self._end_keep_alives()
        self._members.close()

    # Keys

    def list(self, prefix: bytes, *, serializable: bool = False) -> Range:
        """All keys that start with ``prefix``, at one revision, however many pages that takes.

        ``serializable``: any member answers from what it has, without asking the others.
        """
        items: list[KeyValue] = []

        def take(page: Any, _values: Collection[bytes]) -> None:
            items.extend(map(_key_value, page))

        revision = self._read(prefix, serializable, items.clear, take)
        return Range(items, revision)

    def values(self, prefix: bytes, *, serializable: bool = False) -> dict[bytes, bytes]:
        """As ``list``, but keys and values only. Of ten thousand it is done in half the time."""
        found: dict[bytes, bytes] = {}

        def take(page: Any, values: Collection[bytes]) -> None:
            # No tuple of two, which the garbage collector would look at again and again.
            found.update(zip(map(_KEY, page), values, strict=True))

        self._read(prefix, serializable, found.clear, take)
        return found

    def _read(
        self,
        prefix: bytes,
        serializable: bool,
        begin: Callable[[], None],
        take: Callable[[Any, Collection[bytes]], None],
    ) -> int:
        """The revision at which all pages were read."""
        for _ in range(2):
            # Only when the store is compacted between two pages, and then not soon again.
            with contextlib.suppress(CompactedError):
                begin()
                return self._read_pages(prefix, serializable, take)
        begin()
        return self._read_pages(prefix, serializable, take)

    def _read_pages(
        self, prefix: bytes, serializable: bool, take: Callable[[Any, Collection[bytes]], None]
    ) -> int:
        request = rpc.RangeRequest(
            key=prefix,
            range_end=etcd3.utils.increment_last_byte(prefix),
            limit=self._first_limit,
            serializable=serializable,
        )
        keys = size_bytes = 0
        page = self._page(request, self._members.begin(_range, request))
        request.revision = page.header.revision
        while True:
            kvs, values = page.kvs, list(map(_VALUE, page.kvs))
            keys += len(values)
            size_bytes += sum(map(len, values))
            fit = _PAGE_BYTES * keys // max(size_bytes, 1)
            if not page.more:
                break
            request.key = kvs[-1].key + b"\0"  # the next possible key
            request.limit = max(_PAGE_KEYS, min(_PAGE_GROWTH * keys, fit))
            # etcd looks for the next page while this one is read here.
            following = self._members.begin(_range, request)
            take(kvs, values)
            page = self._page(request, following)
        take(kvs, values)
        # Who lists again expects as much, and somewhat more.
        self._first_limit = max(_PAGE_KEYS, min(keys + keys // 4, fit))
        return int(request.revision)

    def _page(self, request: Any, answer: Callable[[], Any]) -> Any:
        """The answer to the request; with fewer keys where values are larger than those before."""
        while True:
            try:
                return answer()
            except TooLargeError:
                if request.limit == 1:
                    raise
                request.limit = max(request.limit // 8, 1)
                answer = self._members.begin(_range, request)

    def get(self, key: bytes, revision: int = 0) -> KeyValue | None:
        """What the key holds, or held at a revision. Raises CompactedError for one out of reach."""
        answer = self._members.call(_range, rpc.RangeRequest(key=key, revision=revision))
        return _key_value(answer.kvs[0]) if answer.kvs else None

    def put(self, key: bytes, value: bytes, lease_id: int = 0) -> None:
        """Raises LeaseNotFoundError, as ``create`` and ``replace`` do, when there is no such lease."""
        self._members.call(_put, rpc.PutRequest(key=key, value=value, lease=lease_id))

    def create(self, key: bytes, value: bytes, lease_id: int) -> tuple[int, KeyValue | None]:
        """Put the key if it does not exist. Returns its mod revision and None, else 0 and what exists."""
        absent = rpc.Compare(
            key=key, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL, create_revision=0
        )
        answer = self._put_if(absent, key, value, lease_id)
        if answer.succeeded:
            return int(answer.header.revision), None
        return 0, _key_value(answer.responses[0].response_range.kvs[0])

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
        return self._members.call(_txn, request)

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
            answer = self._members.call(_txn, request, deadline_s)
            if answer.succeeded:
                continue
            for key, response in zip(batch, answer.responses, strict=True):
                found = response.response_range.kvs
                if not found or found[0].mod_revision != revisions[key]:
                    changed.add(key)
        return changed

    # Leases

    def grant(self, ttl_s: int) -> Lease:
        lease = self._members.call(_grant, rpc.LeaseGrantRequest(TTL=ttl_s))
        return Lease(lease.ID, lease.TTL)

    def keep_alive(
        self, lease_ids: Collection[int], timeout_s: float | None = None
    ) -> Iterator[Lease]:
        """Refreshes all leases and yields each with its TTL, 0 for one that is gone.

        All calls go over one stream, one at a time; it is opened anew only when it broke. A generator,
        so that the answers that came before a failure are not lost with it.
        """
        timeout_s = timeout_s or self.timeout_s
        if not self._keeping.acquire(timeout=timeout_s):
            raise RegistryUnavailableError(
                f"etcd at {self.urls} has not answered the keep-alives before these"
            )
        complete = False
        try:
            if self._keep_alives is not None and not self._keep_alives.is_open:
                self._end_keep_alives()
            if self._keep_alives is None:
                self._keep_alives = _KeepAliveStream(self._members, timeout_s)
            yield from self._keep_alives.refresh(lease_ids, timeout_s)
            complete = True
        finally:
            if not complete:  # what is still to come would be taken for the next call's answers
                self._end_keep_alives()
            self._keeping.release()

    def _end_keep_alives(self) -> None:
        stream, self._keep_alives = self._keep_alives, None
        if stream is not None:
            stream.close()

    def revoke(self, lease_ids: Iterable[int], timeout_s: float | None = None) -> None:
        """Ends all leases at once, and with them their keys. One that is gone already is fine."""
        members, timeout_s = self._members, timeout_s or self.timeout_s
        deadline_s = time.monotonic() + timeout_s
        failure: RegistryError | None = None
        connection = members.connection()
        with members.failures(connection, timeout_s):
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
                with members.failures(connection, timeout_s):
                    answer.result()
            except LeaseNotFoundError:
                pass
            except RegistryError as error:
                failure = error
        if failure is not None:
            raise failure

    # Changes

    def watch(self, prefix: bytes, from_revision: int) -> WatchStream:
        """All changes of keys that start with ``prefix``, from a revision on."""
        return WatchStream(self._members, prefix, from_revision)


class _KeepAliveStream:
    """Keep-alives and their answers, which etcd gives in order."""

    def __init__(self, members: Members, timeout_s: float) -> None:
        self._members = members
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._connection = members.connection()
        with members.failures(self._connection, timeout_s):
            self._call = self._connection.leases.LeaseKeepAlive(
                iter(self._requests.get, None),
                metadata=members.metadata(self._connection, timeout_s),
            )

    @property
    def is_open(self) -> bool:
        """False when it broke meanwhile, such as with a member that was left."""
        return bool(self._call.is_active())

    def refresh(self, lease_ids: Collection[int], timeout_s: float) -> Iterator[Lease]:
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._call.cancel()

        # A stream has no deadline for one answer.
        timer = threading.Timer(timeout_s, give_up)
        timer.name, timer.daemon = "peerd-registry-deadline", True
        timer.start()
        try:
            with self._members.failures(self._connection, timeout_s):
                for lease_id in lease_ids:
                    self._requests.put(rpc.LeaseKeepAliveRequest(ID=lease_id))
                for _ in lease_ids:
                    answer = next(self._call, None)
                    if answer is None:
                        raise RegistryUnavailableError(
                            f"etcd at {self._members.urls} ended the keep-alives"
                        )
                    yield Lease(answer.ID, answer.TTL)
        except RegistryUnavailableError:
            if not late.is_set():
                raise
            self._members.leave(self._connection, silent=True)
            raise RegistryUnavailableError(
                f"etcd at {self._members.urls} does not answer (no answer within {timeout_s:.2g} s)"
            ) from None
        finally:
            timer.cancel()

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()


class WatchStream:
    """An iterator over what happens, in the order in which it did; it ends by raising.

    The first item is empty and says that etcd has begun to watch. Each other one has whole revisions.

    Raises CompactedError when some of the changes asked for are no longer known,
    RegistryUnavailableError when the connection is lost or etcd has no leader, and after ``cancel()``.
    """

    def __init__(self, members: Members, prefix: bytes, from_revision: int) -> None:
        self._members = members
        self._request = rpc.WatchRequest(
            create_request=rpc.WatchCreateRequest(
                key=prefix,
                range_end=etcd3.utils.increment_last_byte(prefix),
                start_revision=from_revision,
            )
        )
        self._alive = rpc.RangeRequest(key=prefix, limit=1, keys_only=True)
        self._ended = threading.Event()
        self._call: Any = None
        self._batches = self._read()

    def __iter__(self) -> Iterator[list[Change]]:
        return self._batches

    def __next__(self) -> list[Change]:
        return next(self._batches)

    def cancel(self) -> None:
        """From any thread: the iteration ends."""
        self._ended.set()
        call = self._call
        if call is not None:
            call.cancel()

    def close(self) -> None:
        """From the thread that reads, which has no more use for it."""
        self.cancel()
        self._batches.close()

    def _read(self) -> Generator[list[Change], None, None]:
        members = self._members
        try:
            with members.stream(self._alive) as connection, members.failures(connection, 0.0):
                self._call = connection.watches.Watch(
                    _one_and_no_end(self._request, self._ended),
                    # Or a member without a leader would keep the stream open, and silent.
                    metadata=(
                        ("hasleader", "true"),
                        *members.metadata(connection, members.timeout_s),
                    ),
                )
                if self._ended.is_set():
                    self._call.cancel()
                for answer in self._call:
                    if answer.canceled:
                        raise self._refusal(answer, connection)
                    if answer.created or answer.events:
                        yield [_change(event) for event in answer.events]
            raise RegistryUnavailableError(f"etcd at {members.urls} ended the watch")
        finally:
            self.cancel()

    def _refusal(self, answer: Any, connection: Connection) -> RegistryError:
        where = f"etcd at {self._members.urls}"
        if answer.compact_revision:
            return CompactedError(
                f"{where} has forgotten what was before {answer.compact_revision}"
            )
        reason = answer.cancel_reason
        if "permission denied" in reason.lower() or (answer.created and not reason):
            # So etcd calls a token that has ended, too. A read tells which it is.
            self._members.forget_login()
            self._members.call(_range, self._alive)
            return RegistryUnavailableError(f"{where} ended the watch: the login had ended")
        self._members.leave(connection)
        return RegistryUnavailableError(f"{where} ended the watch: {reason}")


def _one_and_no_end(request: Any, ended: threading.Event) -> Iterator[Any]:
    """A watch lives as long as its client has more to say. Knows nothing of the stream, or it would
    live for ever."""
    yield request
    ended.wait()


def _has_mod_revision(key: bytes, revision: int) -> Any:
    return rpc.Compare(
        key=key, target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=revision
    )


def _range(connection: Connection) -> Any:
    return connection.kv.Range


def _put(connection: Connection) -> Any:
    return connection.kv.Put


def _txn(connection: Connection) -> Any:
    return connection.kv.Txn


def _grant(connection: Connection) -> Any:
    return connection.leases.LeaseGrant


def _key_value(item: Any) -> KeyValue:
    return KeyValue(item.key, item.value, item.lease, item.mod_revision)


def _change(event: Any) -> Change:
    return Change(_key_value(event.kv), deleted=bool(event.type))
