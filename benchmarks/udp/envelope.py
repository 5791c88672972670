"""The datagram that is sent: one envelope of 64 bytes."""

from __future__ import annotations

from peerd import encode

MAGIC = "BNCH"
VERSION = "1.0"
DATAGRAM_BYTES = 64
SEGMENTS = 64
"""Datagrams per send of a stream; the most that every Linux accepts (UDP_MAX_SEGMENTS)."""


def datagram(magic: str = MAGIC, size: int = DATAGRAM_BYTES) -> bytes:
    header = len(encode(magic, VERSION))
    return encode(magic, VERSION, bytes(size - header))
