"""Serves requests on stream connections from within the supervisor's selector, and never blocks.

Each client costs one entry in a table of fixed size, with at most ``max_request_bytes`` of unanswered input
and one unsent answer. So no client, however slow or hostile, can make the supervisor wait or grow:

- A client that sends more than fits, closes its side, or fails is dropped.
- When the table is full, a new client displaces the oldest one that has had its answer (it may have hung up
  already), else the oldest one that does not wait for an answer, else the oldest.
- With ``client_timeout_s``, clients older than that are dropped when the next one connects.
- A client gets one answer per iteration of the loop, and its next request is looked at when the answer has
  left: a client that sends many requests neither delays the others nor piles up answers.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from peerd.supervisor.loop import Loop, Timer

CHUNK_BYTES = 64 * 1024

Reply = Callable[[Iterable[bytes]], None]
"""Sends an answer, given in parts. Does nothing once the client is gone."""


@dataclass(frozen=True, kw_only=True)
class ServerProtocol:
    """The limits, and what differs between one kind of request and another."""

    max_clients: int
    max_request_bytes: int
    client_timeout_s: float | None = None
    split: Callable[[bytes], tuple[bytes, bytes] | None]
    """Input -> the first request and what follows it; None while the request is incomplete."""

    answer: Callable[[bytes, Reply], None]
    """Handles a request and replies, now or later. Must not raise."""

    is_allowed: Callable[[socket.socket], bool] = lambda _connection: True
    is_closed_after_answer: bool = False


class BoundedServer:
    def __init__(self, loop: Loop, sock: socket.socket, protocol: ServerProtocol) -> None:
        """``sock`` listens and must not block; the server owns it from here on."""
        self._selector = loop.selector
        self._protocol = protocol
        self._clients: dict[socket.socket, _Client] = {}
        self._listener = Listener(loop, sock, self._admit)

    def close(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._listener.close()

    def _admit(self, connection: socket.socket) -> None:
        if not self._protocol.is_allowed(connection):
            connection.close()
            return
        self._make_room()
        connection.setblocking(False)
        client = self._clients[connection] = _Client(connection, time.monotonic())
        self._selector.register(connection, selectors.EVENT_READ, partial(self._serve, client))

    def _make_room(self) -> None:
        timeout_s = self._protocol.client_timeout_s
        if timeout_s is not None:
            oldest_s = time.monotonic() - timeout_s
            for client in list(self._clients.values()):
                if client.connected_s <= oldest_s:
                    self._drop(client)
        if len(self._clients) >= self._protocol.max_clients:
            # min() returns the first of equals, and clients are in the order in which they connected.
            self._drop(
                min(self._clients.values(), key=lambda each: (each.awaits_answer, not each.is_idle))
            )

    def _serve(self, client: _Client, events: int) -> None:
        try:
            if events & selectors.EVENT_READ and not self._read(client):
                return
            if not client.unsent and not client.awaits_answer:
                self._answer_next(client)
            is_answered = bool(client.unsent)
            client.send()
        except BlockingIOError:
            is_answered = False
        except OSError:
            self._drop(client)
            return
        if is_answered and self._protocol.is_closed_after_answer:
            self._drop(client)
        else:
            has_request = (
                not client.awaits_answer and self._protocol.split(client.received) is not None
            )
            self._watch(client, for_writing=bool(client.unsent) or has_request)

    def _read(self, client: _Client) -> bool:
        chunk = client.connection.recv(CHUNK_BYTES)
        client.received += chunk
        if not chunk or len(client.received) > self._protocol.max_request_bytes:
            self._drop(client)
            return False
        return True

    def _answer_next(self, client: _Client) -> None:
        if found := self._protocol.split(client.received):
            request, client.received = found
            client.awaits_answer = True
            self._protocol.answer(request, partial(self._reply, client))

    def _reply(self, client: _Client, parts: Iterable[bytes]) -> None:
        if client.connection in self._clients:
            client.awaits_answer, client.was_answered = False, True
            client.unsent = deque(memoryview(part) for part in parts)
            self._watch(client, for_writing=True)

    def _watch(self, client: _Client, *, for_writing: bool) -> None:
        events = selectors.EVENT_WRITE if for_writing else selectors.EVENT_READ
        self._selector.modify(client.connection, events, partial(self._serve, client))

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.connection, None) is not None:
            self._selector.unregister(client.connection)
            client.connection.close()


@dataclass
class _Client:
    connection: socket.socket
    connected_s: float
    received: bytes = b""
    unsent: deque[memoryview] = field(default_factory=deque)
    awaits_answer: bool = False
    was_answered: bool = False

    @property
    def is_idle(self) -> bool:
        return self.was_answered and not self.received and not self.unsent

    def send(self) -> None:
        """Raises BlockingIOError when the kernel takes no more."""
        while self.unsent:
            part = self.unsent[0]
            part = self.unsent[0] = part[self.connection.send(part) :]
            if not part:
                self.unsent.popleft()


PAUSE_S = 0.25

MAX_ACCEPTS = 64  # Connections accepted per iteration of the loop


class Listener:
    """Accepts connections, and pauses when there is no descriptor for another one.

    A connection that cannot be accepted (EMFILE) stays in the backlog, so the socket stays readable, and a
    loop that kept trying would use a whole CPU. The clients in the backlog wait for the pause.
    """

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
