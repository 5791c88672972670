"""The life of a peer: for every state and event, the next state and what is to be done.

A peer has three clocks, which are kept apart. Boot: while a worker loads its app, only ``boot_timeout_s``
ends it. Ready: reported by the worker once its loop has run, never inferred from elapsed time; restart.py
counts from there. Alive: checked only while the peer is ready (liveness.py).

A peer stays READY while its worker is replaced, because a worker reads its socket all the time.

    START      a worker was given the socket
    SERVE      its loop has run
    LOSE       it died while its successor, which is next, loads the app
    FAIL       it died, or could not be forked; the next attempt is near
    PARK       the same, once too often: the next attempt is a minute away
    STOP       the supervisor stops, or the peer is scaled away
    END        it has no process any more, and is to have none
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

from peerd._scoreboard import PeerState


class LifecycleEvent(enum.Enum):
    START = enum.auto()
    SERVE = enum.auto()
    LOSE = enum.auto()
    FAIL = enum.auto()
    PARK = enum.auto()
    STOP = enum.auto()
    END = enum.auto()


class LifecycleAction(enum.Enum):
    LIMIT_BOOT = enum.auto()  # Kill the worker if it is not ready in time
    ANNOUNCE = enum.auto()  # Publish that the peer is served; complete a replacement
    ANNOUNCE_AND_DRAIN = enum.auto()
    """The same, and the worker ends when it has served the queue, if that was asked for."""

    RETRY = enum.auto()  # Start a worker when the delay is over
    RETRY_SLOWLY = enum.auto()  # The same, and publish that the peer is parked
    WITHDRAW = enum.auto()
    """Cancel restarts and replacements that have not begun; the worker serves on."""

    REPORT_END = enum.auto()
    NOTHING = enum.auto()


class Transition(NamedTuple):
    state: PeerState
    action: LifecycleAction


_STOPPED, _STARTING, _READY, _STOPPING, _BACKOFF, _CRASHLOOP = PeerState

_FAIL = Transition(_BACKOFF, LifecycleAction.RETRY)
_PARK = Transition(_CRASHLOOP, LifecycleAction.RETRY_SLOWLY)
_START = Transition(_STARTING, LifecycleAction.LIMIT_BOOT)
_SERVE = Transition(_READY, LifecycleAction.ANNOUNCE)
_STOP = Transition(_STOPPING, LifecycleAction.WITHDRAW)
_END = Transition(_STOPPED, LifecycleAction.REPORT_END)
_STAY_STOPPING = Transition(_STOPPING, LifecycleAction.NOTHING)

_WITHOUT_WORKER = {
    LifecycleEvent.START: _START,
    LifecycleEvent.FAIL: _FAIL,  # the fork failed
    LifecycleEvent.PARK: _PARK,
    LifecycleEvent.STOP: _STOP,
    LifecycleEvent.END: _END,
}
_WITH_WORKER = {
    **_WITHOUT_WORKER,
    LifecycleEvent.SERVE: _SERVE,
    LifecycleEvent.LOSE: Transition(_STARTING, LifecycleAction.NOTHING),
}

_TABLE: Mapping[PeerState, Mapping[LifecycleEvent, Transition]] = {
    _STOPPED: _WITHOUT_WORKER,
    _BACKOFF: _WITHOUT_WORKER,
    _CRASHLOOP: _WITHOUT_WORKER,
    _STARTING: _WITH_WORKER,
    _READY: {
        **_WITH_WORKER,
        LifecycleEvent.START: Transition(_READY, LifecycleAction.LIMIT_BOOT),  # it takes over
    },
    _STOPPING: {
        # A worker is started to serve the queue.
        LifecycleEvent.START: Transition(_STOPPING, LifecycleAction.LIMIT_BOOT),
        LifecycleEvent.SERVE: Transition(_STOPPING, LifecycleAction.ANNOUNCE_AND_DRAIN),
        LifecycleEvent.LOSE: _STAY_STOPPING,
        LifecycleEvent.FAIL: _STAY_STOPPING,
        LifecycleEvent.PARK: _STAY_STOPPING,
        LifecycleEvent.STOP: _STAY_STOPPING,
        LifecycleEvent.END: _END,
    },
}

TRANSITIONS: Mapping[tuple[PeerState, LifecycleEvent], Transition] = {
    (state, event): transition
    for state, transitions in _TABLE.items()
    for event, transition in transitions.items()
}
"""Pairs that are missing cannot occur: a worker must have been started before it serves."""
