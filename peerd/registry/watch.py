"""Every change of the peers, without a gap, whatever happens to etcd.

A Watch keeps each record that it has reported, and the revision up to which it has reported everything.
It lists, reports what exists, and watches from the next revision on. When the stream breaks (etcd is
restarted, stopped, cut off, has no leader), it resumes at that revision with the next stream, so nothing
is lost and nothing is reported twice. Two things can make that impossible:

    compacted       etcd no longer knows some of the changes since then. (Or they are more than gRPC
                    accepts in one message, whereas a list comes in pages.)
    another store   etcd was wiped, or restored from a backup: the same revisions mean something else
                    there. A lower revision is not the only sign, because the new store may have grown
                    past the old one. So once a new stream is open, and before its events are reported,
                    the newest key that this watch knows is read: it must be as it was, lease included,
                    now or at the revision of then. (A member that lags does no harm: the read is
                    linearizable.) The stream was opened before, so a later wipe breaks it.

Then the Watch lists again, and reports exactly the difference to what it has reported before.

It never gives up, and raises only what its user can act on: that etcd refuses access. Between two attempts
it waits, with jitter, for up to MAX_PAUSE_S.

A watch works in the thread that asks for the next event: it buffers nothing for a slow reader except what
gRPC's flow control lets etcd send ahead.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from peerd.errors import RegistryAuthError, RegistryError
from peerd.registry.etcd import Etcd
from peerd.registry.etcd_errors import CompactedError, TooLargeError
from peerd.registry.etcd_types import Change, KeyValue
from peerd.registry.records import PeerRecord, RecordReader
from peerd.registry.streams import WatchStream

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 1.0  # between two attempts: doubled after each, up to this


@dataclass(frozen=True)
class Joined:
    """A peer has appeared."""

    record: PeerRecord
    revision: int
    """Of etcd's store: a later event has a higher one, unless etcd was wiped in between."""


@dataclass(frozen=True)
class Updated:
    """A peer's record was put again, possibly unchanged."""

    record: PeerRecord
    revision: int


@dataclass(frozen=True)
class Left:
    """A peer is gone: it left, died, or lost its lease."""

    record: PeerRecord
    """The last known one."""

    revision: int


Event = Joined | Updated | Left


class Watch:
    """An iterator, and an async iterator, over ``Joined``, ``Updated`` and ``Left``.

    It starts with all present peers, as Joined, and ends when it or its Registry is closed, which any
    thread may do. Iterating raises RegistryAuthError if etcd refuses access, and RuntimeError in a forked
    child or if two threads iterate at the same time; nothing else. A context manager.
    """

    def __init__(
        self,
        etcd: Etcd,
        folder: bytes,
        reader: RecordReader,
        check_process: Callable[[], None],
    ) -> None:
        self._etcd = etcd
        self._reader = reader
        self._folder = folder
        self._check_process = check_process
        self._known: dict[bytes, PeerRecord] = {}
        self._skipped: set[bytes] = set()
        self._revision = 0  # everything up to it has been reported
        self._newest: KeyValue | None = None  # as it was written
        self._is_listed = False
        self._stream: WatchStream | None = None
        self._pending: deque[Event] = deque()
        self._last_confirmed_s = -float("inf")
        self._pause_s = FIRST_PAUSE_S
        self._closed = threading.Event()
        self._pid = os.getpid()
        self._reading = threading.Lock()
        self._has_warned = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while not self._pending:
            events = self.take()
            if events is None:
                raise StopIteration
            self._pending.extend(events)
        return self._pending.popleft()

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        import asyncio  # only an asyncio program gets here, and has imported it already

        waiting = ThreadPoolExecutor(1, "peerd-watch")
        try:
            while True:
                events = await asyncio.get_running_loop().run_in_executor(waiting, self.take)
                if events is None:
                    return
                for event in events:
                    yield event
        finally:
            self.close()
            waiting.shutdown(wait=False)

    def take(self) -> list[Event] | None:
        """Wait for the next events and return them in order; None once closed.

        An empty list means that only ``confirmed_at_s`` is new: the first list was empty, or a broken
        stream was resumed.
        """
        self._check_process()
        if not self._reading.acquire(blocking=False):
            raise RuntimeError("two threads read one Watch: give each its own")
        try:
            events = None if self._closed.is_set() else self._advance()
            if events is None:
                self._close_stream()
            return events
        finally:
            self._reading.release()

    def close(self) -> None:
        """End the iteration, also one that waits in another thread. Idempotent, and safe after a fork."""
        self._closed.set()
        if os.getpid() != self._pid:
            return
        if self._reading.acquire(blocking=False):
            self._close_stream()
            self._reading.release()
        elif (stream := self._stream) is not None:
            stream.cancel()

    def last_known(self, peer_id: str) -> PeerRecord | None:
        """The record of a present peer. A peer with two records, one of them under FaasNet's key, is present
        until both are gone."""
        known = self._known.values()
        return next((record for record in known if record.peer_id == peer_id), None)

    @property
    def is_closed(self) -> bool:
        """Whether the watch, or its registry, was closed."""
        return self._closed.is_set()

    @property
    def skipped(self) -> int:
        """The number of values below the prefix that are no record, as in ``Listing``."""
        return len(self._skipped)

    @property
    def confirmed_at_s(self) -> float:
        """When everything in etcd had been reported, on the monotonic clock; -inf before the first list.

        It advances about every second while the stream is open and etcd answers.
        """
        if self._stream is None:
            return self._last_confirmed_s
        return max(self._last_confirmed_s, self._etcd.members.last_answer_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # otherwise a watch that was dropped half way would leave its stream open

    def _advance(self) -> list[Event] | None:
        """One step: list, open a stream, read from the stream, or pause."""
        try:
            if self._stream is not None:
                events = self._events_of(next(self._stream))
            elif self._is_listed:
                events = self._open()
            else:
                events = self._list()
            self._last_confirmed_s = time.monotonic()
            return events
        except RegistryError as error:
            self._close_stream()
            if self._closed.is_set():
                return None
            if isinstance(error, RegistryAuthError):
                raise
            if self._is_listed and isinstance(error, (CompactedError, TooLargeError)):
                log.info("%s: listing the peers again", error)
                self._is_listed = False
                return []
            return self._pause(error)

    def _close_stream(self) -> None:
        self._last_confirmed_s = self.confirmed_at_s
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _pause(self, error: RegistryError) -> list[Event] | None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("the watch waits for etcd: %s", error)
        if self._closed.wait(self._pause_s * random.uniform(0.5, 1.0)):
            return None
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        return []

    def _open(self) -> list[Event]:
        stream = self._stream = WatchStream(self._etcd.members, self._folder, self._revision + 1)
        if self._closed.is_set():
            stream.cancel()
        first = next(stream)
        if not self._is_same_store():
            log.info("etcd has another store than before: listing the peers again")
            self._close_stream()
            return self._list()
        self._pause_s = FIRST_PAUSE_S
        if self._has_warned:
            self._has_warned = False
            log.info("the watch resumes from revision %d", self._revision + 1)
        return self._events_of(first)

    def _is_same_store(self) -> bool:
        """Whether etcd holds what this watch has seen. Raises CompactedError if that cannot be known.

        The lease distinguishes two stores in which the same peers registered in the same order.
        """
        newest = self._newest
        if newest is None:  # no key was seen, so none with an older revision may exist
            items, revision = self._etcd.list(self._folder)
            return revision >= self._revision and all(
                item.mod_revision > self._revision for item in items
            )
        # The second read is only for a key that was written again: its old revision may be compacted.
        return newest == self._etcd.get(newest.key) or (
            newest == self._etcd.get(newest.key, newest.mod_revision)
        )

    def _events_of(self, changes: Iterable[Change]) -> list[Event]:
        events: list[Event] = []
        for change in changes:
            events += self._event(change)
            self._revision = change.item.mod_revision
        return events

    def _list(self) -> list[Event]:
        """List the peers, and return the difference to what was reported before."""
        items, revision = self._etcd.list(self._folder)
        found = {item.key: item for item in items}
        events: list[Event] = [
            Left(self._known.pop(key), revision) for key in [*self._known] if key not in found
        ]
        for item in items:
            record = self._read(item)
            if record is None or record != self._known.get(item.key):
                events += self._event(Change(item, deleted=False))
        self._skipped &= found.keys()
        self._revision = revision
        self._newest = max(items, key=lambda item: item.mod_revision, default=None)
        self._is_listed = True
        return events

    def _event(self, change: Change) -> Iterator[Event]:
        item, deleted = change
        known = self._known.pop(item.key, None)
        self._skipped.discard(item.key)
        record = None
        if not deleted:
            self._newest = item
            record = self._read(item)
        if record is not None:
            self._known[item.key] = record
            yield (Joined if known is None else Updated)(record, item.mod_revision)
        elif known is not None:
            yield Left(known, item.mod_revision)

    def _read(self, item: KeyValue) -> PeerRecord | None:
        record = self._reader.read(item.key, item.value)
        if record is None:
            self._skipped.add(item.key)
        return record
