"""The UDP sockets of all peers and the TCP one of the metrics, bound before the first fork.

On UDP, neither SO_REUSEADDR nor SO_REUSEPORT is set: with either, a second supervisor would bind the same
ports and silently take a share of the datagrams (socket(7)), where it should fail.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
from dataclasses import dataclass
from typing import Literal

import psutil

from peerd.address import Address
from peerd.errors import BindError, PortInUseError
from peerd.settings import WILDCARDS

log = logging.getLogger(__name__)

# asm-generic/socket.h; the socket module does not have them.
SO_RCVBUFFORCE = 33
SO_MEMINFO = 55
# linux/sock_diag.h: SK_MEMINFO_RMEM_ALLOC, ..., SK_MEMINFO_DROPS.
MEMINFO = struct.Struct("9I")

LISTEN_BACKLOG = 64

Protocol = Literal["tcp", "udp"]


@dataclass(frozen=True)
class QueueState:
    queued_bytes: int
    dropped: int
    """Datagrams that found the buffer full since the socket was made."""


def bind_all(host: str, base_port: int, count: int, recv_buffer_bytes: int) -> list[socket.socket]:
    """One bound UDP socket for each port; all of them or an error.

    Raises PortInUseError, or BindError when the host does not resolve or the bind is refused.
    """
    with contextlib.ExitStack() as opened:
        sockets = []
        for port in range(base_port, base_port + count):
            sock = bind_one(host, port, recv_buffer_bytes, "--base-port")
            sockets.append(opened.enter_context(sock))
        opened.pop_all()
    _warn_of_small_buffer(sockets[0], recv_buffer_bytes)
    return sockets


def bind_one(host: str, port: int, recv_buffer_bytes: int, flag: str) -> socket.socket:
    family, address = _resolve(host, "--host")
    with contextlib.ExitStack() as opened:
        sock = opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        _bind(sock, host, address, port, flag)
        _grow_buffer(sock, recv_buffer_bytes)
        opened.pop_all()
    return sock


def listen(at: Address, flag: str) -> socket.socket:
    """A listening TCP socket that does not block; errors name the flag that the address came from.

    Raises PortInUseError, or BindError when the host does not resolve or the bind is refused.
    """
    family, address = _resolve(at.host, flag)
    with contextlib.ExitStack() as opened:
        sock = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
        # Who closes a connection first keeps its port in TIME_WAIT, and here that is the server: the
        # next supervisor could not bind for a minute. Two listeners it does not allow on TCP (socket(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        _bind(sock, at.host, address, at.port, flag)
        sock.setblocking(False)
        opened.pop_all()
    return sock


def queue_state(sock: socket.socket) -> QueueState:
    """What the kernel holds and has dropped, by one getsockopt and nothing per datagram."""
    fields = MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))
    return QueueState(queued_bytes=fields[0], dropped=fields[8])


def port_holder(
    family: socket.AddressFamily, address: str, port: int, protocol: Protocol = "udp"
) -> str | None:
    """Whose socket is in the way of binding this, as a person would say it.

    None when it cannot be seen (another user's).
    """
    try:
        taken = [
            found
            for found in psutil.net_connections(protocol)
            if found.laddr
            and found.laddr.port == port
            and found.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
            and _overlap(family, address, found.family, found.laddr.ip)
        ]
    except (psutil.Error, OSError):
        return None
    pids = sorted(found.pid for found in taken if found.pid)
    if not pids:
        return None
    try:
        holder = psutil.Process(pids[0])
        # A worker shares its socket with its supervisor, and the supervisor is whom to stop.
        while (parent := holder.parent()) is not None and _has_port(parent, port, protocol):
            holder = parent
        # A process title comes as one argument, filled up with spaces (setproctitle).
        command = " ".join(" ".join(holder.cmdline()).split()) or holder.name()
        return f"pid {holder.pid} ({command[:120]})"
    except (psutil.Error, OSError):
        return f"pid {pids[0]}"


def _overlap(family: int, address: str, other_family: int, other: str) -> bool:
    wild = address in WILDCARDS or other in WILDCARDS
    if family == other_family:
        return wild or address == other
    return "::" in (address, other)  # takes IPv4 as well


def _has_port(process: psutil.Process, port: int, protocol: Protocol) -> bool:
    try:
        return any(
            found.laddr and found.laddr.port == port for found in process.net_connections(protocol)
        )
    except (psutil.Error, OSError):
        return False


def _resolve(host: str, flag: str) -> tuple[socket.AddressFamily, str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise BindError(
            f"cannot bind to host {host!r}: {error.strerror}; use {flag} with an address of this machine"
        ) from None
    # "localhost" is both ::1 and 127.0.0.1; most clients try IPv4.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])


def _bind(sock: socket.socket, host: str, address: str, port: int, flag: str) -> None:
    protocol: Protocol = "tcp" if sock.type == socket.SOCK_STREAM else "udp"
    try:
        sock.bind((address, port))
        if protocol == "tcp":
            sock.listen(LISTEN_BACKLOG)  # of two that bind at once, this fails for the second
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            holder = port_holder(sock.family, address, port, protocol)
            who = f"held by {holder}" if holder else "held by a process that this user cannot see"
            raise PortInUseError(
                port,
                holder,
                f"{protocol.upper()} port {port} is in use, {who}: stop it, or choose another {flag}",
            ) from None
        reasons = {
            errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
            errno.EADDRNOTAVAIL: "this machine has no such address",
        }
        reason = reasons.get(error.errno or 0, os.strerror(error.errno or 0))
        raise BindError(f"cannot bind {protocol.upper()} {Address(host, port)}: {reason}") from None


def _grow_buffer(sock: socket.socket, size_bytes: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size_bytes)
    except PermissionError:  # CAP_NET_ADMIN is needed to pass net.core.rmem_max (socket(7))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)


def _warn_of_small_buffer(sock: socket.socket, asked_bytes: int) -> None:
    # The kernel doubles what it grants, for its own bookkeeping (socket(7)).
    granted_bytes = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
    if granted_bytes < asked_bytes:
        log.warning(
            "receive buffers have %d bytes, not %d: bursts and restarts may lose datagrams; "
            "allow more with: sysctl -w net.core.rmem_max=%d",
            granted_bytes,
            asked_bytes,
            asked_bytes,
        )
