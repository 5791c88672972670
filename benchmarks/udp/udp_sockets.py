"""Sockets that a benchmark opens and its receivers inherit, and what the kernel reports about them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from bench.children import BenchmarkError
from peerd.linux import SOL_UDP, UDP_GRO
from peerd.supervisor.socket_queue import queue_state
from peerd.supervisor.sockets import grow_buffer

BUFFER_BYTES = 16 << 20  # The receive buffer that every receiver asks for
DRAIN_TIMEOUT_S = 60.0


@contextlib.contextmanager
def bound_sockets(count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(bound_socket()) for _ in range(count)]


def bound_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    grow_buffer(sock, BUFFER_BYTES)
    return sock


def granted_buffer() -> str:
    with bound_socket() as sock:
        granted = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    return f"receive buffer {granted / 2**20:.0f} MiB with the kernel's overhead"


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def wait_until_empty(
    socks: Sequence[socket.socket], check_alive: Callable[[], object] = lambda: None
) -> int:
    """Monotonic time in nanoseconds at which the queues were empty, to about a millisecond.

    ``check_alive`` raises if the receiver has exited.
    """
    deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
    while time.monotonic() < deadline_s:
        now_ns = time.monotonic_ns()
        was_empty = _are_empty(socks)
        time.sleep(0.001)
        # Checked twice, because a datagram may still be on its way from the sender into a queue.
        if was_empty and _are_empty(socks):
            return now_ns
        check_alive()
    raise BenchmarkError(f"the receiver did not empty its queue in {DRAIN_TIMEOUT_S:.0f} s")


def _are_empty(socks: Sequence[socket.socket]) -> bool:
    return not any(queue_state(sock).queued_bytes for sock in socks)


def dropped(sock: socket.socket) -> int:
    """The kernel's drops, modulo 2**32. Joined datagrams count as one (__udp_enqueue_schedule_skb)."""
    return queue_state(sock).dropped


def takes_joined(sock: socket.socket) -> bool:
    """Whether the receiver has asked for UDP_GRO."""
    try:
        return bool(sock.getsockopt(SOL_UDP, UDP_GRO))
    except OSError:  # before Linux 5.0
        return False
