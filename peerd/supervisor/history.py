"""What has happened to the processes of a supervisor, as far back as there is room: ``peerd events``.

Times are on the monotonic clock and told as ages, so that a step of the wall clock changes no order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

LONGEST = 1000
"""Events; the oldest goes."""


class History:
    def __init__(self) -> None:
        self._events: deque[tuple[int, float, dict[str, object]]] = deque(maxlen=LONGEST)
        self._last = 0

    def note(self, kind: str, **details: object) -> None:
        """``kind`` is a word, in the past tense: died, replaced. Details without a value are left out."""
        self._last += 1
        known = {name: value for name, value in details.items() if value is not None}
        self._events.append((self._last, time.monotonic(), {"event": kind, **known}))

    def since(self, arguments: Mapping[str, object]) -> list[dict[str, object]]:
        """Those with a number above ``after`` (0: all), oldest first, each with its ``age_s``."""
        after = arguments.get("after", 0)
        if type(after) is not int:
            after = 0
        now_s = time.monotonic()
        return [
            {"number": number, "age_s": round(now_s - at_s, 3), **event}
            for number, at_s, event in self._events
            if number > after
        ]
