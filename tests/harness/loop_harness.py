"""A DatagramLoop over real sockets, turn by turn or in a thread."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

from peerd import App, Message, decode
from peerd._loop import DatagramLoop
from peerd._scoreboard import Scoreboard, Slot
from peerd.linux import SOL_UDP, UDP_SEGMENT
from peerd.serving.app import builtin_app

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
PATIENCE_S = 60.0


def bound(host: str, port: int = 0) -> socket.socket:
    """``::`` is bound for IPv4 as well."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    if host == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, port))
    return sock


class LoopHarness:
    """A loop with its slot on a free port of loopback, or on ``sock``, and a client connected to it.

    ``app``: None for the built-in one. ``options`` are those of DatagramLoop. ``errors`` has what
    handlers raised, as (magic, sender, exception); ``icmp_errors`` has (address, errno).
    """

    def __init__(
        self,
        app: App | None = None,
        family: socket.AddressFamily = socket.AF_INET,
        recv_buffer_bytes: int = 4 << 20,
        *,
        sock: socket.socket | None = None,
        slot: Slot | None = None,
        **options: Any,
    ) -> None:
        self.app = app or builtin_app()
        self._options: dict[str, Any] = {
            "coroutine_handlers": self.app.coroutine_handlers,
            "max_waiting": self.app.max_waiting,
            "on_icmp_error": lambda *error: self.icmp_errors.append(error),
            **options,
        }
        self._recv_buffer_bytes = recv_buffer_bytes
        self.errors: list[tuple[str, tuple[str, int] | None, BaseException]] = []
        self.icmp_errors: list[tuple[tuple[str, int] | None, int]] = []
        self.slot: Slot = slot or Scoreboard(1).slots[0]
        with contextlib.ExitStack() as stack:
            self.sock = stack.enter_context(sock or bound(LOOPBACK[family]))
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, recv_buffer_bytes)
            self.port: int = self.sock.getsockname()[1]
            self._open = stack
            self.client = self.new_client(family)
            self.loop = self.new_loop()
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def new_client(self, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
        client = self._open.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._recv_buffer_bytes)
        client.settimeout(PATIENCE_S)
        client.connect((LOOPBACK[family], self.port))
        return client

    def new_loop(self, **options: Any) -> DatagramLoop:
        """Another loop on the same socket and slot, as a successor's."""
        return DatagramLoop(
            self.sock.fileno(),
            self.app.handlers,
            self.app.batch_handlers,
            self.slot,
            lambda *error: self.errors.append(error),
            **(self._options | options),
        )

    def send(self, *datagrams: bytes) -> None:
        """As one send (UDP_SEGMENT): all of one size but the last, which may be shorter."""
        size = struct.pack("=H", max(map(len, datagrams)))
        control = [(SOL_UDP, UDP_SEGMENT, size)] if len(datagrams) > 1 else []
        self.client.sendmsg([b"".join(datagrams)], control)

    def take(self, datagrams: int) -> list[int]:
        """Make turns until this many datagrams are taken; the number that each turn took."""
        turns = list[int]()
        while (missing := datagrams - sum(turns)) > 0:
            readable, _, _ = select.select([self.loop], [], [], PATIENCE_S)
            assert readable, f"{missing} datagrams did not arrive"
            turns.append(self.turn())
        return turns

    def turn(self) -> int:
        return self.loop.turn()

    def receive(self) -> Message:
        return decode(self.client.recv(1 << 16))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.loop.run)
        thread.start()
        try:
            yield
        finally:
            self.loop.stop()
            thread.join()

    def __getitem__(self, counter: str) -> int:
        return self.slot.counters()[counter]

    @property
    def counters(self) -> Counter[str]:
        counters = Counter(self.slot.counters())
        refused = sum(value for name, value in counters.items() if name.startswith("decode_"))
        assert counters["rx_datagrams"] == refused + sum(
            counters[name]
            for name in ("rx_messages", "rx_truncated", "rx_own", "unknown_magic", "rx_max_waiting")
        )
        return counters
