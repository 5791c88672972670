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
from typing import TypeVar

from peerd.supervisor.events import Event
from peerd.supervisor.loop import Loop

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
