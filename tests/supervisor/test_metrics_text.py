"""The text of the metrics and the server that sends it, without a supervisor around them."""

import selectors
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from peerd._scoreboard import COUNTER_NAMES, PeerState, RegistryState, Scoreboard
from peerd.address import Address
from peerd.settings import SupervisorSettings
from peerd.supervisor import exposition, metrics
from peerd.supervisor.death import Death
from peerd.supervisor.events import CannotStart, Event, ServiceDied, WorkerDied
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Loop
from peerd.supervisor.metrics import Metrics
from peerd.supervisor.metrics_server import MetricsServer
from peerd.supervisor.notify import Notifier
from peerd.supervisor.output import RecentLines
from peerd.supervisor.resources import PeerEnvironment, Resources
from peerd.supervisor.socket_queue import KernelDrops
from peerd.supervisor.sockets import listen
from peerd.supervisor.status import StatusReport
from peerd.supervisor.supervised_peer import SupervisedPeer

PEERS = 64
SETTINGS = SupervisorSettings(peers=PEERS)


class Processes:
    """The parts of a supervisor that peers and metrics read, without a process."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.loop = Loop()
        self.journal = Journal(self.loop)
        self.board = Scoreboard(PEERS)
        environment = PeerEnvironment(
            settings=SETTINGS,
            loop=self.loop,
            journal=self.journal,
            worker_entry=lambda *_: 0,
            recent_lines=RecentLines(),
            claim_oom_kill=lambda: False,
            has_been_ready=lambda: False,
        )
        self.peers: dict[int, SupervisedPeer] = {}
        for slot, sock in zip(self.board.slots, sockets, strict=True):
            drops = KernelDrops()
            drops.follow(sock)
            self.peers[slot.index] = SupervisedPeer(environment, slot, sock, drops)
        resources = Resources(
            sockets=sockets,
            control_path=Path("/nowhere"),
            metrics_socket=None,
            etcd=None,
            notifier=Notifier.from_environment(),
            version="1.2.3",
            log_dropped=lambda: 7,
        )
        self.status = StatusReport(SETTINGS, self.peers, self.board, resources)
        self.metrics = Metrics(self.peers, self.board, self.status, self.journal, resources)

    def text(self) -> bytes:
        return exposition.render(self.metrics.families())


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(PEERS)]
    found = Processes(made)
    yield found
    found.loop.close()
    for sock in made:
        sock.close()


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """As prometheus_client's parser reads them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_text_has_the_values_of_the_scoreboard(processes: Processes) -> None:
    board = processes.board
    for number, slot in enumerate(board.slots):
        slot.state = PeerState(number % len(PeerState))
        slot.restarts = 50 * number
        slot.lost_in_flight = 2**53 * number
        slot.generation = number
        slot.holder = "another process" * (number % 2)
    board.registry_state = RegistryState.LOST
    text = processes.text()
    values = samples(text)
    assert len(values) == sum(not line.startswith(b"#") for line in text.splitlines())
    for number in range(PEERS):
        peer = ("peer", f"localhost:{5001 + number}")
        state = PeerState(number % len(PeerState)).name.lower()
        assert values["peerd_peer_state", (peer, ("state", state))] == 1
        assert values["peerd_restarts_total", (peer, ("reason", "other"))] == 50 * number
        assert values["peerd_lost_in_flight_total", (peer,)] == 2**53 * number
        assert values["peerd_worker_starts_total", (peer,)] == number
        assert values["peerd_conflict", (peer,)] == number % 2
        assert values["peerd_turn_seconds_bucket", (("le", "+Inf"), peer)] == 0
        assert values["peerd_batch_datagrams_count", (peer,)] == 0
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")


def test_labels_and_help_are_escaped() -> None:
    value = 'a "quoted\\" name\nof two lines'
    family = exposition.Family("x", value, [(exposition.label_pairs(peer=value), 0.1)])
    (parsed,) = text_string_to_metric_families(exposition.render([family]).decode())
    assert parsed.documentation == value
    assert parsed.samples[0].labels == {"peer": value}
    assert parsed.samples[0].value == 0.1


def test_restarts_have_the_reason_of_the_death_before_them(processes: Processes) -> None:
    board = processes.board
    peer_id = "localhost:5001"

    def publish(event: Event) -> None:
        processes.journal.publish(event)
        processes.loop.run_once()

    def restarts() -> dict[str, float]:
        families = text_string_to_metric_families(processes.text().decode())
        return {
            sample.labels["reason"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "peerd_restarts_total" and sample.labels["peer"] == "localhost:5001"
            if sample.value
        }

    def died(pid: int, cause: str, restarted: bool = True) -> None:
        death = Death(pid, 1, 0.0, "exit code 1", cause, None, 0, "restarted at once", ())
        board.slots[0].restarts += restarted
        publish(WorkerDied(slot=0, peer_id=peer_id, death=death))

    publish(ServiceDied(what="registrar", pid=9, how="exit code 1"))
    died(1, "signal")
    died(2, "exit")
    assert restarts() == {"signal": 1, "exit": 1}
    died(3, "stuck")
    died(4, "signal")
    assert restarts() == {"signal": 2, "exit": 1, "stuck": 1}
    died(5, "exit", restarted=False)  # a successor was there
    assert restarts() == {"signal": 2, "exit": 1, "stuck": 1}
    board.slots[0].restarts += 1
    publish(
        CannotStart(slot=0, peer_id=peer_id, why="no module", is_provisional=False, is_retried=True)
    )
    board.slots[0].restarts += 1  # the fork had failed
    assert restarts() == {"signal": 2, "exit": 1, "stuck": 1, "boot": 1, "other": 1}
    for pid in range(3000):  # more than the history keeps
        died(pid, "exit")
    assert restarts() == {"signal": 2, "exit": 3001, "stuck": 1, "boot": 1, "other": 1}


def test_every_counter_of_the_scoreboard_has_a_metric() -> None:
    shown = {*metrics.COUNTERS, *metrics.RX_DROPPED, *metrics.TX_DROPPED}
    assert shown == set(COUNTER_NAMES)


def test_a_peer_that_is_scaled_away_and_back_keeps_its_counters(processes: Processes) -> None:
    processes.board.slots[63].lost_in_flight = 3
    line = b'peerd_lost_in_flight_total{peer="localhost:5064"} 3\n'
    assert line in processes.text()
    peer = processes.peers.pop(63)
    assert line not in processes.text()
    processes.peers[63] = peer
    assert line in processes.text()


def test_a_page_larger_than_the_socket_buffer_arrives_whole_without_blocking(
    processes: Processes,
) -> None:
    listener = listen(Address("127.0.0.1", 0), "--metrics")
    # Accepted connections inherit it. The least that the kernel grants is less than the page.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    loop = Loop()
    server = MetricsServer(listener, processes.metrics, processes.status, loop)
    try:
        with socket.create_connection(listener.getsockname()[:2]) as client:
            answer, iterations = ask(client, loop.selector)
    finally:
        server.close()
        loop.close()
    headers, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}" in headers.decode().split("\r\n")
    assert body.count(b"\n") == processes.text().count(b"\n")
    assert iterations > 2


def ask(client: socket.socket, selector: selectors.BaseSelector) -> tuple[bytes, int]:
    """The answer, and the number of events that it took the server."""
    client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    client.setblocking(False)
    answer, iterations = b"", 0
    while True:
        for key, events in selector.select(5):
            iterations += 1
            key.data(events)
        try:
            while chunk := client.recv(1 << 16):
                answer += chunk
        except BlockingIOError:
            continue
        return answer, iterations
