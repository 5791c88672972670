"""The receive queue of a UDP socket, as the kernel shows it, and the drops in front of it."""

from __future__ import annotations

import select
import socket
import struct
import sys
from typing import NamedTuple

from peerd.linux import SO_MEMINFO, SOL_UDP, UDP_GRO

# linux/sock_diag.h: SK_MEMINFO_RMEM_ALLOC, ..., SK_MEMINFO_DROPS.
MEMINFO = struct.Struct("9I")


MIN_SKB_BYTES = 256
"""About the size of an empty sk_buff; the kernel charges more for each datagram (SKB_TRUESIZE)."""


class QueueState(NamedTuple):
    queued_bytes: int
    dropped: int  # Datagrams dropped since the socket was made because its buffer was full


def queue_state(sock: socket.socket) -> QueueState:
    """Read the state of the receive queue, with one system call. Raises OSError."""
    fields = MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))
    return QueueState(queued_bytes=fields[0], dropped=fields[8])


def has_datagrams(sock: socket.socket) -> bool:
    """Whether there is a datagram to read. ICMP errors take room in the queue as well, but do not count."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def count_unread(sock: socket.socket) -> int:
    """Drain the queue and return the number of datagrams; joined ones (UDP_GRO) are counted one by one.

    Bounded by the content of the queue at the start, because clients may go on sending.
    """
    count = 0
    for _ in range(queue_state(sock).queued_bytes // MIN_SKB_BYTES + 1):
        try:
            _, control, _, _ = sock.recvmsg(
                0, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT | socket.MSG_PEEK | socket.MSG_TRUNC
            )
            size = sock.recv_into(bytearray(1), 1, socket.MSG_DONTWAIT | socket.MSG_TRUNC)
        except BlockingIOError:
            return count
        except OSError:  # an ICMP error, reported instead of a datagram that stays in the queue
            continue
        stride = 0
        for level, kind, data in control:
            if (level, kind) == (SOL_UDP, UDP_GRO):
                stride = int.from_bytes(data[:4], sys.byteorder)
        count += max(1, -(-size // stride)) if stride > 0 else 1
    return count


UINT32_MASK = 0xFFFF_FFFF


class KernelDrops:
    """Counts the datagrams that the kernel has dropped in front of a peer because its buffer was full.

    The kernel's count (SO_MEMINFO) has 32 bits and ends with the socket. Any process that has the socket can
    read it, also while the worker is blocked or dead. So the owner of the socket counts, the supervisor or a
    Peer in a program, and there is no second count that could differ. It continues when the kernel's counter
    wraps, and with the peer's next socket.
    """

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._seen = 0
        self._total = 0

    def follow(self, sock: socket.socket) -> None:
        """Count the drops of this socket from now on, not those that an earlier supervisor has counted."""
        self._sock = sock
        self._seen = queue_state(sock).dropped

    def leave(self) -> None:
        """Keep the final count. Call it before the socket is closed."""
        self.read()
        self._sock = None

    def read(self) -> tuple[QueueState, int]:
        """The state of the socket's queue, and the count. Without a socket, an empty queue."""
        if self._sock is None:
            return QueueState(queued_bytes=0, dropped=0), self._total
        queue = queue_state(self._sock)
        self._total += (queue.dropped - self._seen) & UINT32_MASK
        self._seen = queue.dropped
        return queue, self._total
