"""A client with no peerd code in it: the envelope by ``struct``, a plain socket."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager


def pack(magic: bytes, version: bytes, body: bytes) -> bytes:
    return struct.pack(">i", len(magic)) + magic + struct.pack(">i", len(version)) + version + body


def unpack(datagram: bytes) -> tuple[bytes, bytes, bytes]:
    (size,) = struct.unpack_from(">i", datagram)
    magic, rest = datagram[4 : 4 + size], datagram[4 + size :]
    (size,) = struct.unpack_from(">i", rest)
    return magic, rest[4 : 4 + size], rest[4 + size :]


@contextmanager
def connected(port: int, timeout_s: float = 30.0) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(timeout_s)
        client.connect(("127.0.0.1", port))
        yield client


def request(
    port: int, magic: bytes, body: bytes, timeout_s: float = 10.0
) -> tuple[bytes, bytes, bytes]:
    with connected(port, timeout_s) as client:
        client.send(pack(magic, b"1.0", body))
        return unpack(client.recv(1 << 16))


def send(port: int, magic: bytes, body: bytes = b"", count: int = 1) -> None:
    """Without waiting for an answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for _ in range(count):
            client.sendto(pack(magic, b"1.0", body), ("127.0.0.1", port))
