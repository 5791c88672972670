"""The events that a watch reports, and those that it should have reported."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from harness.etcd_gateway import Change
from harness.eventually import eventually
from peerd.registry import Joined, Left, PeerRecord, Updated, Watch

Event = Joined | Updated | Left

_END_WITHIN_S = 30.0


class WatchRecorder:
    """Reads a watch in a thread, for a ``with`` block; fails if the watch raises or ends before it does."""

    def __init__(self, watch: Watch) -> None:
        self.events: list[Event] = []
        self._watch = watch
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="watch-recorder", daemon=True)

    def wait_for(self, records: dict[str, PeerRecord]) -> None:
        """Until exactly these peers are present according to the events."""

        def are_equal() -> bool:
            self.check_alive()
            now = replayed(self.events)
            wrong = {
                key: (now.get(key), records.get(key))
                for key in now.keys() | records.keys()
                if now.get(key) != records.get(key)
            }
            assert not wrong, f"(reported, in etcd): {wrong}; the last: {self.events[-3:]}"
            return True

        eventually(are_equal)

    def check_alive(self) -> None:
        if self._failure is not None:
            raise AssertionError(f"the watch raised {self._failure!r}") from self._failure
        assert self._thread.is_alive(), "the watch has ended"

    def __enter__(self) -> WatchRecorder:
        self._thread.start()
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        alive = self._thread.is_alive()
        self._watch.close()
        self._thread.join(_END_WITHIN_S)
        if error_type is None:
            assert not self._thread.is_alive(), "the watch continues after close()"
            assert alive, f"the watch has ended: {self._failure!r}"

    def _read(self) -> None:
        try:
            for event in self._watch:
                self.events.append(event)
        except BaseException as error:
            self._failure = error


def replayed(events: Iterable[Event]) -> dict[str, PeerRecord]:
    """The state after the events, which must be consistent: no present peer joins, and no absent peer changes
    or leaves."""
    there: dict[str, PeerRecord] = {}
    for event in list(events):
        peer_id = event.record.peer_id
        if isinstance(event, Left):
            assert there.get(peer_id) == event.record, f"{event}, but there is {there.get(peer_id)}"
            del there[peer_id]
        else:
            is_there = isinstance(event, Updated)
            assert (peer_id in there) is is_there, f"{event}, but there is {there.get(peer_id)}"
            there[peer_id] = event.record
    return there


def check_revisions(events: Iterable[Event]) -> None:
    """Each event of a peer is newer than the one before, so none is reported twice. For one history."""
    last: dict[str, Event] = {}
    for event in events:
        before = last.get(event.record.peer_id)
        assert before is None or before.revision < event.revision, f"{event} after {before}"
        last[event.record.peer_id] = event


def every_event(history: Iterable[Change]) -> list[Event]:
    """The events of a watch that has seen the complete history."""
    there: dict[bytes, PeerRecord] = {}
    events: list[Event] = []
    for revision, key, value in history:
        known = there.pop(key, None)
        if value is not None:
            there[key] = record = PeerRecord.from_json(value)
            events.append((Joined if known is None else Updated)(record, revision))
        elif known is not None:
            events.append(Left(known, revision))
    return events
