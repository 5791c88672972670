"""The life of a peer: every state, every event, and the state that follows.

Three clocks go with it, and none is taken for another. Boot: while a worker loads its app, only
``boot_timeout_s`` ends it. Ready: said by the worker when its loop has turned, never guessed from the time
that has passed; what a long life is worth is counted from there (restart.py). Alive: looked at only
when it is ready (liveness.py).

A peer stays READY while its worker is replaced, since somebody reads its socket all the time.

    START      a worker was forked for a socket that nobody reads
    SERVE      its loop has turned
    FAIL       it has died, or could not be forked; another try comes soon
    PARK       the same, once too often: the next try is a minute away
    STOP       the supervisor stops, or the peer is scaled away
    END        it has no process any more, and is to have none
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from peerd._scoreboard import PeerState


class Event(enum.Enum):
    START = enum.auto()
    SERVE = enum.auto()
    FAIL = enum.auto()
    PARK = enum.auto()
    STOP = enum.auto()
    END = enum.auto()


_STOPPED, _STARTING, _READY, _STOPPING, _BACKOFF, _CRASHLOOP = PeerState

TRANSITIONS: Mapping[tuple[PeerState, Event], PeerState] = {
    (_STOPPED, Event.START): _STARTING,
    (_STOPPED, Event.FAIL): _BACKOFF,  # the first fork has failed
    (_STOPPED, Event.PARK): _CRASHLOOP,
    (_STOPPED, Event.STOP): _STOPPING,
    (_STOPPED, Event.END): _STOPPED,
    (_STARTING, Event.START): _STARTING,  # a successor, whose predecessor died meanwhile
    (_STARTING, Event.SERVE): _READY,
    (_STARTING, Event.FAIL): _BACKOFF,
    (_STARTING, Event.PARK): _CRASHLOOP,
    (_STARTING, Event.STOP): _STOPPING,
    (_STARTING, Event.END): _STOPPED,
    (_READY, Event.START): _STARTING,  # the worker died while its successor was loading
    (_READY, Event.SERVE): _READY,  # a successor has taken over
    (_READY, Event.FAIL): _BACKOFF,
    (_READY, Event.PARK): _CRASHLOOP,
    (_READY, Event.STOP): _STOPPING,
    (_READY, Event.END): _STOPPED,
    (_STOPPING, Event.START): _STOPPING,  # a successor that is owed the queue
    (_STOPPING, Event.SERVE): _STOPPING,
    (_STOPPING, Event.FAIL): _STOPPING,
    (_STOPPING, Event.PARK): _STOPPING,
    (_STOPPING, Event.STOP): _STOPPING,
    (_STOPPING, Event.END): _STOPPED,
    (_BACKOFF, Event.START): _STARTING,
    (_BACKOFF, Event.FAIL): _BACKOFF,
    (_BACKOFF, Event.PARK): _CRASHLOOP,
    (_BACKOFF, Event.STOP): _STOPPING,
    (_BACKOFF, Event.END): _STOPPED,
    (_CRASHLOOP, Event.START): _STARTING,
    (_CRASHLOOP, Event.FAIL): _BACKOFF,
    (_CRASHLOOP, Event.PARK): _CRASHLOOP,
    (_CRASHLOOP, Event.STOP): _STOPPING,
    (_CRASHLOOP, Event.END): _STOPPED,
}
"""What is not in it cannot happen: nobody serves who was not started."""
