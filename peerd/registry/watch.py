"""What happens to the peers, without a gap, whatever happens to etcd.

A Watch knows each record that it has told of, and the revision up to which it has told everything.
It lists, tells what is there, and watches from the next revision on. When the stream breaks (etcd is
restarted, stopped, cut off, has no leader), it goes on at that revision with the next stream, so that
nothing is lost and nothing comes twice. Two things can make that impossible:

    compacted       etcd has forgotten some of what happened since. (Or it is more than gRPC takes in
                    one message, and a list comes in pages.)
    another store   etcd was wiped, or restored from a backup: what has the same revisions there is
                    something else. Revisions that went back are not enough to see it, since the new
                    store may have grown past the old one. So when a new stream is open, and before
                    what it brings is told, the newest key that this watch knows of is read: it, with
                    its lease, must be what it was, now or at the revision of then. (A member that
                    lags is no danger: the read is linearizable.) The stream was opened before, so an
                    etcd that is wiped afterwards breaks it.

Then it lists again, and tells exactly the difference to what it has told before.

It never gives up, and raises only what its user can act on: that etcd refuses access. Between two
attempts it waits, jittered and ever longer, up to LONGEST_PAUSE_S.

A watch does its work in the thread that asks for the next event: nothing is kept for a reader that is
slow but what gRPC's flow control lets etcd send ahead.
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
from peerd.registry.etcd import (
    Change,
    CompactedError,
    Etcd,
    KeyValue,
    TooLargeError,
    WatchStream,
)
from peerd.registry.records import PeerRecord, RecordReader

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True)
class Joined:
    """A peer is there that was not."""

    record: PeerRecord
    revision: int
    """Of etcd's store: what happened later has a higher one, unless etcd was wiped meanwhile."""


@dataclass(frozen=True)
class Updated:
    """A peer's record was put again. It may say the same as before."""

    record: PeerRecord
    revision: int


@dataclass(frozen=True)
class Left:
    """A peer is gone: it left, died, or lost its lease."""

    record: PeerRecord
    """The last one known."""

    revision: int


Event = Joined | Updated | Left


class Watch:
    """An iterator, and an async iterator, over ``Joined``, ``Updated`` and ``Left``.

    First all peers that are there, as Joined. It ends when it is closed, or its Registry is; closing
    is all right from any thread. Raises RegistryAuthError when etcd refuses access, nothing else, and
    RuntimeError in a forked child or when two threads ask at once. A context manager.
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
        self._told: dict[bytes, PeerRecord] = {}
        self._skipped: set[bytes] = set()
        self._revision = 0  # all up to it is told
        self._newest: KeyValue | None = None  # as it was when it was written
        self._is_listed = False
        self._stream: WatchStream | None = None
        self._pending: deque[Event] = deque()
        self._known_s = -float("inf")
        self._pause_s = FIRST_PAUSE_S
        self._closed = threading.Event()
        self._pid = os.getpid()
        self._asking = threading.Lock()
        self._warned = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while not self._pending:
            events = self.take()
            if events is None:
                raise StopIteration
            self._pending.extend(events)
        return self._pending.popleft()

    def __aiter__(self) -> AsyncGenerator[Event, None]:
        return self._events()

    async def _events(self) -> AsyncGenerator[Event, None]:
        import asyncio  # for those only who are in it already

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
        """Waits for news: what has happened since the last time, in order; None once closed.

        An empty list says that nothing is new but ``known_s``: the first list may have been empty,
        or a broken stream goes on.
        """
        self._check_process()
        if not self._asking.acquire(blocking=False):
            raise RuntimeError("two threads ask one Watch: give each its own")
        try:
            events = None if self._closed.is_set() else self._advance()
            if events is None:
                self._broken()
            return events
        finally:
            self._asking.release()

    def close(self) -> None:
        """Ends the iteration, one that waits included. Twice is fine; in a forked child too."""
        self._closed.set()
        if os.getpid() != self._pid:
            return
        if self._asking.acquire(blocking=False):
            self._broken()
            self._asking.release()
        elif (stream := self._stream) is not None:
            stream.cancel()

    def last_known(self, peer_id: str) -> PeerRecord | None:
        """Of a peer that is there. One that is there twice, such as under FaasNet's key as well, is
        still there when one of its records is gone."""
        told = self._told.values()
        return next((record for record in told if record.peer_id == peer_id), None)

    @property
    def is_closed(self) -> bool:
        """Whether the watch, or its registry, was closed."""
        return self._closed.is_set()

    @property
    def skipped(self) -> int:
        """The number of values below the prefix that are no record, as in ``Listing``."""
        return len(self._skipped)

    @property
    def known_s(self) -> float:
        """When all that was known had been told, on the monotonic clock; -inf before the first list.

        It goes on while the stream is open and etcd answers, about once a second.
        """
        if self._stream is None:
            return self._known_s
        return max(self._known_s, self._etcd.heard_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # or the stream of one that was dropped half way would stay open

    def _advance(self) -> list[Event] | None:
        """One step: a list, or the opening of a stream, or what a stream has brought, or a pause."""
        try:
            if self._stream is not None:
                events = self._tell(next(self._stream))
            elif self._is_listed:
                events = self._open()
            else:
                events = self._list()
            self._known_s = time.monotonic()
            return events
        except (CompactedError, TooLargeError) as error:
            log.info("%s: the peers are listed again", error)
            self._broken()
            return self._list_again()
        except RegistryAuthError:
            self._broken()
            if self._closed.is_set():
                return None
            raise
        except RegistryError as error:
            self._broken()
            return self._pause(error)

    def _list_again(self) -> list[Event] | None:
        try:
            return self._list()
        except RegistryError as error:
            return self._pause(error)

    def _broken(self) -> None:
        self._known_s = self.known_s
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _pause(self, error: RegistryError) -> list[Event] | None:
        if self._closed.is_set():
            return None
        if not self._warned:
            self._warned = True
            log.warning("the watch waits for etcd: %s", error)
        if self._closed.wait(self._pause_s * random.uniform(0.5, 1.0)):
            return None
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return []

    def _open(self) -> list[Event]:
        stream = self._stream = self._etcd.watch(self._folder, self._revision + 1)
        if self._closed.is_set():
            stream.cancel()
        first = next(stream)
        if not self._is_same_store():
            log.info("etcd has another store than before: the peers are listed again")
            self._broken()
            return self._list()
        self._pause_s = FIRST_PAUSE_S
        if self._warned:
            self._warned = False
            log.info("the watch goes on, from revision %d", self._revision + 1)
        return self._tell(first)

    def _is_same_store(self) -> bool:
        """Whether etcd holds what this watch has seen. Raises CompactedError if it cannot tell.

        The lease tells two stores apart in which the same peers registered in the same order.
        """
        newest = self._newest
        if newest is None:  # nothing was seen, so nothing that was before may be there
            items, revision = self._etcd.list(self._folder)
            return revision >= self._revision and all(
                item.mod_revision > self._revision for item in items
            )
        # The second only where it was written again: it may be compacted.
        return newest == self._etcd.get(newest.key) or (
            newest == self._etcd.get(newest.key, newest.mod_revision)
        )

    def _tell(self, changes: Iterable[Change]) -> list[Event]:
        events: list[Event] = []
        for change in changes:
            events += self._event(change)
            self._revision = change.item.mod_revision
        return events

    def _list(self) -> list[Event]:
        """What is there now, told as the difference to what was told before."""
        items, revision = self._etcd.list(self._folder)
        found = {item.key: item for item in items}
        events: list[Event] = [
            Left(self._told.pop(key), revision) for key in [*self._told] if key not in found
        ]
        for item in items:
            record = self._read(item)
            if record is None or record != self._told.get(item.key):
                events += self._event(Change(item, deleted=False))
        self._skipped &= found.keys()
        self._revision = revision
        self._newest = max(items, key=lambda item: item.mod_revision, default=None)
        self._is_listed = True
        return events

    def _event(self, change: Change) -> Iterator[Event]:
        item, deleted = change
        known = self._told.pop(item.key, None)
        self._skipped.discard(item.key)
        record = None
        if not deleted:
            self._newest = item
            record = self._read(item)
        if record is not None:
            self._told[item.key] = record
            yield (Joined if known is None else Updated)(record, item.mod_revision)
        elif known is not None:
            yield Left(known, item.mod_revision)

    def _read(self, item: KeyValue) -> PeerRecord | None:
        record = self._reader.read(item.key, item.value)
        if record is None:
            self._skipped.add(item.key)
        return record
