"""Writes the inputs that the fuzzers start from into ``corpus/``: ``python tests/fuzz/make_seeds.py``.

A file named by a hash was found by fuzzing and kept because it reaches code or counts that no other file
does (``-merge=1``). A file named ``crash-`` and a word broke something once.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from peerd.linux import SO_TIMESTAMPNS, SOL_UDP, UDP_GRO

CORPUS = Path(__file__).parent / "corpus"


def _text(text: bytes) -> bytes:
    return struct.pack(">i", len(text)) + text


def _envelopes() -> dict[str, bytes]:
    return {
        "seed-empty": b"",
        "seed-ping": _text(b"PING") + _text(b"1.0") + b"body",
        "seed-all-empty": _text(b"") + _text(b""),
        "seed-no-body": _text(b"ECHO") + _text(b"7"),
        "seed-json": _text(b"METRIC") + _text(b"2") + b'{"name": "cpu", "value": 0.25}',
        "seed-header-longer-than-the-cache": _text(b"M") + _text(b"v" * 100) + b"x",
        "seed-short": b"\0\0\0",
        "seed-short-version": _text(b"PING") + b"\0\0",
        "seed-negative": b"\xff\xff\xff\xffPING",
        "seed-least": b"\x80\0\0\0PING",
        "seed-negative-version": _text(b"PING") + b"\xff\xff\xff\xff",
        "seed-past-end": b"\0\0\0\5PING",
        "seed-largest": b"\x7f\xff\xff\xffPING",
        "seed-version-past-end": _text(b"A") + b"\0\0\0\2b",
        "seed-not-ascii": _text(b"\xc3") + _text(b""),
        "seed-version-not-ascii": _text(b"A") + _text(b"\x80"),
    }


def _control(level: int, kind: int, data: bytes, said_bytes: int | None = None) -> bytes:
    """A control message as in cmsg(3); ``said_bytes`` is the length that it gives, if another."""
    size = 16 + len(data)
    head = struct.pack("=Qii", size if said_bytes is None else said_bytes, level, kind)
    return head + data + bytes(-size % 8)


def _gro(stride: int) -> bytes:
    return _control(SOL_UDP, UDP_GRO, struct.pack("=i", stride))


def _splits() -> dict[str, bytes]:
    timestamp = _control(socket.SOL_SOCKET, SO_TIMESTAMPNS, bytes(16))
    ttl = _control(socket.IPPROTO_IP, socket.IP_TTL, struct.pack("=i", 64))

    def received(msg_len: int, control: bytes, flags: int = 0) -> bytes:
        return struct.pack("<BH", flags, msg_len) + control

    return {
        "seed-empty": received(0, b""),
        "seed-single": received(100, b""),
        "seed-joined": received(250, _gro(100)),
        "seed-joined-exactly": received(6400, _gro(100)),
        "seed-of-one-byte": received(64, _gro(1)),
        "seed-largest": received(65535, _gro(1024)),
        "seed-stride-above-length": received(40, _gro(100)),
        "seed-stride-0": received(100, _gro(0)),
        "seed-stride-negative": received(100, _gro(-1)),
        "seed-stride-largest": received(100, _gro(2**31 - 1)),
        "seed-empty-with-stride": received(0, _gro(100)),
        "seed-behind-a-time-stamp": received(250, timestamp + _gro(100)),
        "seed-between-others": received(250, timestamp + _gro(100) + ttl),
        "seed-twice": received(250, _gro(100) + _gro(50)),
        "seed-truncated": received(100, b"", flags=1),
        "seed-control-truncated": received(100, timestamp, flags=2),
        "seed-stride-of-two-bytes": received(100, _control(SOL_UDP, UDP_GRO, b"\x20\0")),
        "seed-length-0": received(100, _control(SOL_UDP, UDP_GRO, bytes(4), 0) + _gro(10)),
        "seed-length-too-short": received(100, _control(SOL_UDP, UDP_GRO, bytes(4), 15) + _gro(10)),
        "seed-length-largest": received(100, _control(SOL_UDP, UDP_GRO, bytes(4), 2**64 - 1)),
        "seed-length-wraps": received(100, _control(1, 2, b"", 2**64 - 8) + _gro(10)),
        "crash-length-past-the-control": received(100, _gro(10)[:19]),
        "crash-length-past-the-control-behind-another": received(100, ttl + _gro(10)[:18]),
    }


def _transmits() -> dict[str, bytes]:
    def reply(size_code: int, client: int, repeat: int = 0) -> bytes:
        """fuzz_transmit.pyx has the sizes, and says how often ``repeat``, 0 to 3, is."""
        return bytes([repeat << 6 | size_code << 3, client])

    flush = b"\7"
    many_sizes = b"".join(reply(size, client) for client in range(3) for size in range(8))
    run = reply(3, 5, 3)

    def fails(error: int) -> bytes:
        """One call fails, with the error of this number in fuzz_transmit.pyx."""
        return bytes([error << 2 | 3])

    answers = {
        "all": b"\0",
        "some": b"\1\5\1",
        "not-now": fails(0) + fails(1) + fails(2),
        "interrupted": fails(3) * 2 + b"\0",
        "anothers-error": fails(4) + fails(5) + fails(6) + b"\0",
        "more-of-anothers-errors": b"\1".join(map(fails, (7, 8, 9, 10))),
        "too-many-of-anothers-errors": fails(11) * 12,
        "too-big": fails(12) * 2,
        "eio": fails(13) + b"\0",
        "einval": fails(14) + b"\1\1",
        "not-permitted": fails(15) * 3,
    }
    files = {
        f"seed-{name}": b"\0" + run + many_sizes + flush + answer + run + flush
        for name, answer in answers.items()
    }
    for mode, name in enumerate(("no", "all", "odd")):
        files[f"seed-{name}-runs-refused"] = (
            bytes([mode]) + run + reply(2, 4, 1) + many_sizes + flush
        )
    files["seed-a-piece-has-to-wait"] = b"\1" + run + flush + b"\0\1\3" + flush + b"\1\5"
    files["seed-more-addresses-than-are-remembered"] = (
        b"\1" + b"".join(reply(2, client, 1) for client in range(70)) + flush
    )
    files["seed-arena-full"] = b"\0" + reply(7, 1, 2) + flush + fails(0) + reply(7, 1, 2)
    files["seed-runs-full"] = b"\1" + run + flush + b"\0\0\0\0" + run * 18 + fails(0) * 3
    files["seed-dropped-at-the-end"] = b"\x80" + run + flush + fails(0)
    others = fails(4) * 2
    # Errors of others that one run had met were held against the reply behind it.
    files["crash-retries-carried-over"] = (
        b"\0" + reply(3, 5, 1) + reply(1, 6) + flush + others + fails(13) + b"\0" + others
    )
    # Any 64 of them turned runs off for all.
    files["crash-addresses-that-refuse-everything"] = (
        b"\4" + b"".join(reply(2, client, 1) for client in range(128, 200)) + flush
    )
    # A control message of pieces began where a cmsghdr may not.
    files["crash-control-message-not-aligned"] = b"\x7f\xffC\xff"
    # Of all that ICMP messages can cause, three were known.
    files["crash-errors-of-others"] = b"\0" + reply(1, 5) + flush + fails(7) + fails(8) + fails(10)
    return files


def main() -> None:
    groups = {"envelope": _envelopes(), "split": _splits(), "transmit": _transmits()}
    for group, files in groups.items():
        (CORPUS / group).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (CORPUS / group / name).write_bytes(content)


if __name__ == "__main__":
    main()
