"""Finds free ports of loopback, for a server whose port must be known before the server binds it.

The ports lie below the kernel's ephemeral range. A server that is down for a while finds its port free again:
an ephemeral one might have gone to a connection meanwhile, even to one from its own client, which then talks
to itself (a TCP simultaneous open).

A range is used in order, from a random place on. Each port is given out again only after all the
rest, which leaves the caller time to bind it.
"""

from __future__ import annotations

import random
import socket

BELOW_EPHEMERAL = range(10_000, 32_768)


class FreePorts:
    """Gives out ports of one range. Processes that use disjoint ranges never get the same port."""

    def __init__(self, ports: range = BELOW_EPHEMERAL) -> None:
        self._ports = ports
        self._next = random.randrange(len(ports))

    def take(self, count: int = 1) -> int:
        """The first of ``count`` neighbouring ports that are free for both UDP and TCP.

        Raises OSError if the range has no such neighbours.
        """
        for _ in self._ports:
            if self._next + count > len(self._ports):
                self._next = 0
            wanted = self._ports[self._next : self._next + count]
            taken = [
                port for port in wanted if not (is_free(port) and is_free(port, socket.SOCK_STREAM))
            ]
            self._next += wanted.index(taken[-1]) + 1 if taken else count
            if not taken:
                return wanted[0]
        raise OSError(f"{self._ports} has no {count} neighbouring free ports")


def is_free(port: int, kind: socket.SocketKind = socket.SOCK_DGRAM) -> bool:
    """Whether a socket, of UDP by default, can be bound to a port of 127.0.0.1."""
    with socket.socket(socket.AF_INET, kind) as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


free_ports = FreePorts()
"""For a process that does not share its range with others."""
