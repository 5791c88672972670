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

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
PATIENCE_S = 60.0


class LoopHarness:
    """A loop with its slot on a free port of loopback, and a client connected to it.

    ``options`` are those of DatagramLoop. ``errors`` has what handlers raised, as (magic, sender,
    exception); ``icmp_errors`` has (address, errno).
    """

    def __init__(
        self,
        app: App,
        family: socket.AddressFamily = socket.AF_INET,
        recv_buffer_bytes: int = 4 << 20,
        **options: Any,
    ) -> None:
        self.app = app
        self._options = options
        self.errors: list[tuple[str, tuple[str, int] | None, BaseException]] = []
        self.icmp_errors: list[tuple[tuple[str, int] | None, int]] = []
        self.slot: Slot = Scoreboard(1).slots[0]
        with contextlib.ExitStack() as stack:
            self.sock, self.client = (
                stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(2)
            )
            self.sock.bind((LOOPBACK[family], 0))
            for sock in (self.sock, self.client):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, recv_buffer_bytes)
            self.client.settimeout(PATIENCE_S)
            self.client.connect(self.sock.getsockname())
            self.loop = self.new_loop()
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def new_loop(self, **options: Any) -> DatagramLoop:
        """Another loop on the same socket and slot, as a successor's."""
        return DatagramLoop(
            self.sock.fileno(),
            self.app.handlers,
            self.app.batch_handlers,
            self.slot,
            lambda *error: self.errors.append(error),
            **(
                {"on_icmp_error": lambda *error: self.icmp_errors.append(error)}
                | self._options
                | options
            ),
        )

    def send(self, *datagrams: bytes) -> None:
        """As one send (UDP_SEGMENT): all of one size but the last, which may be shorter."""
        size = struct.pack("=H", len(datagrams[0]))
        control = [(SOL_UDP, UDP_SEGMENT, size)] if len(datagrams) > 1 else []
        self.client.sendmsg([b"".join(datagrams)], control)

    def take(self, datagrams: int) -> list[int]:
        """Make turns until this many datagrams are taken; the number that each turn took."""
        turns = list[int]()
        while (missing := datagrams - sum(turns)) > 0:
            readable, _, _ = select.select([self.loop], [], [], PATIENCE_S)
            assert readable, f"{missing} datagrams did not arrive"
            turns.append(self.loop.turn())
        return turns

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

    @property
    def counters(self) -> Counter[str]:
        counters = Counter(self.slot.counters())
        refused = sum(value for name, value in counters.items() if name.startswith("decode_"))
        assert counters["rx_datagrams"] == refused + sum(
            counters[name]
            for name in ("rx_messages", "rx_truncated", "rx_own", "unknown_magic", "rx_max_waiting")
        )
        return counters
