"""The supervisor's one loop: callbacks for descriptors that can be read, and for times that come.

Not asyncio, which a forked child would inherit in the middle of a callback, and which costs each worker
megabytes.
"""

from __future__ import annotations

import heapq
import itertools
import selectors
import time
from collections.abc import Callable

Callback = Callable[[], object]


class Timer:
    """A callback that waits for its time. Cancelling it more than once, or too late, is fine."""

    def __init__(self, callback: Callback | None = None) -> None:
        """Without a callback, one whose time is over."""
        self._callback = callback

    def cancel(self) -> None:
        self._callback = None

    @property
    def is_waiting(self) -> bool:
        return self._callback is not None

    def _run(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Loop:
    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        """For servers that wait for writing too: the data are a callback that takes the events."""

        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def watch(self, fd: int, callback: Callback) -> None:
        """Call it whenever ``fd`` can be read, or is at its end."""
        self.selector.register(fd, selectors.EVENT_READ, lambda _events: callback())

    def unwatch(self, fd: int) -> None:
        self.selector.unregister(fd)

    def call_at(self, when_s: float, callback: Callback) -> Timer:
        """``when_s`` is a monotonic time."""
        timer = Timer(callback)
        # The number keeps those of one time in order, and timers from being compared.
        heapq.heappush(self._timers, (when_s, next(self._numbers), timer))
        return timer

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        return self.call_at(time.monotonic() + delay_s, callback)

    def turn(self) -> None:
        """Wait for what comes next, and call what is due."""
        for key, events in self.selector.select(self._timeout_s()):
            # A callback may have unregistered what comes later in the same list, or even have
            # given its descriptor's number to something new.
            current = self.selector.get_map().get(key.fd)
            if current is not None and current.data is key.data:
                key.data(events)
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            heapq.heappop(self._timers)[2]._run()

    def close(self) -> None:
        self.selector.close()

    def _timeout_s(self) -> float | None:
        while self._timers and not self._timers[0][2].is_waiting:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())
