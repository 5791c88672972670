"""The client for threads."""

from __future__ import annotations

import time
from typing import Self

from peerd._envelope import Message
from peerd.clients.client_base import (
    DEFAULT_VERSION,
    RECEIVE_BYTES,
    ClientBase,
    Target,
    failures_named,
    unreachable_skipped,
)
from peerd.clients.endpoints import resolve
from peerd.clients.request import IsAnswer, Request
from peerd.errors import NoAnswerError


class PeerClient(ClientBase):
    """Sends messages to peers and waits for their replies. A context manager; usable from any thread.

        with Registry(...) as registry, registry.cache() as cache, PeerClient(cache) as client:
            cache.wait_current(5.0)
            reply = client.request("orders-3", "ASK", b"...", timeout=0.5, retries=2)

    A target is a string that :meth:`locate` reads, an ``(address, port)`` or a PeerRecord. Every method
    raises SettingsError for an invalid target, message or limit, whatever ``peers`` raises, and
    RuntimeError after :meth:`close`.
    """

    def request(
        self,
        target: Target,
        magic: str,
        body: bytes = b"",
        timeout: float = 1.0,
        retries: int = 0,
        *,
        version: str = DEFAULT_VERSION,
        is_answer: IsAnswer = lambda _: True,
    ) -> Message:
        """Send a message and return the first reply for which ``is_answer`` is true.

        ``timeout``: seconds per attempt; resolving a host name can take longer. ``retries``: attempts
        after the first. Each attempt locates the target anew and accepts only replies to itself.

        Raises NoAnswerError when the last attempt times out or its peer cannot be reached; in the
        second case without waiting for the timeout.
        """
        request = Request(self._encode(magic, version, body), timeout, retries, is_answer)
        while True:
            request.begin_attempt()
            try:
                return self._attempt(target, request)
            except NoAnswerError as error:
                time.sleep(request.pause_after_s(error))

    def send(
        self, target: Target, magic: str, body: bytes = b"", *, version: str = DEFAULT_VERSION
    ) -> None:
        """Send a message and expect no reply. Raises NoAnswerError when there is no route to the peer."""
        self._send(target, self._encode(magic, version, body))

    def broadcast(
        self,
        magic: str,
        body: bytes = b"",
        partition_key: str | None = None,
        *,
        version: str = DEFAULT_VERSION,
    ) -> int:
        """Send a message to every peer, or every peer with this partition key; return how many got it.

        A peer that cannot be sent to is logged (debug) and skipped.
        """
        datagram = self._encode(magic, version, body)
        sent = 0
        for record in self._recipients(partition_key):
            with unreachable_skipped():
                self._send(record, datagram)
                sent += 1
        return sent

    def close(self) -> None:
        """Requests that are under way in other threads run to their end."""
        self._send_sockets.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attempt(self, target: Target, request: Request) -> Message:
        address = self.locate(target)
        with failures_named(target, address, request.timeout_s):
            endpoint = resolve(address)
            with self._attempt_sockets.connect(endpoint) as sock:
                sock.send(request.datagram)
                while True:
                    sock.settimeout(request.remaining_s())
                    datagram = sock.recv(RECEIVE_BYTES)
                    if (answer := request.answer_in(datagram, endpoint)) is not None:
                        return answer

    def _send(self, target: Target, datagram: bytes) -> None:
        address = self.locate(target)
        with failures_named(target, address):
            endpoint = resolve(address)
            self._send_sockets.of(endpoint.family).sendto(datagram, endpoint.sockaddr)
