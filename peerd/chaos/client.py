"""The process that sends numbers to ports and takes the answers: ``python -m peerd.chaos.client``.

A process of its own, since 20,000 datagrams a second and their answers take a good part of a core, and
whoever drives it has other things to do at exact times. One thread, which wakes once a millisecond,
sends what is due, and takes what has come.

Each client is one unconnected socket that sends to every port: what it gets back says in its body which
number it is, of which client, to which port. The sockets' buffers hold seconds of answers; if they are
too small all the same, the kernel counts what it drops, and the report has it.

Everything has been answered when each stream's mark has come back. A mark is sent behind the last
number, again and again until one is answered; a queue is first in, first out, so what was sent before
the mark is answered or lost. Only a server that answers late ones out of order can prove that wrong:
therefore the end is only reached when nothing has come for QUIET_S as well.

Commands are lines of JSON on standard input, each answered by one on standard output; its end is the
end of the process. load.py has the other side.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import orjson

from peerd import encode
from peerd.chaos.streams import Stream
from peerd.supervisor.sockets import SO_RCVBUFFORCE, queue_state

HOST = "127.0.0.1"
RECV_BUFFER_BYTES = 256 * 1024 * 1024

TICK_S = 0.001
BEHIND_S = 0.05
"""Who was held up for longer sends so much at once, and does not make up for the rest."""

QUIET_S = 0.5
MARK_EVERY_S = 0.25
MARK = (1 << 64) - 1

# Number, client, port.
BODY = struct.Struct(">QHH")


def main(clients: int, rate: float) -> None:
    """Serve commands until they end."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(_socket()) for _ in range(clients)]
        _Sender(sockets, rate).run()


class _Sender:
    def __init__(self, sockets: list[socket.socket], rate: float) -> None:
        self._sockets = sockets
        self._rate = rate
        self._streams: dict[tuple[int, int], Stream] = {}
        self._targets: list[Stream] = []
        """Those that are sent to, in turn."""
        self._next_target = 0
        self._paced_s = time.monotonic()
        self._foreign = 0
        self._last_taken_s = 0.0
        self._finish_until_s: float | None = None
        self._unmarked: set[Stream] = set()
        self._mark_s = 0.0
        self._commands: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "add": self._add,
            "remove": self._remove,
            "pace": self._pace,
            "send": self._send_one,
            "report": lambda _: self._report(),
            "finish": self._finish,
        }

    def run(self) -> None:
        unread = b""
        while True:
            if select.select([0], [], [], TICK_S)[0]:
                chunk = os.read(0, 1 << 16)
                if not chunk:
                    return
                *lines, unread = (unread + chunk).split(b"\n")
                for line in lines:
                    command = orjson.loads(line)
                    self._commands[command["do"]](command)
            now_s = time.monotonic()
            if self._finish_until_s is None:
                self._send_what_is_due(now_s)
            self._take_answers(now_s)
            if self._finish_until_s is not None:
                self._get_finished(now_s, self._finish_until_s)

    # Commands

    def _add(self, command: Mapping[str, Any]) -> None:
        for port in command["ports"]:
            for client in range(len(self._sockets)):
                stream = self._streams.setdefault((client, port), Stream(client, port))
                if stream not in self._targets:
                    self._targets.append(stream)
        _answer({})

    def _remove(self, command: Mapping[str, Any]) -> None:
        self._targets = [s for s in self._targets if s.port not in command["ports"]]
        _answer({})

    def _pace(self, command: Mapping[str, Any]) -> None:
        self._rate = command["rate"]
        self._paced_s = time.monotonic()
        _answer({})

    def _send_one(self, command: Mapping[str, Any]) -> None:
        """One number with a magic code of its own. Without effect for a port that is not sent to."""
        stream = next((s for s in self._targets if s.port == command["port"]), None)
        if stream is not None:
            self._send(stream, encode(command["magic"], "1"))
        _answer({"sent": stream is not None})

    def _report(self, finished: bool = False) -> None:
        _answer(
            {
                "streams": [asdict(stream.count()) for stream in self._streams.values()],
                "dropped": sum(queue_state(sock).dropped for sock in self._sockets),
                "foreign": self._foreign,
                "finished": finished,
            }
        )

    def _finish(self, command: Mapping[str, Any]) -> None:
        self._finish_until_s = time.monotonic() + command["timeout_s"]
        self._unmarked = {stream for stream in self._targets if not stream.is_complete}

    # Datagrams

    def _send_what_is_due(self, now_s: float) -> None:
        if not self._targets or not self._rate:
            self._paced_s = now_s
            return
        self._paced_s = max(self._paced_s, now_s - BEHIND_S)
        due = int((now_s - self._paced_s) * self._rate)
        header = encode("SEQ", "1")
        for _ in range(due):
            self._next_target = (self._next_target + 1) % len(self._targets)
            self._send(self._targets[self._next_target], header)
        self._paced_s += due / self._rate

    def _send(self, stream: Stream, header: bytes) -> None:
        # A number counts as sent once the kernel has it. On loopback that means: it is in the
        # peer's queue, or was dropped there, and counted.
        self._transmit(stream, header, stream.sent)
        stream.next_number()

    def _transmit(self, stream: Stream, header: bytes, number: int) -> None:
        body = BODY.pack(number, stream.client, stream.port)
        self._sockets[stream.client].sendto(header + body, (HOST, stream.port))

    def _take_answers(self, now_s: float) -> None:
        streams = self._streams
        for client, sock in enumerate(self._sockets):
            with contextlib.suppress(BlockingIOError):
                while True:
                    data = sock.recv(2048)
                    self._last_taken_s = now_s
                    try:
                        number, sent_by, port = BODY.unpack(data[-BODY.size :])
                        stream = streams[sent_by, port]
                    except (struct.error, KeyError):
                        self._foreign += 1
                        continue
                    if number == MARK:
                        self._unmarked.discard(stream)
                    elif sent_by != client or not stream.take(number):
                        self._foreign += 1

    def _get_finished(self, now_s: float, until_s: float) -> None:
        complete = all(stream.is_complete for stream in self._streams.values())
        quiet = not self._unmarked and now_s - self._last_taken_s >= QUIET_S
        if complete or quiet or now_s >= until_s:
            self._finish_until_s = None
            self._rate = 0.0
            self._report(complete or quiet)
        elif now_s >= self._mark_s:
            self._mark_s = now_s + MARK_EVERY_S
            for stream in self._unmarked:
                self._transmit(stream, encode("SEQ", "1"), MARK)


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    make_room(sock, RECV_BUFFER_BYTES)
    return sock


def make_room(sock: socket.socket, size_bytes: int) -> None:
    """For so much, or for as much as it may have."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size_bytes)
    except PermissionError:  # above net.core.rmem_max only with CAP_NET_ADMIN
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)


def _answer(result: Mapping[str, object]) -> None:
    os.write(1, orjson.dumps(result) + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
