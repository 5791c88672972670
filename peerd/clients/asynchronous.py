"""The client for coroutines, on any asyncio event loop."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Self

from peerd._envelope import Message
from peerd.address import Address
from peerd.clients.client_base import (
    DEFAULT_VERSION,
    RECEIVE_BYTES,
    ClientBase,
    Target,
    failures_named,
    unreachable_skipped,
)
from peerd.clients.endpoints import Endpoint, numeric, preferred
from peerd.clients.request import IsAnswer, Request
from peerd.errors import NoAnswerError

if TYPE_CHECKING:
    from peerd.registry import PeerRecord


class AsyncPeerClient(ClientBase):
    """:class:`peerd.PeerClient` for coroutines. An async context manager.

        async with AsyncPeerClient(cache) as client:
            reply = await client.request("orders-3", "ASK", b"...", timeout=0.5, retries=2)

    A request holds one socket until it ends, so the limit on open files bounds how many can be under
    way. A cancelled request leaves nothing open. ``peers`` is called in the event loop's thread and must
    not block: a cache does not.
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
        """See :meth:`peerd.PeerClient.request`; here ``timeout`` bounds the DNS look-up as well."""
        request = Request(self._encode(magic, version, body), timeout, retries, is_answer)
        while True:
            request.begin_attempt()
            try:
                return await self._attempt(target, request)
            except NoAnswerError as error:
                await asyncio.sleep(request.pause_after_s(error))

    async def send(
        self, target: Target, magic: str, body: bytes = b"", *, version: str = DEFAULT_VERSION
    ) -> None:
        """See :meth:`peerd.PeerClient.send`."""
        await self._send(target, self._encode(magic, version, body))

    async def broadcast(
        self,
        magic: str,
        body: bytes = b"",
        partition_key: str | None = None,
        *,
        version: str = DEFAULT_VERSION,
    ) -> int:
        """See :meth:`peerd.PeerClient.broadcast`; host names are resolved concurrently."""
        datagram = self._encode(magic, version, body)
        sent = []

        async def try_send(record: PeerRecord) -> None:
            with unreachable_skipped():
                await self._send(record, datagram)
                sent.append(record)

        await asyncio.gather(*map(try_send, self._recipients(partition_key)))
        return len(sent)

    async def close(self) -> None:
        """Requests that are under way in other tasks run to their end."""
        self._send_sockets.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _attempt(self, target: Target, request: Request) -> Message:
        address = self.locate(target)
        with failures_named(target, address, request.timeout_s):
            async with asyncio.timeout(request.timeout_s):
                endpoint = await _resolve(address)
                with self._attempt_sockets.connect(endpoint) as sock:
                    sock.setblocking(False)
                    sock.send(request.datagram)
                    # Not a datagram transport, which would close its socket only in a later iteration.
                    loop = asyncio.get_running_loop()
                    while True:
                        datagram = await loop.sock_recv(sock, RECEIVE_BYTES)
                        if (answer := request.answer_in(datagram, endpoint)) is not None:
                            return answer
                        # sock_recv does not yield while datagrams are queued, so a peer that floods
                        # would block the loop.
                        await asyncio.sleep(0)

    async def _send(self, target: Target, datagram: bytes) -> None:
        address = self.locate(target)
        with failures_named(target, address):
            endpoint = await _resolve(address)
            sock = self._send_sockets.of(endpoint.family)
            try:
                sock.sendto(datagram, socket.MSG_DONTWAIT, endpoint.sockaddr)
            except BlockingIOError:
                # The send buffer is full. This is rare enough for a thread that waits.
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(None, sock.sendto, datagram, endpoint.sockaddr)


async def _resolve(address: Address) -> Endpoint:
    loop = asyncio.get_running_loop()
    return numeric(address) or preferred(await loop.getaddrinfo(*address, type=socket.SOCK_DGRAM))
