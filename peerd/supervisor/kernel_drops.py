"""How many datagrams the kernel has dropped before a slot, whatever sockets it has had."""

from __future__ import annotations

import socket

from peerd.supervisor.sockets import QueueState, queue_state

UINT32_MASK = 0xFFFF_FFFF


class KernelDrops:
    """The kernel's 32-bit count of a socket's drops, continued where it wraps, and at the next socket."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._seen = 0
        self._total = 0

    def follow(self, sock: socket.socket) -> None:
        """What it has dropped before, for another supervisor, is not counted."""
        self._sock = sock
        self._seen = queue_state(sock).dropped

    def read(self) -> tuple[QueueState, int]:
        """What the socket holds, and the count. Raises OSError."""
        assert self._sock is not None
        queue = queue_state(self._sock)
        self._total += (queue.dropped - self._seen) & UINT32_MASK
        self._seen = queue.dropped
        return queue, self._total
