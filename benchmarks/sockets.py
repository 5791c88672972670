"""Sockets that the benchmark makes and its receivers inherit, and what the kernel says of them."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence

from children import BenchmarkError

BUFFER_BYTES = 16 << 20  # what every receiver's socket asks for

DRAIN_LIMIT_S = 60.0

# asm-generic/socket.h and linux/sock_diag.h, linux/udp.h; Python's socket module does not have them.
SO_RCVBUFFORCE = 33
SO_MEMINFO = 55
SK_MEMINFO = struct.Struct("@9I")
SK_MEMINFO_RMEM_ALLOC = 0
SK_MEMINFO_DROPS = 8
SOL_UDP = 17
UDP_GRO = 104


@contextlib.contextmanager
def bound_sockets(count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(bound_socket()) for _ in range(count)]


def bound_socket(buffer_bytes: int = BUFFER_BYTES) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    try:
        # CAP_NET_ADMIN may go past net.core.rmem_max (socket(7)).
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer_bytes)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    return sock


def granted_buffer_bytes() -> int:
    with bound_socket() as sock:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def queued_bytes(sock: socket.socket) -> int:
    return _meminfo(sock)[SK_MEMINFO_RMEM_ALLOC]


def wait_until_empty(
    socks: Sequence[socket.socket], check_alive: Callable[[], object] = lambda: None
) -> int:
    """When the queues were empty, to about a millisecond, on the monotonic clock.

    ``check_alive`` raises when nobody will empty them.
    """
    deadline = time.monotonic() + DRAIN_LIMIT_S
    while time.monotonic() < deadline:
        now = time.monotonic_ns()
        empty = not any(map(queued_bytes, socks))
        time.sleep(0.001)
        # Twice, since something may still be on its way from the sender into a queue.
        if empty and not any(map(queued_bytes, socks)):
            return now
        check_alive()
    raise BenchmarkError(f"the receiver did not empty its queue in {DRAIN_LIMIT_S:.0f} s")


def dropped(sock: socket.socket) -> int:
    """What found no room, modulo 2**32. Joined datagrams count as one (__udp_enqueue_schedule_skb)."""
    return _meminfo(sock)[SK_MEMINFO_DROPS]


def takes_joined(sock: socket.socket) -> bool:
    """Whether whoever uses the socket has asked for UDP_GRO."""
    try:
        return bool(sock.getsockopt(SOL_UDP, UDP_GRO))
    except OSError:  # before Linux 5.0
        return False


def _meminfo(sock: socket.socket) -> tuple[int, ...]:
    return SK_MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, SK_MEMINFO.size))
