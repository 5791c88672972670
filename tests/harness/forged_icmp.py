"""ICMP errors that a host or router could send about a UDP datagram, sent by the test itself."""

from __future__ import annotations

import socket
import struct

import pytest

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
FRAGMENTATION_NEEDED, PACKET_TOO_BIG = (3, 4), (2, 0)


def raw_socket(family: socket.AddressFamily) -> socket.socket:
    protocol = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    try:
        return socket.socket(family, socket.SOCK_RAW, protocol)
    except PermissionError:
        pytest.skip("a raw socket needs CAP_NET_RAW")


def forge_icmp_error(raw: socket.socket, kind: int, code: int, sender: int, receiver: int) -> None:
    """Report to the socket on port ``sender`` that a datagram from it did not reach port ``receiver``.

    Both are on loopback. What (3, 4) says of the path, the kernel believes for ten minutes, unless
    the socket has IP_PMTUDISC_INTERFACE.
    """
    udp = struct.pack(">HHHH", sender, receiver, 20, 0)
    family = socket.AddressFamily(raw.family)
    host = LOOPBACK[family]
    address = socket.inet_pton(family, host)
    head = struct.pack(">BB", kind, code)
    if family == socket.AF_INET:
        mtu = 1400 if (kind, code) == FRAGMENTATION_NEEDED else 0
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 40, 1, 0, 64, socket.IPPROTO_UDP, 0) + address * 2
        rest = struct.pack(">HH", 0, mtu) + ip + udp + bytes(12)
        raw.sendto(head + internet_checksum(head + rest) + rest, (host, 0))
        return
    # The MTU of the loopback device, so that the error changes no path for any process.
    mtu = 65536 if (kind, code) == PACKET_TOO_BIG else 0
    ip = struct.pack(">IHBB", 6 << 28, 20, socket.IPPROTO_UDP, 64) + address * 2
    # The kernel fills in the checksum of an ICMPv6 socket (RFC 3542 section 3.1).
    raw.sendto(head + bytes(2) + struct.pack(">I", mtu) + ip + udp + bytes(12), (host, 0))


def internet_checksum(data: bytes) -> bytes:
    """RFC 1071."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~total & 0xFFFF)
