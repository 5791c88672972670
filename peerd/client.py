"""Messages to peers: one socket a target, so that an unreachable one fails at once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from peerd._core import Message, decode, encode
from peerd.address import Address
from peerd.errors import DecodeError, NoAnswerError, SettingsError

if TYPE_CHECKING:
    from peerd.registry import PeerRecord

DEFAULT_VERSION = "1.0"
MAX_DATAGRAM_BYTES = 65507


def resolve(target: str, nodes: Callable[[], list[PeerRecord]]) -> Address:
    """The address of ``host:port`` or of a peer id; only the latter calls ``nodes``.

    Raises SettingsError for a port out of range, NoAnswerError for a peer id that nobody has.
    """
    host, colon, port = target.rpartition(":")
    if colon and host and port.isdecimal():
        if not 1 <= int(port) <= 65535:
            raise SettingsError(f"target {target!r}: a port is a number from 1 to 65535")
        return Address(host.removeprefix("[").removesuffix("]"), int(port))
    for record in nodes():
        if record.peer_id == target:
            return Address(record.url, record.port)
    raise NoAnswerError(f"no peer has the id {target!r}: 'peerd nodes' shows those that are there")


class PeerClient:
    """A socket connected to one peer: other senders' datagrams do not reach it.

    Raises NoAnswerError when the host does not resolve.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._socket = _connect(address)

    def send(self, magic: str, body: bytes = b"", version: str = DEFAULT_VERSION) -> None:
        """Send and expect nothing. Raises NoAnswerError if the last one is known to have been refused."""
        datagram = encode(magic, version, body)
        if len(datagram) > MAX_DATAGRAM_BYTES:
            raise SettingsError(
                f"a message of {len(datagram)} bytes does not fit into a UDP datagram "
                f"({MAX_DATAGRAM_BYTES} bytes)"
            )
        try:
            self._socket.send(datagram)
        except OSError as error:
            raise self._no_answer(os.strerror(error.errno or 0)) from None

    def request(
        self,
        magic: str,
        body: bytes = b"",
        version: str = DEFAULT_VERSION,
        *,
        timeout_s: float = 1.0,
        is_answer: Callable[[Message], bool] = lambda _: True,
    ) -> Message:
        """Send, and wait for the first message of the peer that ``is_answer``.

        Raises NoAnswerError after ``timeout_s``, or at once when the host says that nobody listens.
        """
        self.send(magic, body, version)
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            self._socket.settimeout(left_s)
            try:
                message = decode(self._socket.recv(1 << 16), (self.address.host, self.address.port))
            except DecodeError:
                continue
            except TimeoutError:
                break
            except OSError as error:
                raise self._no_answer(os.strerror(error.errno or 0)) from None
            if is_answer(message):
                return message
        raise self._no_answer(f"nothing within {timeout_s:g} s")

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _no_answer(self, cause: str) -> NoAnswerError:
        return NoAnswerError(f"no answer from {self.address}: {cause}")


def _connect(address: Address) -> socket.socket:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
        # As the supervisor binds "localhost": IPv4 first.
        family, kind, protocol, _, target = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        connected = socket.socket(family, kind, protocol)
        try:
            connected.connect(target)
        except OSError:
            connected.close()
            raise
    except OSError as error:
        raise NoAnswerError(f"no answer from {address}: {error.strerror or error}") from None
    return connected
