"""Asks peers who they are: one small datagram again and again, and the pid that comes back with it."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator, Sequence

from peerd import encode

DATAGRAM = encode("ECHO", "1", b"")
ASK_EVERY_S = 0.001
ASK_EVERY_S_A_PORT = 0.0001
"""Many ports are asked less often: the client is to leave the CPUs to those that start."""


def first_answers(ports: Sequence[int], limit_s: float) -> dict[int, int]:
    """The pid that answers, by port, when all have or ``limit_s`` is over. 0: it does not say."""
    give_up_s = time.monotonic() + limit_s
    every_s = max(ASK_EVERY_S, ASK_EVERY_S_A_PORT * len(ports))
    pids: dict[int, int] = {}
    with contextlib.ExitStack() as stack:
        waiting = {port: stack.enter_context(asking(port)) for port in ports}
        while waiting and time.monotonic() < give_up_s:
            for sock in waiting.values():
                ask(sock)
            time.sleep(every_s)
            for port, sock in list(waiting.items()):
                for pid in heard(sock):
                    pids[port] = pid
                    waiting.pop(port, None)
    return pids


def next_answer_ns(port: int, old_pid: int, limit_s: float) -> int | None:
    """When somebody else than ``old_pid`` answered, on the monotonic clock."""
    give_up_s = time.monotonic() + limit_s
    with asking(port) as sock:
        while time.monotonic() < give_up_s:
            ask(sock)
            asked_s = time.monotonic()
            select.select([sock], [], [], ASK_EVERY_S)
            now_ns = time.monotonic_ns()
            if any(pid != old_pid for pid in heard(sock)):
                return now_ns
            # The rest of it, where nobody had the port and the kernel said so at once.
            time.sleep(max(0.0, asked_s + ASK_EVERY_S - time.monotonic()))
    return None


@contextlib.contextmanager
def asking(port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(("127.0.0.1", port))
        yield sock


def ask(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # nobody there: an ICMP error of the datagram before
        sock.send(DATAGRAM)


def heard(sock: socket.socket) -> Iterator[int]:
    """The pids of all answers so far; 0: it does not say."""
    while True:
        try:
            answer = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:  # nobody there
            continue
        yield int(answer[len(DATAGRAM) :] or b"0")
