"""Signals as events of the loop."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Collection, Iterator

from peerd.supervisor.loop import Loop


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
