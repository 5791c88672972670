"""The text of the metrics without a supervisor around it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from peerd._scoreboard import COUNTER_NAMES, PeerState, RegistryState, Scoreboard
from peerd.settings import SupervisorSettings
from peerd.supervisor import metrics
from peerd.supervisor.sockets import QueueState
from peerd.supervisor.status import StatusReport

PEERS = 3


@pytest.fixture
def board() -> Scoreboard:
    return Scoreboard(PEERS)


@pytest.fixture
def collector(board: Scoreboard) -> Iterator[metrics.ScoreboardCollector]:
    settings = SupervisorSettings(peers=PEERS)
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(PEERS)]
    status = StatusReport(settings, sockets, board, "1.2.3")
    yield metrics.ScoreboardCollector(settings, sockets, board, status, "1.2.3")
    for sock in sockets:
        sock.close()


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
        slot.state = PeerState(number)
        slot.restarts = 10**number
        slot.lost_in_flight = 2**53 * number
        slot.generation = number
        slot.holder = "somebody else" * (number % 2)
    board.registry_state = RegistryState.LOST
    text = form.filled_in()
    assert without_ages(text) == without_ages(generate_latest(registry))
    assert b'peerd_restarts_total{peer="localhost:5003"} 100\n' in text
    assert b'peerd_conflict{peer="localhost:5002"} 1\n' in text
    assert b'peerd_peer_state{peer="localhost:5003",state="ready"} 1\n' in text


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
