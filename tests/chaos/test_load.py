"""The load counts exactly what real servers drop, double and swap."""

from __future__ import annotations

import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from harness.eventually import eventually
from peerd.supervisor.sockets import grow_buffer
from peerd_chaos.load import Load, LoadError

RATE = 2000.0


class Server:
    """Echoes in one thread, with a fault in each tenth reply."""

    def __init__(self, fault: str = "") -> None:
        self.taken = 0
        self._fault = fault
        self._held_back: list[bytes] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        grow_buffer(self._socket, 64 << 20)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            data, sender = self._socket.recvfrom(2048)
            if not data:
                return
            for answer in self._answers(data):
                self._socket.sendto(answer, sender)
            self.taken += 1

    def _answers(self, data: bytes) -> list[bytes]:
        match self._fault if self.taken % 10 == 5 else "":
            case "drop":
                return []
            case "double":
                return [data, data]
            case "forge":
                return [data, b"unsolicited"]
            case "swap":  # with the next datagram
                self._held_back = [data]
                return []
        answers, self._held_back = [data, *self._held_back], []
        return answers


@pytest.mark.parametrize(
    ("fault", "missing", "doubled", "out_of_order", "foreign"),
    [
        ("", 0, 0, 0, 0),
        ("drop", 1, 0, 0, 0),
        ("double", 0, 1, 0, 0),
        ("swap", 0, 0, 1, 0),
        ("forge", 0, 0, 0, 1),
    ],
)
def test_each_kind_of_reply_is_counted(
    fault: str, missing: int, doubled: int, out_of_order: int, foreign: int
) -> None:
    # With one client, neighbours that are swapped belong to the same stream.
    with Server(fault) as server, Load([server.port], rate=RATE, clients=1) as load:
        eventually(lambda: server.taken >= 1000)
        report = load.finish()
    assert report.finished
    (count,) = report.counts
    assert count.sent >= 1000
    # The last number, if it is held back, comes back behind nothing but a mark.
    harmed = sum(number % 10 == 5 for number in range(count.sent - out_of_order))
    assert count.missing == missing * harmed
    assert count.doubled == doubled * harmed
    assert count.out_of_order == out_of_order * harmed
    # The mark behind the numbers may be answered with an unsolicited reply as well.
    assert report.foreign in (foreign * harmed, foreign * (harmed + 1))
    assert report.dropped == 0


def test_ports_come_and_go() -> None:
    with Server() as first, Server() as second, Load([first.port], rate=RATE) as load:
        eventually(lambda: first.taken >= 100)
        assert second.taken == 0
        load.add([second.port])
        eventually(lambda: second.taken >= 100)
        load.remove([second.port])
        sent = load.report().of(second.port).sent
        before = first.taken
        eventually(lambda: first.taken >= before + 100)
        assert load.report().of(second.port).sent == sent
        eventually(lambda: second.taken == sent)
        load.add([second.port])
        eventually(lambda: second.taken >= sent + 100)
        report = load.finish()
    assert (report.missing, report.doubled, report.out_of_order, report.finished) == (0, 0, 0, True)
    assert {count.client for count in report.counts} == {0, 1, 2, 3}


def test_a_port_that_is_not_served_loses_everything() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        with Load([sock.getsockname()[1]], rate=RATE) as load:
            eventually(lambda: load.report().sent >= 100)
            report = load.finish(timeout_s=0.5)
    assert report.missing == report.sent
    assert not report.finished


def test_the_rate_is_kept() -> None:
    with Server() as server, Load([server.port], rate=0.0) as load:
        begun_s = time.monotonic()
        load.pace(RATE)
        eventually(lambda: server.taken >= 2 * RATE)
        assert time.monotonic() - begun_s >= 0.9 * 2
        load.pace(0.0)
        sent = load.report().sent
        eventually(lambda: server.taken == sent)
        assert load.finish().sent == sent


def test_two_threads_may_use_it_at_once() -> None:
    with Server() as server, Load([server.port], rate=RATE) as load, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask_again_and_again, load, server.port) for _ in range(2)]
        assert [each.result(30) for each in asked] == [200, 200]
        assert load.finish().missing == 0


def ask_again_and_again(load: Load, port: int) -> int:
    """How many commands got their own answer."""
    return sum(load.send(port, "SEQ") and load.report().of(port).sent > 0 for _ in range(200))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_dies_or_hangs_is_an_error(number: signal.Signals) -> None:
    """And stays one, so that a late answer is not taken for another."""
    others = set(psutil.Process().children())
    with Server() as server, Load([server.port], rate=RATE, patience_s=1.0) as load:
        (client,) = set(psutil.Process().children()) - others
        client.send_signal(number)
        with pytest.raises(LoadError, match=r"exited early|does not answer within 1 s"):
            load.report()
        with pytest.raises(LoadError, match="exited early"):
            load.report()
