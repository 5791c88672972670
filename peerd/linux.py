"""Socket options without a name in Python, and facts about kernel versions that no call reports."""

from __future__ import annotations

import os
import re

# linux/udp.h, asm-generic/socket.h, linux/in.h and linux/in6.h: what the socket module lacks.
SOL_UDP = 17
UDP_SEGMENT = 103
UDP_GRO = 104
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_TIMESTAMPNS = 35
SO_MEMINFO = 55
SO_RCVMARK = 75
IP_PKTINFO = 8
IP_RECVERR = 11
IPV6_RECVERR = 25

FIRST_WITH_GOOD_GRO = (5, 12)
"""Earlier kernels misreported joined datagrams (wireguard-go: "UDP_GRO is kind of buggy")."""

BROKEN_GSO = ((7, 0, 0), (7, 1, 4))
"""The first and the last kernel whose UDP_SEGMENT sends have mangled headers (tailscale 19918, 21335)."""


# Compiled before the fork: in each worker, it would touch a quarter of a megabyte of shared memory.
_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


def is_kernel_without_gro(release: str = os.uname().release) -> bool:
    return _version(release) < FIRST_WITH_GOOD_GRO


def is_kernel_with_broken_gso(release: str = os.uname().release) -> bool:
    first, last = BROKEN_GSO
    return first <= _version(release) <= last


def _version(release: str) -> tuple[int, ...]:
    """(6, 18, 44) from "6.18.44-fc-v669"."""
    found = _RELEASE.match(release)
    return tuple(int(part or 0) for part in found.groups()) if found else (0, 0, 0)
