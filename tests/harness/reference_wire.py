"""A slow and obvious decoder to compare the compiled one with."""

from __future__ import annotations

import struct


class RefusedError(Exception):
    """``reason`` is the name that DecodeError must give."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(datagram: bytes) -> tuple[str, str, bytes]:
    if not datagram:
        raise RefusedError("empty")
    magic, rest = _text(datagram)
    version, body = _text(rest)
    return magic, version, body


def _text(data: bytes) -> tuple[str, bytes]:
    if len(data) < 4:
        raise RefusedError("short")
    (size,) = struct.unpack(">i", data[:4])
    if size < 0:
        raise RefusedError("negative_length")
    if size > len(data) - 4:
        raise RefusedError("length_past_end")
    raw, rest = data[4 : 4 + size], data[4 + size :]
    try:
        return raw.decode("ascii"), rest
    except UnicodeDecodeError:
        raise RefusedError("not_ascii") from None
