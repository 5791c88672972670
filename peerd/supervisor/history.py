"""The newest events of the journal, as ``peerd events`` shows them.

Times are on the monotonic clock and shown as ages, so a step of the wall clock changes no order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from peerd.supervisor.journal import Event, Journal

MAX_EVENTS = 1000
"""The oldest is dropped."""


class History:
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
