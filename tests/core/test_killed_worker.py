"""A worker is killed at any moment: the number of datagrams that it had read and not finished is exact.

The expected number comes from the client and the kernel: datagrams sent, minus those left in the
socket's queue, minus replies received. In two of three rounds the kill happens during recvmmsg or
sendmmsg, or between one of them and the counters (flight.pxd).
"""

import os
import random
import signal
import socket
import time

import pytest

from peerd import encode
from peerd._loop import DatagramLoop
from peerd._scoreboard import Scoreboard, Slot
from peerd.linux import SO_RCVBUFFORCE, SO_SNDBUFFORCE, SOL_UDP, UDP_SEGMENT
from peerd.supervisor.socket_queue import queue_state

SIZE = 64
JOINED = 20
DATAGRAM = encode("M", "1", bytes(SIZE - 10))
ROUNDS = 40


def with_room() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
        sock.setsockopt(socket.SOL_SOCKET, option, 64 << 20)
    return sock


def take_all(sock: socket.socket) -> int:
    """Empty the queue; the number of datagrams, with joined ones counted one by one."""
    sock.setblocking(False)
    taken = 0
    while True:
        try:
            taken += max(1, len(sock.recv(1 << 16)) // SIZE)
        except BlockingIOError:
            return taken


def serve(sock: socket.socket, slot: Slot, gro: bool, gso: bool) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            loop = DatagramLoop(
                sock.fileno(),
                {"M": lambda message: message.body},
                {},
                slot,
                lambda *_: None,
                gro=gro,
                gso=gso,
            )
            loop.run()
        finally:
            os._exit(1)
    return pid


@pytest.mark.parametrize("gso", [False, True], ids=["no gso", "gso"])
@pytest.mark.parametrize("gro", [False, True], ids=["no gro", "gro"])
@pytest.mark.parametrize("joined", [1, JOINED])
def test_the_cost_of_a_kill_is_known_exactly(joined: int, gro: bool, gso: bool) -> None:
    chance = random.Random(f"{joined} {gro} {gso}")
    for _ in range(ROUNDS):
        slot = Scoreboard(1).slots[0]
        with with_room() as server, with_room() as client:
            server.bind(("127.0.0.1", 0))
            client.connect(server.getsockname())
            client.setsockopt(SOL_UDP, UDP_SEGMENT, SIZE if joined > 1 else 0)
            worker = serve(server, slot, gro, gso)
            sent = 0
            end_s = time.monotonic() + chance.uniform(0.002, 0.02)
            while time.monotonic() < end_s:
                client.send(DATAGRAM * joined)
                sent += joined
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            missed = sent - take_all(server) - take_all(client)
            assert (queue_state(server).dropped, queue_state(client).dropped) == (0, 0)
            assert slot.unfinished == missed
