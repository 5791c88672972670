"""Takes in the connections of a listening socket, and none while there is no descriptor for one.

A connection that cannot be accepted (EMFILE) stays where it is, so the socket stays readable, and a loop that
only tried again would have the CPU for itself. So it is not looked at for a moment; whoever waits there is
served later.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable

from peerd.supervisor.loop import Loop, Timer

REST_S = 0.25

MOST_AT_ONCE = 64
"""Connections that are accepted in one turn of the loop."""


class Listener:
    def __init__(
        self, loop: Loop, sock: socket.socket, admit: Callable[[socket.socket], None]
    ) -> None:
        """``sock`` must not block, and is this object's from here on. ``admit`` gets each connection."""
        self._loop = loop
        self._sock = sock
        self._admit = admit
        self._rest: Timer | None = None
        self._listen()

    def close(self) -> None:
        if self._rest is None:
            self._loop.selector.unregister(self._sock)
        else:
            self._rest.cancel()
        self._sock.close()

    def _listen(self) -> None:
        self._rest = None
        self._loop.selector.register(self._sock, selectors.EVENT_READ, self._accept)

    def _accept(self, _events: int) -> None:
        for _ in range(MOST_AT_ONCE):
            try:
                connection, _address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.selector.unregister(self._sock)
                self._rest = self._loop.call_later(REST_S, self._listen)
                return
            self._admit(connection)
