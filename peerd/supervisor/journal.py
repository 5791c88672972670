"""The journal: what happened to peers, workers and services, as typed events.

Problem. Many parts need to know that a worker became ready or died: the scaler, the stop, systemd's
status line, the metrics, ``peerd events``. If the part that notices it called them directly, they would
run in the middle of its work and could call back into it.

So the part that notices something publishes an event, once, and knows no reader::

    journal.publish(WorkerReady(slot=3, peer_id="localhost:5004", pid=4711))

and a reader subscribes to a type. A base class stands for all its subclasses, ``Event`` for everything::

    journal.subscribe(WorkerDied, self._on_worker_died)

Invariants: publish() only queues. The loop delivers after the current callback and before the next
one; events arrive in the order of publication; each event reaches all its subscribers, in the order in
which they subscribed, before the next event is delivered.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import ClassVar, TypeVar, dataclass_transform

from peerd.supervisor.death import Death
from peerd.supervisor.loop import Loop

C = TypeVar("C")


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
def event(cls: type[C]) -> type[C]:
    """A frozen dataclass. It is frozen by Event's __setattr__, and has no repr and no eq, because each method
    that dataclass generates costs a tenth of a millisecond per class before the first peer starts."""
    return dataclass(kw_only=True, repr=False, eq=False)(cls)


@event
class Event:
    """Something that happened."""

    shown_as: ClassVar[str | None] = None
    """The name in ``peerd events``; None for events that only other parts of the supervisor read."""

    hidden: ClassVar[frozenset[str]] = frozenset(
        ("slot", "sentence", "is_provisional", "is_retried")
    )
    """Fields that ``peerd events`` does not show."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.__dict__:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    def details(self) -> dict[str, object]:
        """The fields in ``peerd events``, of a reason the first line; those that are None are left out."""
        names = [field.name for field in fields(self) if field.name not in self.hidden]
        found = {name: getattr(self, name) for name in names}
        if "why" in found:
            found["why"] = found["why"].partition("\n")[0]
        return found


@event
class PeerEvent(Event):
    """Something that happened to a peer."""

    slot: int
    peer_id: str


class SlotChanged(PeerEvent):
    """The peer has another state in the scoreboard."""


@event
class WorkerReady(PeerEvent):
    """Its loop has run for the first time."""

    shown_as = "ready"
    pid: int


@event
class WorkerStuck(PeerEvent):
    """Its loop is blocked, and the supervisor is about to kill it."""

    shown_as = "stuck"
    pid: int
    for_s: float  # The time since its last progress that the worker could have used
    sentence: str


@event
class SocketNotRead(PeerEvent):
    """Its loop runs but has read no datagram for the liveness timeout, so the peer is not ready."""

    shown_as = "not reading"
    health: str  # ``full``: too many handlers wait; ``unread``: for another reason
    for_s: float


class SocketReadAgain(PeerEvent):
    """The end of SocketNotRead, by the same worker or another one."""

    shown_as = "reads again"


@event
class WorkerDied(PeerEvent):
    """A worker ended without having been asked to."""

    shown_as = "died"
    death: Death

    def details(self) -> dict[str, object]:
        shown = {name: value for name, value in self.death._asdict().items() if name != "at_s"}
        return {"peer_id": self.peer_id, **shown, "oom": self.death.cause == "oom"}


@event
class WorkerReplaced(PeerEvent):
    """A worker has taken over from another one, as requested."""

    shown_as = "replaced"
    old_pid: int | None  # None: there was no worker
    pid: int
    gap_ms: float  # How long no process read the socket


@event
class WorkerNotReplaced(PeerEvent):
    """A replacement failed; the worker, if there was one, serves on."""

    shown_as = "not replaced"
    why: str


@event
class CannotStart(PeerEvent):
    """A worker reported that it cannot start, such as for an app that cannot be imported."""

    shown_as = "cannot start"
    why: str
    is_provisional: bool  # The peer is being added, and the scaling is undone
    is_retried: bool
    """False also where no peer was ever ready: the configuration is wrong, for every worker."""


@event
class CannotFork(Event):
    """The machine has no process or descriptor left for a worker or a service."""

    shown_as = "cannot fork"
    peer_id: str | None = None
    what: str | None = None  # The service, when it is no worker
    why: str


@event
class PeerParked(PeerEvent):
    """It is in a crash loop."""

    shown_as = "parked"
    hidden = PeerEvent.hidden | {"why"}
    retry_in_s: float
    why: str
    is_provisional: bool  # The peer is being added, and the scaling is undone


class PeerEnded(PeerEvent):
    """It was asked to stop, and has no process and no queue left."""


@event
class PeerClosed(PeerEvent):
    """Its socket was closed with datagrams in it."""

    shown_as = "closed"
    lost_unread: int


class PeersChanged(Event):
    """A peer was added or removed."""


@event
class ServiceDied(Event):
    """The registrar or the embedded etcd ended, and is started again."""

    shown_as = "died"
    what: str
    pid: int
    how: str


@event
class ServiceEnded(Event):
    """The registrar or the embedded etcd ended, and is not started again."""

    what: str


class RecordsChanged(Event):
    """The registrar has registered or revoked records."""


@event
class RecordInConflict(PeerEvent):
    """Another process holds the peer's record in etcd."""

    shown_as = "conflict"
    why: str


class RecordRecovered(PeerEvent):
    """No other process holds the peer's record any more."""

    shown_as = "conflict resolved"


@event
class RepliesWithheld(PeerEvent):
    """Replies that looked like a loop of servers were not sent (ext/peerd/loop_guard.pxd)."""

    shown_as = "replies withheld"
    to_peers: int  # Replies to the socket of a peer of this supervisor
    over_rate: int  # Replies above --max-reply-rate


@event
class ReloadChanged(Event):
    """A reload began or ended."""

    is_running: bool


@event
class Scaled(Event):
    """Peers were added or removed."""

    shown_as = "scaled"
    before: int
    peers: int


@event
class NotScaled(Event):
    """A scaling was refused, or failed and was undone."""

    shown_as = "not scaled"
    why: str


@event
class Stopping(Event):
    """The supervisor has begun to stop."""

    shown_as = "stopping"
    exit_code: int


E = TypeVar("E", bound=Event)


class Journal:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._subscribers: list[tuple[type[Event], Callable[[Event], object]]] = []

    def subscribe(self, kind: type[E], on_event: Callable[[E], object]) -> None:
        """Call ``on_event`` with each event of this type that is published from now on."""
        # Sound: deliver() calls it with instances of ``kind`` only.
        self._subscribers.append((kind, on_event))  # type: ignore[arg-type]

    def publish(self, event: Event) -> None:
        self._loop.call_soon(lambda: self._deliver(event))

    def _deliver(self, event: Event) -> None:
        for kind, on_event in list(self._subscribers):
            if isinstance(event, kind):
                on_event(event)


MAX_EVENTS = 1000  # The oldest is dropped


class History:
    """The newest events, as ``peerd events`` shows them.

    Times are on the monotonic clock and shown as ages, so a step of the wall clock changes no order.
    """

    def __init__(self, journal: Journal) -> None:
        self._events: deque[tuple[int, float, Event]] = deque(maxlen=MAX_EVENTS)
        self._last = 0
        journal.subscribe(Event, self._on_event)

    def since(self, arguments: Mapping[str, object]) -> list[dict[str, object]]:
        """The events with a number above ``after`` (0: all), oldest first, each with its ``age_s``."""
        after = arguments.get("after", 0)
        if type(after) is not int:
            after = 0
        now_s = time.monotonic()
        return [
            {
                "number": number,
                "age_s": round(now_s - at_s, 3),
                "event": event.shown_as,
                **{name: value for name, value in event.details().items() if value is not None},
            }
            for number, at_s, event in self._events
            if number > after
        ]

    def _on_event(self, event: Event) -> None:
        if event.shown_as is not None:
            self._last += 1
            self._events.append((self._last, time.monotonic(), event))
