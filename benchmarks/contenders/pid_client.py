"""Sends peers a small datagram repeatedly, and reads the pid in their replies."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator, Sequence

from peerd import encode

DATAGRAM = encode("ECHO", "1", b"")
ASK_INTERVAL_S = 0.001
ASK_INTERVAL_PER_PORT_S = 0.0001
"""Many ports are asked less often, to leave the CPUs to the peers that start."""


def first_answers(ports: Sequence[int], timeout_s: float) -> dict[int, int]:
    """The pid that answers by port, once all have answered or at the timeout. 0: the reply has no pid."""
    give_up_s = time.monotonic() + timeout_s
    interval_s = max(ASK_INTERVAL_S, ASK_INTERVAL_PER_PORT_S * len(ports))
    pids: dict[int, int] = {}
    with contextlib.ExitStack() as stack:
        waiting = {port: stack.enter_context(asking(port)) for port in ports}
        while waiting and time.monotonic() < give_up_s:
            for sock in waiting.values():
                ask(sock)
            time.sleep(interval_s)
            for port, sock in list(waiting.items()):
                for pid in received_pids(sock):
                    pids[port] = pid
                    waiting.pop(port, None)
    return pids


def next_answer_ns(port: int, old_pid: int, timeout_s: float) -> int | None:
    """Monotonic time of the first answer of another pid than ``old_pid``."""
    give_up_s = time.monotonic() + timeout_s
    with asking(port) as sock:
        while time.monotonic() < give_up_s:
            ask(sock)
            asked_s = time.monotonic()
            select.select([sock], [], [], ASK_INTERVAL_S)
            now_ns = time.monotonic_ns()
            if any(pid != old_pid for pid in received_pids(sock)):
                return now_ns
            # Wait for the rest of the interval if the kernel reported a closed port.
            time.sleep(max(0.0, asked_s + ASK_INTERVAL_S - time.monotonic()))
    return None


@contextlib.contextmanager
def asking(port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(("127.0.0.1", port))
        yield sock


def ask(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the ICMP error of the datagram before: a closed port
        sock.send(DATAGRAM)


def received_pids(sock: socket.socket) -> Iterator[int]:
    """The pids of all answers so far; 0: the reply has no pid."""
    while True:
        try:
            answer = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:  # a closed port
            continue
        yield int(answer[len(DATAGRAM) :] or b"0")
