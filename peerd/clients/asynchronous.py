"""The client for an event loop, asyncio's or uvloop's; client.py has its theory and what is shared."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from peerd._core import Message
from peerd.address import Address
from peerd.clients.blocking import (
    DEFAULT_VERSION,
    RECEIVE_BYTES,
    ClientBase,
    Endpoint,
    IsAnswer,
    Target,
    check_limits,
    failures_named,
    message_in,
    numeric,
    pause_s,
    preferred,
)
from peerd.errors import NoAnswerError

if TYPE_CHECKING:
    from peerd.registry import PeerRecord

log = logging.getLogger(__name__)


class AsyncPeerClient(ClientBase):
    """:class:`peerd.PeerClient` for coroutines. An async context manager; of any event loop.

        async with AsyncPeerClient(cache) as client:
            reply = await client.request("orders-3", "ASK", b"...", timeout=0.5, retries=2)

    A request has a socket until it ends, so the limit on open files bounds how many there can be at a
    time. One that is cancelled leaves nothing open. ``peers`` is asked in the event loop's thread and
    must not block: a cache does not.
    """

    async def request(
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
        """As :meth:`peerd.PeerClient.request`; ``timeout`` bounds the look-up of a name too."""
        datagram = self._datagram(magic, version, body)
        check_limits(timeout, retries)
        while True:
            started_s = time.monotonic()
            try:
                return await self._try(target, datagram, timeout, is_answer)
            except NoAnswerError:
                if not retries:
                    raise
            retries -= 1
            await asyncio.sleep(pause_s(started_s, timeout))

    async def send(
        self, target: Target, magic: str, body: bytes = b"", *, version: str = DEFAULT_VERSION
    ) -> None:
        """As :meth:`peerd.PeerClient.send`."""
        await self._send(target, self._datagram(magic, version, body))

    async def broadcast(
        self,
        magic: str,
        body: bytes = b"",
        partition_key: str | None = None,
        *,
        version: str = DEFAULT_VERSION,
    ) -> int:
        """As :meth:`peerd.PeerClient.broadcast`; names are looked up side by side."""
        datagram = self._datagram(magic, version, body)
        records = self._everyone(partition_key)
        return sum(await asyncio.gather(*(self._sent(record, datagram) for record in records)))

    async def close(self) -> None:
        """Requests of other tasks that are under way come to their own end."""
        self._senders.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _try(
        self, target: Target, datagram: bytes, timeout_s: float, is_answer: IsAnswer
    ) -> Message:
        address = self.locate(target)
        with failures_named(target, address, timeout_s):
            async with asyncio.timeout(timeout_s):
                endpoint = await _resolve(address)
                with self._ports.connect(endpoint) as sock:
                    sock.setblocking(False)
                    sock.send(datagram)
                    return await _answer(sock, endpoint, is_answer)

    async def _send(self, target: Target, datagram: bytes) -> None:
        address = self.locate(target)
        with failures_named(target, address):
            endpoint = await _resolve(address)
            sock = self._senders.of(endpoint.family)
            try:
                sock.sendto(datagram, socket.MSG_DONTWAIT, endpoint.sockaddr)
            except BlockingIOError:
                # The send buffer is full, which is rare enough for a thread that waits.
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(None, sock.sendto, datagram, endpoint.sockaddr)

    async def _sent(self, record: PeerRecord, datagram: bytes) -> bool:
        try:
            await self._send(record, datagram)
        except NoAnswerError as error:
            log.debug("broadcast: %s", error)
            return False
        return True


async def _resolve(address: Address) -> Endpoint:
    endpoint = numeric(address)
    if endpoint is not None:
        return endpoint
    loop = asyncio.get_running_loop()
    return preferred(await loop.getaddrinfo(*address, type=socket.SOCK_DGRAM))


async def _answer(sock: socket.socket, endpoint: Endpoint, is_answer: IsAnswer) -> Message:
    # Not a datagram transport, which would close its socket only at some later turn of the loop.
    loop = asyncio.get_running_loop()
    while True:
        message = message_in(await loop.sock_recv(sock, RECEIVE_BYTES), endpoint)
        if message is not None and is_answer(message):
            return message
        # sock_recv does not wait where there is something: a peer that floods would stop the loop.
        await asyncio.sleep(0)
