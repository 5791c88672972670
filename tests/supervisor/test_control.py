"""Fairness between clients of the control socket."""

from __future__ import annotations

import socket
import threading

from harness.supervised import Supervised
from peerd.supervisor.control_server import MAX_REQUEST_BYTES

STATUS = b'{"v": 1, "command": "status"}\n'


def test_a_greedy_client_does_not_delay_another(supervised: Supervised) -> None:
    running = supervised.start(peers=2)
    running.wait_ready()
    asked = MAX_REQUEST_BYTES // len(STATUS)
    answered = [0]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as greedy,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as modest,
    ):
        for sock in (greedy, modest):
            sock.settimeout(30)
            sock.connect(str(running.control))

        def read_all() -> None:
            while answered[0] < asked:
                answered[0] += greedy.recv(1 << 20).count(b"\n")

        reader = threading.Thread(target=read_all)
        reader.start()
        greedy.sendall(STATUS * asked)
        modest.sendall(STATUS)
        assert modest.recv(1 << 16).endswith(b"}\n")
        in_between = answered[0]
        reader.join(60)
    assert in_between < asked / 2
    assert answered[0] == asked
