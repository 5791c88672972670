"""The supervisor's event loop: callbacks for readable descriptors, timers, signals, and for "soon".

A callback must not be interrupted by the consequences of what it does. call_soon() is how a part has
something done after the current callback: the loop runs what was queued this way, in order, before it
calls back anything else. Journal and Promise rest on it.

Rejected: asyncio. A forked child would inherit its loop in the middle of a callback, and it costs each
worker megabytes.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Generic, TypeVar

Callback = Callable[[], object]

T = TypeVar("T")


class Timer:
    """A callback that waits for its time. Cancelling it twice, or too late, has no effect."""

    def __init__(self, callback: Callback | None = None) -> None:
        """Without a callback, it is a timer that has run."""
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
        """For servers, which also wait for writing. The data of a key is a callback that takes the events."""

        self._soon: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def watch(self, fd: int, callback: Callback) -> None:
        """Call it whenever ``fd`` is readable or at its end."""
        self.selector.register(fd, selectors.EVENT_READ, lambda _events: callback())

    def unwatch(self, fd: int) -> None:
        self.selector.unregister(fd)

    def call_soon(self, callback: Callback) -> None:
        """Call it after the current callback and before any other."""
        self._soon.append(callback)

    def call_at(self, when_s: float, callback: Callback) -> Timer:
        """``when_s``: monotonic time."""
        timer = Timer(callback)
        # The number keeps timers with the same time in order, and from being compared.
        heapq.heappush(self._timers, (when_s, next(self._numbers), timer))
        return timer

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        return self.call_at(time.monotonic() + delay_s, callback)

    def run_once(self) -> None:
        """Wait until something is due, and run the callbacks of all that is."""
        if self._soon:  # queued before the loop ran
            self._run_soon()
            return
        for key, events in self.selector.select(self._timeout_s()):
            # An earlier callback may have unregistered this descriptor, or closed it and opened another
            # one with the same number.
            current = self.selector.get_map().get(key.fd)
            if current is not None and current.data is key.data:
                key.data(events)
                self._run_soon()
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            heapq.heappop(self._timers)[2]._run()
            self._run_soon()

    def close(self) -> None:
        self.selector.close()

    def _run_soon(self) -> None:
        while self._soon:
            self._soon.popleft()()

    def _timeout_s(self) -> float | None:
        while self._timers and not self._timers[0][2].is_waiting:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())


class Promise(Generic[T]):
    """A result that comes later: a value, or the reason why there is none.

    The part that does the work calls resolve() or reject(), once; any number of parts wait with then(). Their
    callbacks run in the loop after the current callback, never inside resolve(), reject() or then().
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._outcome: tuple[T] | str | None = None
        self._waiting: list[tuple[Callable[[T], object], Callable[[str], object]]] = []

    @property
    def is_settled(self) -> bool:
        return self._outcome is not None

    def resolve(self, value: T) -> None:
        self._settle((value,))

    def reject(self, why: str) -> None:
        self._settle(why)

    def then(self, on_value: Callable[[T], object], on_error: Callable[[str], object]) -> None:
        """Call one of the two when the outcome is known, soon if it is known already."""
        self._waiting.append((on_value, on_error))
        if self.is_settled:
            self._loop.call_soon(self._deliver)

    def _settle(self, outcome: tuple[T] | str) -> None:
        assert not self.is_settled
        self._outcome = outcome
        self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        outcome, waiting = self._outcome, self._waiting
        self._waiting = []
        assert outcome is not None
        for on_value, on_error in waiting:
            if isinstance(outcome, str):
                on_error(outcome)
            else:
                on_value(outcome[0])


@contextlib.contextmanager
def watch_signals(
    loop: Loop, numbers: Collection[signal.Signals], on_signal: Callable[[signal.Signals], object]
) -> Iterator[None]:
    """Call ``on_signal`` from the loop: Python writes each signal's number to a socketpair.

    Afterwards the signals are ignored, so that another one cannot change how this process ends.
    """
    reader, writer = socket.socketpair()

    def read() -> None:
        for number in reader.recv(4096):
            if number in numbers:
                on_signal(signal.Signals(number))

    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)
        loop.watch(reader.fileno(), read)
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(previous_fd)
            loop.unwatch(reader.fileno())
