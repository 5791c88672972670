"""Finds ports that are free on loopback."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

from bench.children import BenchmarkError

FIRST_PORT = 10_000


def free_ports(count: int, kind: int = socket.SOCK_DGRAM) -> range:
    """Consecutive ports below those that the kernel hands out by itself."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if low - count < FIRST_PORT:
        raise BenchmarkError(f"the ephemeral ports begin at {low}: no room for {count} below")
    while True:
        first = random.randrange(FIRST_PORT, low - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                sock = stack.enter_context(socket.socket(socket.AF_INET, kind))
                sock.bind(("127.0.0.1", port))
            return range(first, first + count)
