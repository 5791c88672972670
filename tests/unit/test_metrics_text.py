"""The text of the metrics and who sends it, without a supervisor around them."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from peerd._scoreboard import COUNTER_NAMES, PeerState, RegistryState, Scoreboard
from peerd.address import Address
from peerd.settings import SupervisorSettings
from peerd.supervisor import metrics
from peerd.supervisor.history import History
from peerd.supervisor.sockets import QueueState, listen
from peerd.supervisor.status import StatusReport

PEERS = 64
SETTINGS = SupervisorSettings(peers=PEERS)


@pytest.fixture
def board() -> Scoreboard:
    return Scoreboard(PEERS)


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(PEERS)]
    yield made
    for sock in made:
        sock.close()


@pytest.fixture
def status(board: Scoreboard, sockets: list[socket.socket]) -> StatusReport:
    return StatusReport(SETTINGS, sockets, board, "1.2.3")


@pytest.fixture
def history() -> History:
    return History()


@pytest.fixture
def collector(
    board: Scoreboard, sockets: list[socket.socket], status: StatusReport, history: History
) -> metrics.ScoreboardCollector:
    return metrics.ScoreboardCollector(SETTINGS, sockets, board, status, history, "1.2.3")


def without_ages(text: bytes) -> list[object]:
    """Everything in its order, but for the one number that changes by itself."""
    return [
        (family.name, family.type, family.documentation, sample.name, sample.labels, value)
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        for value in (sample.value if "age" not in sample.name else None,)
    ]


def test_the_filled_in_form_says_what_prometheus_client_would_write(
    board: Scoreboard, collector: metrics.ScoreboardCollector
) -> None:
    registry = CollectorRegistry()
    registry.register(collector)
    form = metrics._Form(collector)
    for number, slot in enumerate(board.slots):
        slot.state = PeerState(number % len(PeerState))
        slot.restarts = 50 * number
        slot.lost_in_flight = 2**53 * number
        slot.generation = number
        slot.holder = "somebody else" * (number % 2)
    board.registry_state = RegistryState.LOST
    text = form.filled_in()
    assert without_ages(text) == without_ages(generate_latest(registry))
    assert b'peerd_restarts_total{peer="localhost:5003",reason="other"} 100\n' in text
    assert b'peerd_conflict{peer="localhost:5002"} 1\n' in text
    assert b'peerd_peer_state{peer="localhost:5003",state="ready"} 1\n' in text


def test_restarts_have_the_reason_of_the_death_before_them(
    board: Scoreboard, collector: metrics.ScoreboardCollector, history: History
) -> None:
    form = metrics._Form(collector)

    def restarts() -> dict[str, float]:
        families = text_string_to_metric_families(form.filled_in().decode())
        return {
            sample.labels["reason"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "peerd_restarts_total" and sample.labels["peer"] == "localhost:5001"
            if sample.value
        }

    def died(pid: int, how: str, restarted: bool = True) -> None:
        history.note("died", peer_id="localhost:5001", pid=pid, how=how)
        board.slots[0].restarts += restarted

    history.note("died", what="registrar", pid=9, how="exit code 1")
    died(1, "killed by SIGSEGV")
    died(2, "exit code 70")
    assert restarts() == {"signal": 1, "exit": 1}
    history.note("stuck", peer_id="localhost:5001", pid=3)
    died(3, "killed by SIGKILL")
    died(4, "killed by SIGKILL")
    assert restarts() == {"signal": 2, "exit": 1, "stuck": 1}
    died(5, "exit code 1", restarted=False)  # a successor was there
    assert restarts() == {"signal": 2, "exit": 1, "stuck": 1}
    history.note("cannot start", peer_id="localhost:5001", why="no module")
    board.slots[0].restarts += 1
    board.slots[0].restarts += 1  # no process was to be had
    assert restarts() == {"signal": 2, "exit": 1, "stuck": 1, "boot": 1, "other": 1}
    for pid in range(3000):  # more than the history keeps
        died(pid, "exit code 1")
    assert sum(restarts().values()) == board.slots[0].restarts
    assert restarts()["exit"] > 1


def test_every_counter_of_the_scoreboard_is_told() -> None:
    told = {*metrics.COUNTERS, *metrics.RX_DROPPED, *metrics.TX_DROPPED}
    # The kernel's drops come from the kernel, up to date.
    assert told == set(COUNTER_NAMES) - {"rx_kernel_drops"}


def test_the_kernels_drops_go_on_where_its_counter_wraps(
    monkeypatch: pytest.MonkeyPatch, collector: metrics.ScoreboardCollector
) -> None:
    """Four billion drops cannot be made here."""

    def dropped() -> float:
        text = metrics._Form(collector).filled_in().decode()
        return max(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("reason") == "kernel"
        )

    for raw, total in ((0, 0), (2**32 - 1, 2**32 - 1), (5, 2**32 + 5), (5, 2**32 + 5)):
        monkeypatch.setattr(metrics, "queue_state", lambda _, raw=raw: QueueState(0, raw))
        assert dropped() == total


def test_a_text_larger_than_the_socket_takes_arrives_whole_and_blocks_nobody(
    collector: metrics.ScoreboardCollector, status: StatusReport
) -> None:
    listener = listen(Address("127.0.0.1", 0), "--metrics")
    # What is accepted inherits it. The least that the kernel grants is less than the text.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with selectors.DefaultSelector() as selector:
        server = metrics.MetricsServer(listener, collector, status, selector)
        try:
            with socket.create_connection(listener.getsockname()[:2]) as client:
                answer, turns = ask(client, selector)
        finally:
            server.close()
    headers, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}" in headers.decode().split("\r\n")
    assert body.count(b"\n") == metrics._Form(collector).filled_in().count(b"\n")
    assert turns > 2


def ask(client: socket.socket, selector: selectors.BaseSelector) -> tuple[bytes, int]:
    """The answer, and how often the server had a turn before it was all there."""
    client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    client.setblocking(False)
    answer, turns = b"", 0
    while True:
        for key, events in selector.select(5):
            turns += 1
            key.data(events)
        try:
            while chunk := client.recv(1 << 16):
                answer += chunk
        except BlockingIOError:
            continue
        return answer, turns
