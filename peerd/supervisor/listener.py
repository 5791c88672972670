"""Accepts connections on a listening socket, and pauses when there is no descriptor for another one.

A connection that cannot be accepted (EMFILE) stays in the backlog, so the socket stays readable, and a loop
that kept trying would use a whole CPU. The listener therefore stops watching the socket for a moment; the
clients in the backlog wait that much longer.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable

from peerd.supervisor.loop import Loop, Timer

PAUSE_S = 0.25

MAX_ACCEPTS = 64
"""Connections accepted per iteration of the loop."""


class Listener:
    def __init__(
        self, loop: Loop, sock: socket.socket, on_connection: Callable[[socket.socket], None]
    ) -> None:
        """``sock`` must not block; the listener owns it from here on. It passes each connection on."""
        self._loop = loop
        self._sock = sock
        self._on_connection = on_connection
        self._pause: Timer | None = None
        self._listen()

    def close(self) -> None:
        if self._pause is None:
            self._loop.selector.unregister(self._sock)
        else:
            self._pause.cancel()
        self._sock.close()

    def _listen(self) -> None:
        self._pause = None
        self._loop.selector.register(self._sock, selectors.EVENT_READ, self._accept)

    def _accept(self, _events: int) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                connection, _address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.selector.unregister(self._sock)
                self._pause = self._loop.call_later(PAUSE_S, self._listen)
                return
            self._on_connection(connection)
