"""Which socket a datagram leaves from.

The envelope has no request id, and peers other than ours would not echo one. The socket is what
distinguishes replies: each attempt of a request has its own, connected to the peer. A reply to an
earlier attempt meets a closed port, datagrams of strangers do not arrive, and an ICMP error belongs to
this attempt, so an absent peer is known immediately. The kernel draws ports at random and could draw
one again while a reply to its last attempt is still under way. So the ports of failed attempts are
remembered and not used.

One-way messages share one socket per address family: to a peer they have one sender, so they stay in
order and are delivered joined (UDP_GRO).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Iterator

from peerd.clients.endpoints import Endpoint
from peerd.linux import IP_RECVERR, IPV6_RECVERR

MAX_FAILED_PORTS = 4096  # Remembered, of Linux's 28,232 ephemeral ports
MAX_DRAWS = 16  # Draws of a port that has not failed; after these, any port is better than none


class AttemptSockets:
    """Makes one connected socket per attempt, on a port that no recently failed attempt had."""

    def __init__(self, source: Endpoint | None = None) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._failed_ports: dict[int, None] = {}  # oldest first

    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint) -> Iterator[socket.socket]:
        """A socket that is closed at the end of the block; an exception marks its port as failed."""
        with self._draw(endpoint) as sock:
            port: int = sock.getsockname()[1]
            try:
                yield sock
            except BaseException:
                self._remember(port)
                raise

    def _draw(self, endpoint: Endpoint) -> socket.socket:
        for _ in range(MAX_DRAWS):
            sock = _connected(endpoint, self._source)
            if sock.getsockname()[1] not in self._failed_ports:
                return sock
            sock.close()
        return _connected(endpoint, self._source)

    def _remember(self, port: int) -> None:
        with self._lock:
            self._failed_ports.pop(port, None)
            self._failed_ports[port] = None
            if len(self._failed_ports) > MAX_FAILED_PORTS:
                del self._failed_ports[next(iter(self._failed_ports))]


def _connected(endpoint: Endpoint, source: Endpoint | None) -> socket.socket:
    with _opening(endpoint.family, source) as sock:
        # Without this option Linux does not report "host unreachable" and the like (udp(7)).
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        if endpoint.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        sock.connect(endpoint.sockaddr)
    return sock


@contextlib.contextmanager
def _opening(family: int, source: Endpoint | None) -> Iterator[socket.socket]:
    """A socket that stays open after the block, unless the block raises."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if source is not None:
            if source.family != family:
                what = f"the source address {source.sockaddr[0]} is of another family"
                raise OSError(errno.EAFNOSUPPORT, what)
            sock.bind(source.sockaddr)
        yield sock
    except BaseException:
        sock.close()
        raise


class SendSockets:
    """One unconnected socket per address family, opened on first use."""

    def __init__(self, source: Endpoint | None = None) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._sockets: dict[int, socket.socket] = {}
        self._closed = False

    def check_open(self) -> None:
        """Raises RuntimeError."""
        if self._closed:
            raise RuntimeError("this client is closed")

    def of(self, family: int) -> socket.socket:
        with self._lock:
            self.check_open()
            if family not in self._sockets:
                with _opening(family, self._source) as sock:
                    # Replies are never read, so the kernel should keep as few as possible.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                self._sockets[family] = sock
            return self._sockets[family]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for sock in self._sockets.values():
                sock.close()
            self._sockets.clear()
