"""Notifies systemd: sd_notify(3) over $NOTIFY_SOCKET, without libsystemd.

A message is one datagram of lines. It may carry a descriptor for the manager's descriptor store, which the
next start of the service inherits: so a supervisor that is restarted or killed keeps its ports and the
datagrams in their queues.

The supervisor must not wait for its manager. The manager's queue is short (net.unix.max_dgram_qlen: 10
datagrams, or 512 where systemd has set it), and one message per peer's socket is more than that. Messages
that do not fit are kept here and sent in order by the next call of any method; the supervisor reports its
status often. Only the newest message of each kind is kept, so memory is bounded.

- A watchdog ping is never kept. Sent late, it would vouch for a time in which no check was made.
- FDPOLL=0, because the manager otherwise drops a socket at the first EPOLLERR (sd_notify(3)), and an
  ICMP error about any client is one (IP_RECVERR).
- FDSTORE of a socket that is already in the store changes nothing, so a start may store all of them.
- A socket in the store stays bound after the supervisor closes it, so discard() it first.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import socket
import time
from typing import NamedTuple

log = logging.getLogger(__name__)

TEMPORARY = frozenset(
    # The manager's queue or ours is full, or too many descriptors are in flight (unix(7)).
    {errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS}
)

MAX_STATUS_CHARS = 200

UNREAD_TIMEOUT_S = 2.0
"""A manager that reads nothing for this long is worth a warning; a queue that is full for a moment is not."""


class _Message(NamedTuple):
    text: str
    sock: socket.socket | None = None


class Notifier:
    """sd_notify(3) from a supervisor; does nothing without NOTIFY_SOCKET.

    No method blocks or raises. The first failure is logged as a warning. A call that repeats the last one
    sends nothing.
    """

    def __init__(self, address: str | None, watchdog_interval_s: float | None = None) -> None:
        """``address``: a path, or ``@`` and an abstract name; None: there is no manager to notify."""
        self.watchdog_interval_s = watchdog_interval_s
        self._address: str | bytes = b""
        self._socket: socket.socket | None = None
        self._waiting: dict[str, _Message] = {}
        self._status = ""
        self._is_ready = False
        self._full_since_s: float | None = None
        self._warned = False
        if address is None:
            return
        if not address.startswith(("/", "@")):  # such as vsock:, for virtual machines
            self._warn(f"{address!r} is neither a path nor an abstract socket")
            return
        self._address = b"\0" + os.fsencode(address[1:]) if address[0] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    @classmethod
    def from_environment(cls) -> Notifier:
        """Read and remove NOTIFY_SOCKET and WATCHDOG_*, so that no child notifies systemd."""
        address = os.environ.pop("NOTIFY_SOCKET", None) or None
        period_us = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", "") or str(os.getpid())
        interval_s = None
        if pid == str(os.getpid()) and period_us.isdecimal() and len(period_us) <= 20:
            # Half of it, as sd_watchdog_enabled(3) recommends. 0: no watchdog.
            interval_s = int(period_us) / 2e6 or None
        return cls(address, interval_s)

    @property
    def has_manager(self) -> bool:
        """Whether there is a manager, which keeps the sockets that are stored."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """Report that the start, or a reload, is complete."""
        if self._is_ready:
            self.status(status)
            return
        self._is_ready = True
        self._status = status
        self._notify("READY", f"READY=1\n{_status_line(status)}")

    def status(self, text: str) -> None:
        """Set the line in ``systemctl status``."""
        if text == self._status:
            self._flush()
        else:
            self._status = text
            self._notify("STATUS", _status_line(text))

    def reloading(self) -> None:
        """Report that a reload has begun. Call ready() when it ends, whatever the result."""
        # With Type=notify-reload, systemd waits for a timestamp later than its SIGHUP. So this is sent for
        # each request, even if another reload is running already.
        self._is_ready = False
        now_us = time.monotonic_ns() // 1000
        self._notify("RELOADING", f"RELOADING=1\nMONOTONIC_USEC={now_us}")

    def stopping(self, status: str) -> None:
        self._status = status
        self._notify("STOPPING", f"STOPPING=1\n{_status_line(status)}")

    def watchdog(self) -> None:
        """Ping the watchdog; due every ``watchdog_interval_s``."""
        self._flush()
        if self._socket is not None and not self._waiting:
            self._send(_Message("WATCHDOG=1"))

    def store(self, name: str, sock: socket.socket) -> None:
        """Put a socket into the descriptor store. It must stay open here until discard()."""
        self._notify(f"FD {name}", f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", sock)

    def discard(self, name: str) -> None:
        """Remove a socket from the store. An unknown name is no error."""
        self._notify(f"FD {name}", f"FDSTOREREMOVE=1\nFDNAME={name}")

    def close(self) -> None:
        self._waiting.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _notify(self, kind: str, text: str, sock: socket.socket | None = None) -> None:
        if self._socket is None:
            return
        self._waiting.pop(kind, None)  # goes to the end: RELOADING must follow the READY before it
        self._waiting[kind] = _Message(text, sock)
        self._flush()

    def _flush(self) -> None:
        while self._waiting:
            key, message = next(iter(self._waiting.items()))
            if not self._send(message):
                return
            # Also after a permanent failure: a retry would fail as well.
            self._waiting.pop(key, None)

    def _send(self, message: _Message) -> bool:
        """Returns False if a retry may succeed."""
        assert self._socket is not None
        descriptors = [] if message.sock is None else [message.sock.fileno()]
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            text = message.text.encode(errors="replace")
            self._socket.sendmsg([text], ancillary if descriptors else [], 0, self._address)
        except OSError as error:
            if error.errno in TEMPORARY:
                now_s = time.monotonic()
                self._full_since_s = self._full_since_s or now_s
                if now_s >= self._full_since_s + UNREAD_TIMEOUT_S:
                    self._warn(f"it does not read ({error.strerror})")
                return False
            self._warn(error.strerror or str(error))
        self._full_since_s = None
        return True

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("cannot notify systemd at $NOTIFY_SOCKET: %s; going on without", why)


def socket_name(port: int) -> str:
    """The name of a peer's socket in systemd's store; ``:`` is not allowed there."""
    return f"peer-{port}"


def _status_line(text: str) -> str:
    """One line: a line break would begin another assignment."""
    return "STATUS=" + " ".join(text.split())[:MAX_STATUS_CHARS]
