"""The process that sends numbers to ports and counts the answers: ``python -m peerd_chaos.load_process``.

It is a separate process because 20,000 datagrams per second and their answers take a good part of a
core, and the driver has other work at exact times. Its one thread wakes every millisecond, sends the
datagrams that are due, and receives the answers.

Each client is one unconnected socket that sends to every port. The body of an answer holds its number,
its client and its port. The sockets' buffers have room for seconds of answers; if they overflow all the
same, the kernel counts the drops, and they are in the report.

A stream is finished when its mark has come back. A mark follows the last number and is repeated until
one is answered; queues are first in, first out, so by then every earlier number is answered or lost. A
server that answers out of order could break this rule, so the load also waits until no answer has come
for QUIET_S.

Commands come through a pipe of multiprocessing, and each is answered through it. The process exits when
the other end (load.py) is closed.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time
from collections.abc import Collection
from multiprocessing.connection import Connection

from peerd import encode
from peerd.supervisor.socket_queue import queue_state
from peerd.supervisor.sockets import grow_buffer
from peerd_chaos.accounts import LoadReport, Stream

HOST = "127.0.0.1"
RECV_BUFFER_BYTES = 256 * 1024 * 1024

TICK_S = 0.001
MAX_BEHIND_S = 0.05  # After a longer delay, only this much of it is made up for
QUIET_S = 0.5
MARK_INTERVAL_S = 0.25
MARK = (1 << 64) - 1

# Number, client, port.
BODY = struct.Struct(">QHH")


def main(pipe_fd: int, clients: int, rate: float) -> None:
    with contextlib.ExitStack() as opened:
        pipe = opened.enter_context(Connection(pipe_fd))
        sockets = [opened.enter_context(_socket()) for _ in range(clients)]
        with contextlib.suppress(EOFError, ConnectionError):
            _Sender(pipe, sockets, rate).run()


class _Sender:
    """The public methods are the commands."""

    def __init__(self, pipe: Connection, sockets: list[socket.socket], rate: float) -> None:
        self._pipe = pipe
        self._sockets = sockets
        self._rate = rate
        self._streams: dict[tuple[int, int], Stream] = {}
        self._targets: list[Stream] = []  # The streams that are sent to, in turn
        self._next_target = 0
        self._paced_s = time.monotonic()
        self._foreign = 0
        self._last_answer_s = 0.0
        self._finish_until_s: float | None = None
        self._unmarked: set[Stream] = set()
        self._mark_s = 0.0

    def run(self) -> None:
        """Until the other end of the pipe is closed. Raises EOFError or ConnectionError then."""
        while True:
            if self._pipe.poll(TICK_S):
                command, arguments = self._pipe.recv()
                getattr(self, command)(*arguments)
            now_s = time.monotonic()
            if self._finish_until_s is None:
                self._send_due(now_s)
            self._receive_answers(now_s)
            if self._finish_until_s is not None:
                self._check_finished(now_s, self._finish_until_s)

    def add(self, ports: Collection[int]) -> None:
        for port in ports:
            for client in range(len(self._sockets)):
                stream = self._streams.setdefault((client, port), Stream(client, port))
                if stream not in self._targets:
                    self._targets.append(stream)
        self._pipe.send(None)

    def remove(self, ports: Collection[int]) -> None:
        self._targets = [stream for stream in self._targets if stream.port not in ports]
        self._pipe.send(None)

    def pace(self, rate: float) -> None:
        self._rate = rate
        self._paced_s = time.monotonic()
        self._pipe.send(None)

    def send(self, port: int, magic: str) -> None:
        """Send one number with the given magic code, if its port is sent to."""
        stream = next((stream for stream in self._targets if stream.port == port), None)
        if stream is not None:
            self._send(stream, encode(magic, "1"))
        self._pipe.send(stream is not None)

    def report(self, finished: bool = False) -> None:
        counts = tuple(stream.count() for stream in self._streams.values())
        dropped = sum(queue_state(sock).dropped for sock in self._sockets)
        self._pipe.send(LoadReport(counts, dropped, self._foreign, finished))

    def finish(self, timeout_s: float) -> None:
        """_check_finished() answers it."""
        self._finish_until_s = time.monotonic() + timeout_s
        self._unmarked = {stream for stream in self._targets if not stream.is_complete}

    def _send_due(self, now_s: float) -> None:
        if not self._targets or not self._rate:
            self._paced_s = now_s
            return
        self._paced_s = max(self._paced_s, now_s - MAX_BEHIND_S)
        due = int((now_s - self._paced_s) * self._rate)
        header = encode("SEQ", "1")
        for _ in range(due):
            self._next_target = (self._next_target + 1) % len(self._targets)
            self._send(self._targets[self._next_target], header)
        self._paced_s += due / self._rate

    def _send(self, stream: Stream, header: bytes) -> None:
        # A number counts as sent once the kernel has accepted it. On loopback it is then in the
        # peer's queue, or was dropped there and counted.
        self._transmit(stream, header, stream.sent)
        stream.next_number()

    def _transmit(self, stream: Stream, header: bytes, number: int) -> None:
        body = BODY.pack(number, stream.client, stream.port)
        self._sockets[stream.client].sendto(header + body, (HOST, stream.port))

    def _receive_answers(self, now_s: float) -> None:
        streams = self._streams
        for client, sock in enumerate(self._sockets):
            with contextlib.suppress(BlockingIOError):
                while True:
                    data = sock.recv(2048)
                    self._last_answer_s = now_s
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

    def _check_finished(self, now_s: float, until_s: float) -> None:
        complete = all(stream.is_complete for stream in self._streams.values())
        quiet = not self._unmarked and now_s - self._last_answer_s >= QUIET_S
        if complete or quiet or now_s >= until_s:
            self._finish_until_s = None
            self._rate = 0.0
            self.report(complete or quiet)
        elif now_s >= self._mark_s:
            self._mark_s = now_s + MARK_INTERVAL_S
            for stream in self._unmarked:
                self._transmit(stream, encode("SEQ", "1"), MARK)


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    grow_buffer(sock, RECV_BUFFER_BYTES)
    return sock


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
