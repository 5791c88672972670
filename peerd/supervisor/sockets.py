"""Opens the UDP sockets of all peers and the TCP socket of the metrics, before the first fork.

UDP sockets have neither SO_REUSEADDR nor SO_REUSEPORT: with either, a second supervisor would bind the same
ports and silently take a share of the datagrams (socket(7)), where it should fail.

Under systemd some sockets may be bound already (sd_listen_fds(3)): by a .socket unit, or by the previous run
through the descriptor store (notify.py). A socket belongs to the peer whose port it is bound to; its name is
used in messages only. A stored socket still holds its unread datagrams.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from typing import TYPE_CHECKING, Literal

from peerd.address import Address
from peerd.errors import BindError, PortInUseError
from peerd.linux import SO_RCVBUFFORCE
from peerd.settings import WILDCARDS

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)


LISTEN_BACKLOG = 64

FIRST_PASSED_FD = 3  # SD_LISTEN_FDS_START of sd-daemon.h
Protocol = Literal["tcp", "udp"]


def bind_all(
    host: str,
    base_port: int,
    count: int,
    recv_buffer_bytes: int,
    inherited: dict[int, socket.socket] | None = None,
    flag: str = "--base-port",
    *,
    warns: bool = True,
) -> list[socket.socket]:
    """Bind one UDP socket per port: all of them, or none and an error, which names ``flag``.

    Sockets of ``inherited`` (by port) with one of the ports are used and removed from it; the caller closes
    the rest. Raises PortInUseError, or BindError when the host does not resolve, the bind is refused, or an
    inherited socket has another address than ``host``.
    """
    family, address = resolve(host, "--host")
    ports = range(base_port, base_port + count)
    adopted = {port: sock for port, sock in (inherited or {}).items() if port in ports}
    for port, sock in adopted.items():
        _adopt(sock, family, address, port)
    with contextlib.ExitStack() as opened:
        sockets = []
        for port in ports:
            sock = adopted.get(port) or opened.enter_context(
                _bound(socket.SOCK_DGRAM, host, family, address, port, flag)
            )
            grow_buffer(sock, recv_buffer_bytes)
            sockets.append(sock)
        opened.pop_all()
    if inherited is not None:
        for port in adopted:
            del inherited[port]
    if warns:
        _warn_of_small_buffer(sockets[0], recv_buffer_bytes)
    _warn_of_wide_sockets(list(adopted.values()), address)
    return sockets


def inherited_sockets(host: str) -> dict[int, socket.socket]:
    """Return the bound UDP sockets that systemd passed, by port; of two with one port, that for ``host``.

    Other descriptors are closed with a warning. Removes LISTEN_* from the environment. Raises BindError
    when the host does not resolve.
    """
    names = _passed_names()
    if not names:
        return {}
    family, address = resolve(host, "--host")
    found: dict[int, socket.socket] = {}
    for fd, name in enumerate(names, FIRST_PASSED_FD):
        sock = _udp_socket(fd, name)
        if sock is None:
            continue
        port = sock.getsockname()[1]
        other = found.setdefault(port, sock)
        if other is sock:
            continue
        if _fit(sock, family, address) > _fit(other, family, address):
            found[port], sock, other = sock, other, sock
        # The same address twice: one socket, passed by its .socket unit and from the store.
        if sock.getsockname() != other.getsockname():
            text = "systemd has passed two sockets for UDP port %d: %s is used, %s is closed"
            log.warning(text, port, _name_of(other), _name_of(sock))
        sock.close()
    return found


def listen(at: Address, flag: str) -> socket.socket:
    """Open a listening, non-blocking TCP socket; errors name ``flag``, where the address came from.

    Raises PortInUseError, or BindError when the host does not resolve or the bind is refused.
    """
    family, address = resolve(at.host, flag)
    sock = _bound(socket.SOCK_STREAM, at.host, family, address, at.port, flag)
    sock.setblocking(False)
    return sock


def port_holder(
    family: socket.AddressFamily, address: str, port: int, protocol: Protocol = "udp"
) -> str | None:
    """Name the process whose socket prevents this bind, such as ``pid 4711 (nginx)``.

    None when the process is not visible because it belongs to another user.
    """
    import psutil  # not at the top: forked workers share the memory of imported modules

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
        # A worker shares its socket with its supervisor, and that is the process to stop.
        while (parent := holder.parent()) is not None and _has_port(parent, port, protocol):
            holder = parent
        # A process title comes as one argument, filled up with spaces (setproctitle).
        command = " ".join(" ".join(holder.cmdline()).split()) or holder.name()
        return f"pid {holder.pid} ({command[:120]})"
    except (psutil.Error, OSError):
        return f"pid {pids[0]}"


def _passed_names() -> list[str]:
    """Names of the descriptors from FIRST_PASSED_FD on; sd_listen_fds_with_names(3)."""
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    os.environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()):
        return []  # meant for a parent process
    if not count.isdecimal() or not 0 <= int(count[:9]) <= os.sysconf("SC_OPEN_MAX"):
        log.warning("LISTEN_FDS is no number of sockets, and is ignored: %.40r", count)
        return []
    return [name or "unknown" for name in [*names, *[""] * int(count)][: int(count)]]


def _udp_socket(fd: int, name: str) -> socket.socket | None:
    """The descriptor as a socket if it is a bound UDP socket; otherwise None, and it is closed."""
    try:
        what = "no socket"
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            what = f"a {sock.family.name} {sock.type.name} socket"
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_DGRAM:
                if sock.getsockname()[1] != 0:
                    return sock
                what = "not bound to a port"
            sock.detach()
        os.close(fd)
    except OSError as error:
        what = error.strerror or str(error)
    log.warning(
        "descriptor %d (%s) from systemd is no bound UDP socket: %s; closed", fd, name, what
    )
    return None


def _adopt(sock: socket.socket, family: int, address: str, port: int) -> None:
    if not _fit(sock, family, address):
        raise BindError(
            f"systemd has passed a socket bound to {_name_of(sock)} for UDP port {port}, and --host asks "
            f"for {Address(address, port)}: correct --host or the .socket unit; a socket that systemd kept "
            "from a run before goes with 'systemctl stop'"
        )
    # .socket units set SO_REUSEADDR, and SO_REUSEPORT on request (systemd.socket(5)).
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    sock.setblocking(True)  # like the sockets opened here


def _fit(sock: socket.socket, family: int, address: str) -> int:
    """How well a bound socket fits an address: 2 exactly, 1 as a wildcard that includes it, 0 not at all."""
    own = sock.getsockname()[0]
    if sock.family == family:
        return 2 if own == address else int(own in WILDCARDS)
    if own != "::":
        return 0
    return int(not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))


def _name_of(sock: socket.socket) -> str:
    return str(Address(*sock.getsockname()[:2]))


def _warn_of_wide_sockets(sockets: list[socket.socket], address: str) -> None:
    wide = [sock for sock in sockets if sock.getsockname()[0] != address]
    if wide:
        log.warning(
            "systemd has passed sockets that are reachable at more addresses than --host %s, such as %s (of "
            "%d): use --host %s if that is intended, else correct the .socket unit",
            address,
            _name_of(wide[0]),
            len(wide),
            wide[0].getsockname()[0],
        )


def _overlap(family: int, address: str, other_family: int, other: str) -> bool:
    wild = address in WILDCARDS or other in WILDCARDS
    if family == other_family:
        return wild or address == other
    return "::" in (address, other)  # accepts IPv4 as well


def _has_port(process: psutil.Process, port: int, protocol: Protocol) -> bool:
    import psutil

    try:
        return any(
            found.laddr and found.laddr.port == port for found in process.net_connections(protocol)
        )
    except (psutil.Error, OSError):
        return False


def resolve(host: str, flag: str) -> tuple[socket.AddressFamily, str]:
    """Return the address to bind. Raises BindError when the host does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise BindError(
            f"cannot bind to host {host!r}: {error.strerror}; use {flag} with an address of this machine"
        ) from None
    # "localhost" is both ::1 and 127.0.0.1; most clients try IPv4.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])


def _bound(
    kind: socket.SocketKind,
    host: str,
    family: socket.AddressFamily,
    address: str,
    port: int,
    flag: str,
) -> socket.socket:
    """A socket of UDP, or one of TCP that listens."""
    try:
        sock = socket.socket(family, kind)
    except OSError as error:  # no descriptor, no memory, or no such family
        raise BindError(f"cannot open a socket for port {port}: {error.strerror}") from None
    protocol: Protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    try:
        if family == socket.AF_INET6:
            # "::" then accepts IPv4 as well, whatever net.ipv6.bindv6only is (ipv6(7)).
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if protocol == "tcp":
            # The server closes its connections first, so they stay in TIME_WAIT, and without this the next
            # supervisor could not bind for a minute. It does not allow two TCP listeners (socket(7)).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if protocol == "tcp":
            # If two processes bind at the same time, this fails for the second.
            sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            holder = port_holder(family, address, port, protocol)
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
    return sock


def grow_buffer(sock: socket.socket, size_bytes: int) -> None:
    """Set the receive buffer to this size, or to the largest that is permitted."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size_bytes)
    except PermissionError:  # exceeding net.core.rmem_max takes CAP_NET_ADMIN (socket(7))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)


def _warn_of_small_buffer(sock: socket.socket, asked_bytes: int) -> None:
    # The kernel doubles the size that it grants, for its own bookkeeping (socket(7)).
    granted_bytes = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
    if granted_bytes < asked_bytes:
        text = (
            "receive buffers have %d bytes, not %d: bursts and restarts may lose datagrams; "
            "allow more with: sysctl -w net.core.rmem_max=%d"
        )
        log.warning(text, granted_bytes, asked_bytes, asked_bytes)
