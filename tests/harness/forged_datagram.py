"""A UDP datagram on loopback whose source port belongs to another socket."""

from __future__ import annotations

import socket
import struct

import pytest


def forge_datagram(source_port: int, port: int, data: bytes, source: str = "127.0.0.1") -> None:
    """Send it to ``port`` of 127.0.0.1. Skips the test without CAP_NET_RAW."""
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    except PermissionError:
        pytest.skip("a raw socket needs CAP_NET_RAW")
    with raw:
        raw.bind((source, 0))
        # Without a checksum: 0.
        header = struct.pack(">HHHH", source_port, port, 8 + len(data), 0)
        raw.sendto(header + data, ("127.0.0.1", 0))
