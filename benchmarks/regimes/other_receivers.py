"""The Python receivers other than peerd.

    python -m regimes.other_receivers NAME count|echo FD [FD ...]

receivers.py describes their protocol. Their handlers get the raw bytes and count them or send them back
without decoding, which favours these receivers over peerd.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, TypeAlias

import orjson

STDIN = 0

Address: TypeAlias = tuple[str, int]


def main(name: str, role: str, *fds: str) -> None:
    # Ctrl-C belongs to the benchmark, which then ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    socks = [socket.socket(fileno=int(fd)) for fd in fds]
    messages = RUN[name](socks, role == "echo")
    print(orjson.dumps({"messages": messages}).decode())


def say_ready() -> None:
    print("ready", flush=True)


def run_recvfrom(socks: Sequence[socket.socket], echo: bool) -> int:
    """A bare loop on one socket, without timers or other sockets."""
    (sock,) = socks
    count = 0
    # A timeout in the kernel, because settimeout() would add a poll() to every recvfrom().
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 50_000))
    send = sock.sendto

    def handle(data: bytes, sender: Address) -> None:
        nonlocal count
        count += 1

    def answer(data: bytes, sender: Address) -> None:
        nonlocal count
        count += 1
        send(data, sender)

    handler = answer if echo else handle
    receive = sock.recvfrom
    say_ready()
    while not select.select([STDIN], [], [], 0)[0]:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, sender = receive(65536)
                handler(data, sender)
    return count


class Counting(asyncio.DatagramProtocol):
    count = 0

    def datagram_received(self, data: bytes, addr: Address) -> None:
        self.count += 1


class Echoing(asyncio.DatagramProtocol):
    count = 0
    transport: asyncio.DatagramTransport

    def connection_made(self, transport: Any) -> None:
        # uvloop, rloop and aiofastnet have their own class with the same methods.
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Address) -> None:
        self.count += 1
        self.transport.sendto(data, addr)


def run_on(package: str, socks: Sequence[socket.socket], echo: bool) -> int:
    return _serve(_new_event_loop(package), socks, echo)


def run_aiofastnet(socks: Sequence[socket.socket], echo: bool) -> int:
    """On uvloop if it is installed, because it is faster there."""
    loop = _new_event_loop("uvloop" if find_spec("uvloop") else "asyncio")
    create = importlib.import_module("aiofastnet").create_datagram_endpoint
    return _serve(loop, socks, echo, functools.partial(create, loop))


def _new_event_loop(package: str) -> asyncio.AbstractEventLoop:
    # Imported by name, because none of them has to be installed.
    loop: asyncio.AbstractEventLoop = importlib.import_module(package).new_event_loop()
    return loop


def _serve(
    loop: asyncio.AbstractEventLoop,
    socks: Sequence[socket.socket],
    echo: bool,
    create_datagram_endpoint: Callable[..., Any] | None = None,
) -> int:
    create = create_datagram_endpoint or loop.create_datagram_endpoint
    made: list[Counting | Echoing] = []

    def protocol() -> Counting | Echoing:
        made.append(Echoing() if echo else Counting())
        return made[-1]

    async def listen() -> None:
        for sock in socks:
            await create(protocol, sock=sock)

    asyncio.set_event_loop(loop)
    loop.run_until_complete(listen())
    loop.add_reader(STDIN, loop.stop)
    say_ready()
    loop.run_forever()
    return sum(each.count for each in made)


RUN: dict[str, Callable[[Sequence[socket.socket], bool], int]] = {
    "recvfrom": run_recvfrom,
    **{name: functools.partial(run_on, name) for name in ("asyncio", "uvloop", "rloop")},
    "aiofastnet": run_aiofastnet,
}


if __name__ == "__main__":
    main(*sys.argv[1:])
