"""The receivers that throughput.py compares; run as a child process, one for each measurement.

    python receivers.py NAME SOCKET-FD [CPU]

The socket is bound already and inherited. The child writes ``ready`` to stdout when everything is
set up, counts messages until its stdin ends, then writes one line of JSON (Report). End of stdin is
also what a killed benchmark leaves, so no receiver outlives it.

To add a receiver: write a function from a bound socket to a Receiver and name it in RECEIVERS.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeAlias

import orjson

from peerd._core import DatagramLoop, Message
from peerd._scoreboard import Scoreboard

MAGIC = "BNCH"
STOP_FD = 0  # stdin

Address: TypeAlias = tuple[str, int]


@dataclass(frozen=True)
class Receiver:
    """``run`` counts messages until stdin ends; ``counted`` says how many there were."""

    run: Callable[[], None]
    counted: Callable[[], int]
    joined: bool = False
    """Whether datagrams come joined (UDP_GRO); the kernel then counts a buffer as one drop."""


@dataclass(frozen=True)
class Report:
    messages: int
    cpu_s: float
    """User and system time of the process from ready to the end; while it waits it uses none."""
    joined: bool


@dataclass(frozen=True)
class Recipe:
    title: str
    make: Callable[[socket.socket], Receiver]
    needs: str | None = None
    """A package that must be installed."""

    @property
    def available(self) -> bool:
        return self.needs is None or find_spec(self.needs) is not None


def main(name: str, fd: str, cpu: str | None = None) -> None:
    # Ctrl-C belongs to the benchmark, which then ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if cpu is not None:
        os.sched_setaffinity(0, {int(cpu)})
    with socket.socket(fileno=int(fd)) as sock:
        receiver = RECEIVERS[name].make(sock)
        before = time.process_time()
        print("ready", flush=True)
        receiver.run()
        report = Report(receiver.counted(), time.process_time() - before, receiver.joined)
    print(orjson.dumps(report).decode())


# peerd: decodes the envelope in C, the handler gets a Message


def peerd_message(sock: socket.socket) -> Receiver:
    count = 0

    def handler(message: Message) -> None:
        nonlocal count
        count += 1

    return _peerd(sock, {MAGIC: handler}, {}, lambda: count)


def peerd_batch(sock: socket.socket) -> Receiver:
    count = 0

    def handler(messages: list[Message]) -> None:
        nonlocal count
        count += len(messages)

    return _peerd(sock, {}, {MAGIC: handler}, lambda: count)


def _peerd(
    sock: socket.socket,
    handlers: Mapping[str, Callable[[Message], None]],
    batch_handlers: Mapping[str, Callable[[list[Message]], None]],
    counted: Callable[[], int],
) -> Receiver:
    slot = Scoreboard(1).slots[0]
    loop = DatagramLoop(sock.fileno(), handlers, batch_handlers, slot, _end_run, gro=True)

    def stop_at_end_of_stdin() -> None:
        os.read(STOP_FD, 1)
        loop.stop()

    def run() -> None:
        # Blocked in read() without the GIL until the end, so it costs the loop nothing.
        threading.Thread(target=stop_at_end_of_stdin, daemon=True).start()
        loop.run()

    return Receiver(run, counted, joined=loop.gro)


def _end_run(magic: str, sender: Address | None, error: Exception) -> None:
    raise error


# The others: the handler gets the raw bytes and decodes nothing, which favours them


def recvfrom_loop(sock: socket.socket) -> Receiver:
    count = 0
    # The kernel's time limit, because settimeout() would add a poll() to every recvfrom().
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 50_000))

    def handler(data: bytes, sender: Address) -> None:
        nonlocal count
        count += 1

    def run() -> None:
        receive = sock.recvfrom
        while not _stdin_ended():
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, sender = receive(65536)
                    handler(data, sender)

    return Receiver(run, lambda: count)


def _stdin_ended() -> bool:
    return bool(select.select([STOP_FD], [], [], 0)[0])


def asyncio_protocol(sock: socket.socket) -> Receiver:
    return _protocol(asyncio.new_event_loop(), sock)


def uvloop_protocol(sock: socket.socket) -> Receiver:
    import uvloop

    return _protocol(uvloop.new_event_loop(), sock)


class CountingProtocol(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.count = 0

    def datagram_received(self, data: bytes, addr: Address) -> None:
        self.count += 1


def _protocol(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> Receiver:
    _, protocol = loop.run_until_complete(
        loop.create_datagram_endpoint(CountingProtocol, sock=sock)
    )
    loop.add_reader(STOP_FD, loop.stop)
    return Receiver(loop.run_forever, lambda: protocol.count)


RECEIVERS: dict[str, Recipe] = {
    "peerd": Recipe("peerd, per message", peerd_message),
    "peerd-batch": Recipe("peerd, batch", peerd_batch),
    "recvfrom": Recipe("socket.recvfrom loop", recvfrom_loop),
    "asyncio": Recipe("asyncio DatagramProtocol", asyncio_protocol),
    "uvloop": Recipe("uvloop DatagramProtocol", uvloop_protocol, needs="uvloop"),
}


if __name__ == "__main__":
    main(*sys.argv[1:])
