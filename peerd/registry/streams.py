"""The two streams to etcd: keep-alives and watches.

A stream has no deadline for one answer, so each has something that ends it: a timer for the keep-alives,
the probe of ``Members.stream`` for a watch.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Generator, Iterator
from queue import SimpleQueue
from typing import Any

from peerd.errors import RegistryError, RegistryUnavailableError
from peerd.registry.connection import Connection, Members, etcd3, rpc
from peerd.registry.etcd_errors import CompactedError
from peerd.registry.etcd_types import Change, Lease


class KeepAliveStream:
    """Keep-alives and their answers, which etcd gives in order."""

    def __init__(self, members: Members, timeout_s: float) -> None:
        self._members = members
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._connection = members.connection()
        with members.translating_errors(self._connection, timeout_s):
            self._call = self._connection.leases.LeaseKeepAlive(
                iter(self._requests.get, None),
                metadata=members.metadata(self._connection, timeout_s),
            )

    @property
    def is_open(self) -> bool:
        """False once it broke, for example in a failover."""
        return bool(self._call.is_active())

    def refresh(self, lease_ids: Collection[int], timeout_s: float) -> Iterator[Lease]:
        """Yields each lease with its new TTL."""
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            self._call.cancel()

        timer = threading.Timer(timeout_s, give_up)
        timer.name, timer.daemon = "peerd-registry-deadline", True
        timer.start()
        try:
            with self._members.translating_errors(self._connection, timeout_s):
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
            if not is_late.is_set():
                raise
            self._members.fail_over(self._connection, unresponsive=True)
            raise RegistryUnavailableError(
                f"etcd at {self._members.urls} does not answer (no answer within {timeout_s:.2g} s)"
            ) from None
        finally:
            timer.cancel()

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()


class WatchStream:
    """An iterator over changes, in the order in which etcd made them; it ends by raising.

    The first item is empty and means that etcd has started the watch. Each other item has the changes of
    one or more complete revisions.

    Raises CompactedError if some of the requested changes are no longer known, RegistryUnavailableError if
    the connection is lost or etcd has no leader, and after ``cancel()``.
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
        self._probe = rpc.RangeRequest(key=prefix, limit=1, keys_only=True)
        self._ended = threading.Event()
        self._call: Any = None
        self._batches = self._read()

    def __iter__(self) -> Iterator[list[Change]]:
        return self._batches

    def __next__(self) -> list[Change]:
        return next(self._batches)

    def cancel(self) -> None:
        """End the iteration. From any thread."""
        self._ended.set()
        call = self._call
        if call is not None:
            call.cancel()

    def close(self) -> None:
        """End the stream. From the thread that iterates."""
        self.cancel()
        self._batches.close()

    def _read(self) -> Generator[list[Change], None, None]:
        members = self._members
        try:
            with (
                members.stream(self._probe) as connection,
                members.translating_errors(connection, 0.0),
            ):
                self._call = connection.watches.Watch(
                    _only_request(self._request, self._ended),
                    # Without it, a member that has no leader would keep the stream open and silent.
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
                        yield [Change.of(event) for event in answer.events]
            raise RegistryUnavailableError(f"etcd at {members.urls} ended the watch")
        finally:
            self.cancel()

    def _refusal(self, answer: Any, connection: Connection) -> RegistryError:
        where = f"etcd at {self._members.urls}"
        if answer.compact_revision:
            return CompactedError(
                f"{where} has compacted all revisions before {answer.compact_revision}"
            )
        reason = answer.cancel_reason
        if "permission denied" in reason.lower() or (answer.created and not reason):
            # etcd gives this reason for an expired token as well. A read shows which one it is.
            self._members.forget_login()
            self._members.call(lambda connection: connection.kv.Range, self._probe)
            return RegistryUnavailableError(f"{where} ended the watch: the login had expired")
        self._members.fail_over(connection)
        return RegistryUnavailableError(f"{where} ended the watch: {reason}")


def _only_request(request: Any, ended: threading.Event) -> Iterator[Any]:
    """etcd ends a watch whose client has no more requests, so this waits. It holds no reference to the
    stream, which could not be collected otherwise."""
    yield request
    ended.wait()
