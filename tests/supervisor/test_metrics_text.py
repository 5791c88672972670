"""The text of the metrics and who sends it, without a supervisor around them."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from peerd._scoreboard import COUNTER_NAMES, PeerState, RegistryState, Scoreboard
from peerd.address import Address
from peerd.settings import SupervisorSettings
from peerd.supervisor import metrics
from peerd.supervisor.history import History
from peerd.supervisor.kernel_drops import KernelDrops
from peerd.supervisor.loop import Loop
from peerd.supervisor.notify import Notifier
from peerd.supervisor.output import RecentLines
from peerd.supervisor.sockets import listen
from peerd.supervisor.status import StatusReport
from peerd.supervisor.supervised_peer import Peer
from peerd.supervisor.surroundings import Surroundings
from peerd.supervisor.worker_process import WorkerEntry

PEERS = 64
SETTINGS = SupervisorSettings(peers=PEERS)


class Processes:
    """A supervisor's parts that peers and metrics look at, without a process."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.settings = SETTINGS
        self.loop = Loop()
        self.history = History()
        self.recent_lines = RecentLines()
        self.worker_entry: WorkerEntry = lambda *_: 0
        self.board = Scoreboard(PEERS)
        self.peers: dict[int, Peer] = {}
        for slot, sock in zip(self.board.slots, sockets, strict=True):
            drops = KernelDrops()
            drops.follow(sock)
            self.peers[slot.index] = Peer(self, slot, sock, drops)
        surroundings = Surroundings(
            sockets=sockets,
            control_path=Path("/nowhere"),
            metrics_socket=None,
            etcd=None,
            notifier=Notifier.from_environment(),
            version="1.2.3",
            log_dropped=lambda: 7,
        )
        self.status = StatusReport(SETTINGS, self.peers, self.board, surroundings)
        self.collector = metrics.ScoreboardCollector(
            self.peers, self.board, self.status, self.history, surroundings
        )

    def slot_has_changed(self) -> None: ...
    def peer_is_ready(self, peer: Peer) -> None: ...
    def peer_cannot_start(self, peer: Peer, why: str) -> bool:
        return False

    def peer_is_parked(self, peer: Peer) -> None: ...
    def peer_has_ended(self, peer: Peer) -> None: ...
    def was_oom_killed(self) -> bool:
        return False


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(PEERS)]
    found = Processes(made)
    yield found
    found.loop.close()
    for sock in made:
        sock.close()


@pytest.fixture
def board(processes: Processes) -> Scoreboard:
    return processes.board


@pytest.fixture
def status(processes: Processes) -> StatusReport:
    return processes.status


@pytest.fixture
def history(processes: Processes) -> History:
    return processes.history


@pytest.fixture
def collector(processes: Processes) -> metrics.ScoreboardCollector:
    return processes.collector


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

    def died(pid: int, cause: str, restarted: bool = True) -> None:
        history.note("died", peer_id="localhost:5001", pid=pid, cause=cause)
        board.slots[0].restarts += restarted

    history.note("died", what="registrar", pid=9, how="exit code 1")
    died(1, "signal")
    died(2, "exit")
    assert restarts() == {"signal": 1, "exit": 1}
    died(3, "stuck")
    died(4, "signal")
    assert restarts() == {"signal": 2, "exit": 1, "stuck": 1}
    died(5, "exit", restarted=False)  # a successor was there
    assert restarts() == {"signal": 2, "exit": 1, "stuck": 1}
    history.note("cannot start", peer_id="localhost:5001", why="no module")
    board.slots[0].restarts += 1
    board.slots[0].restarts += 1  # no process was to be had
    assert restarts() == {"signal": 2, "exit": 1, "stuck": 1, "boot": 1, "other": 1}
    for pid in range(3000):  # more than the history keeps
        died(pid, "exit")
    assert sum(restarts().values()) == board.slots[0].restarts
    assert restarts()["exit"] > 1


def test_every_counter_of_the_scoreboard_is_told() -> None:
    told = {*metrics.COUNTERS, *metrics.RX_DROPPED, *metrics.TX_DROPPED}
    # The kernel's drops come from the kernel, up to date.
    assert told == set(COUNTER_NAMES) - {"rx_kernel_drops"}


def test_a_peer_that_was_scaled_away_and_back_counts_on(processes: Processes) -> None:
    form = metrics._Form(processes.collector)
    processes.board.slots[63].lost_in_flight = 3
    line = b'peerd_lost_in_flight_total{peer="localhost:5064"} 3\n'
    assert line in form.filled_in()
    peer = processes.peers.pop(63)
    assert line not in metrics._Form(processes.collector).filled_in()
    processes.peers[63] = peer
    assert line in metrics._Form(processes.collector).filled_in()


def test_a_text_larger_than_the_socket_takes_arrives_whole_and_blocks_nobody(
    collector: metrics.ScoreboardCollector, status: StatusReport
) -> None:
    listener = listen(Address("127.0.0.1", 0), "--metrics")
    # What is accepted inherits it. The least that the kernel grants is less than the text.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    loop = Loop()
    server = metrics.MetricsServer(listener, collector, status, loop)
    try:
        with socket.create_connection(listener.getsockname()[:2]) as client:
            answer, turns = ask(client, loop.selector)
    finally:
        server.close()
        loop.close()
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
