"""Counts the datagrams that the kernel has dropped in front of a peer because its receive buffer was full.

The kernel keeps a 32-bit count per socket (SO_MEMINFO). It can be read at any time by a process that has the
socket, also while the worker is blocked or dead, and it ends with the socket. So its owner counts the drops
here: the supervisor or a Peer in a program, and there is no second count that could differ.
"""

from __future__ import annotations

import socket

from peerd.supervisor.socket_queue import QueueState, queue_state

UINT32_MASK = 0xFFFF_FFFF


class KernelDrops:
    """The count of one peer, continued when the kernel's counter wraps, and with the peer's next socket."""

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
