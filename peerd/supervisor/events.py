"""What happened to peers, workers and services: the types of event in the journal (journal.py)."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields
from typing import ClassVar, TypeVar, dataclass_transform

from peerd.supervisor.death import Death

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
