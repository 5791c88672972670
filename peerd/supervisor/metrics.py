"""The supervisor's metrics: the scoreboard and the kernel's numbers, read at the time of the scrape.

The counters are in the scoreboard, which outlives the workers, so none goes back when a worker is replaced.
All states, reasons and peers have a sample from the start, so that a rate has no gap.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain

from peerd._scoreboard import COUNTER_NAMES, PeerState, RegistryState, Scoreboard, Slot
from peerd.supervisor.events import CannotStart, WorkerDied, WorkerReplaced
from peerd.supervisor.exposition import Family, Samples, histogram_samples, label_pairs, with_label
from peerd.supervisor.journal import Journal
from peerd.supervisor.resources import Resources
from peerd.supervisor.socket_queue import QueueState
from peerd.supervisor.status import StatusReport
from peerd.supervisor.supervised_peer import SupervisedPeer

COUNTERS: Mapping[str, str] = {
    "rx_datagrams": "Datagrams that workers have read.",
    "rx_messages": "Messages that handlers were called with.",
    "rx_bytes": "Bytes of the datagrams that workers have read.",
    "handled": "Datagrams that workers have finished with, including those that a dead worker lost.",
    "handler_errors": "Messages whose handler raised.",
    "tx_messages": "Replies that the kernel accepted.",
    "tx_bytes": "Bytes of the replies that the kernel accepted.",
    "tx_gso_refused": "Joined sends (UDP_SEGMENT) that the kernel refused; their datagrams were sent "
    "one by one.",
    "icmp_errors": "ICMP errors about replies, such as port unreachable.",
    "lingers": "Iterations that waited for more after a short batch.",
    "turns": "Iterations of the workers' loops.",
}
"""Scoreboard counter -> help."""

RX_DROPPED: Mapping[str, str] = {
    name: name.removeprefix("rx_")
    for name in COUNTER_NAMES
    if name in ("rx_truncated", "rx_own", "rx_max_waiting", "unknown_magic")
    or name.startswith("decode_")
}
TX_DROPPED: Mapping[str, str] = {
    name: name.removeprefix("tx_").removeprefix("dropped_")
    for name in COUNTER_NAMES
    if name.startswith("tx_dropped_") or name == "tx_loop"
}
"""Scoreboard counter -> reason."""

RESTART_REASONS = ("signal", "exit", "oom", "stuck", "late", "boot", "other")

RELOAD_GAP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    def __init__(
        self,
        peers: Mapping[int, SupervisedPeer],
        board: Scoreboard,
        status: StatusReport,
        journal: Journal,
        resources: Resources,
    ) -> None:
        self._board = board
        self._status = status
        self._resources = resources
        self._started_ns = time.monotonic_ns()
        self._peers = peers
        self._totals = _RestartTotals(journal, peers)

    def families(self) -> Iterator[Family]:
        """Raises OSError when the kernel refuses to report on a socket."""
        now_ns = time.monotonic_ns()
        readings = [_read(peer, now_ns, self._started_ns) for peer in self._peers.values()]
        version = label_pairs(version=self._resources.version)
        yield Family("peerd_info", "The supervisor.", [(version, 1)])
        yield Family(
            "peerd_registry_state",
            "1 for the state of the connection to etcd, 0 for the other states.",
            _one_hot("", RegistryState, self._status.registry_state()),
        )
        yield Family(
            "peerd_log_records_dropped_total",
            "Records of the supervisor's log that were dropped because its output was not read.",
            [("", self._resources.log_dropped())],
        )
        states = (_one_hot(each.labels, PeerState, each.slot.state) for each in readings)
        yield Family(
            "peerd_peer_state",
            "1 for the peer's state, 0 for the other states.",
            list(chain.from_iterable(states)),
        )
        for name, (value, explanation) in PEER_METRICS.items():
            yield Family(name, explanation, [(each.labels, value(each)) for each in readings])
        yield Family(
            "peerd_handlers_waiting",
            "Async handlers that wait for something, per magic code.",
            [
                (with_label(each.labels, "magic", magic or "other"), count)
                for each in readings
                for magic, count in each.slot.waiting_by_magic.items()
            ],
        )
        yield Family(
            "peerd_restarts_total",
            "Workers started because another one had died: by a signal, by exiting, by the kernel's OOM "
            "killer, killed because it was stuck or late, or because it could not start (boot).",
            [
                (with_label(each.labels, "reason", reason), count)
                for each in readings
                for reason, count in self._totals.restarts_of(each.slot).items()
            ],
        )
        totals = self._totals
        yield Family(
            "peerd_reload_gap_seconds",
            "How long a socket had no reader while its worker was replaced (reload, restart).",
            histogram_samples("", RELOAD_GAP_BOUNDS_S, totals.gap_counts, totals.gaps_s),
            is_histogram=True,
        )
        yield from _worker_counters(readings)
        yield from _histograms(readings)


@dataclass(frozen=True)
class _Reading:
    """One peer at the time of the scrape."""

    peer_id: str
    labels: str
    slot: Slot
    queue: QueueState
    dropped_by_kernel: int
    counters: Mapping[str, int]
    histograms: Mapping[str, Sequence[int]]
    heartbeat_age_s: float
    is_healthy: bool


def _read(peer: SupervisedPeer, now_ns: int, started_ns: int) -> _Reading:
    slot = peer.slot
    return _Reading(
        peer.peer_id,
        with_label("", "peer", peer.peer_id),
        slot,
        *peer.drops.read(),
        slot.counters(),
        slot.histograms(),
        max(0, now_ns - (slot.heartbeat_ns or started_ns)) / 1e9,
        peer.health.is_healthy,
    )


PEER_METRICS: Mapping[str, tuple[Callable[[_Reading], float], str]] = {
    "peerd_healthy": (
        lambda each: int(each.is_healthy),
        "1 while the peer is ready, makes progress and reads its socket.",
    ),
    "peerd_heartbeat_age_seconds": (
        lambda each: each.heartbeat_age_s,
        (
            "Time since the last iteration of the worker's loop, or since the supervisor started; at "
            "most 0.25 in an idle loop."
        ),
    ),
    "peerd_registered": (
        lambda each: int(each.slot.registered),
        "1 while the peer's record is in etcd.",
    ),
    "peerd_conflict": (
        lambda each: int(bool(each.slot.holder)),
        "1 while a live record of another process has the peer's id.",
    ),
    "peerd_rx_queued_bytes": (
        lambda each: each.queue.queued_bytes,
        "Memory of the datagrams in the socket's receive queue.",
    ),
    "peerd_worker_starts_total": (
        lambda each: each.slot.generation,
        "Workers started: the first one, restarts, and reloads.",
    ),
    "peerd_lost_in_flight_total": (
        lambda each: each.slot.lost_in_flight,
        "Datagrams that workers had read and not answered when they died.",
    ),
    "peerd_lost_unread_total": (
        lambda each: each.slot.lost_unread,
        "Datagrams in the queue when the port was closed, because no worker could serve them.",
    ),
    "peerd_output_dropped_total": (
        lambda each: each.slot.log_dropped,
        "Writes of workers to their output that were dropped because the pipe was full.",
    ),
}
"""Metrics with one value per peer: name -> value and help."""


class _RestartTotals:
    """Restarts by reason, and gaps of reloads, since the supervisor started."""

    def __init__(self, journal: Journal, peers: Mapping[int, SupervisedPeer]) -> None:
        self._peers = peers
        self._restarts: dict[int, dict[str, int]] = {}
        self.gap_counts = [0] * (len(RELOAD_GAP_BOUNDS_S) + 1)
        self.gaps_s = 0.0
        journal.subscribe(WorkerReplaced, self._on_replaced)
        journal.subscribe(WorkerDied, lambda event: self._count(event.slot, event.death.cause))
        journal.subscribe(CannotStart, lambda event: self._count(event.slot, "boot"))

    def restarts_of(self, slot: Slot) -> dict[str, int]:
        """By reason; together as many as the scoreboard has. Restarts without a death are "other"."""
        counts = self._counts(slot.index)
        counts["other"] += max(0, slot.restarts - sum(counts.values()))
        return counts

    def _counts(self, slot: int) -> dict[str, int]:
        return self._restarts.setdefault(slot, dict.fromkeys(RESTART_REASONS, 0))

    def _on_replaced(self, event: WorkerReplaced) -> None:
        gap_s = event.gap_ms / 1e3
        self.gap_counts[bisect_left(RELOAD_GAP_BOUNDS_S, gap_s)] += 1
        self.gaps_s += gap_s

    def _count(self, slot: int, reason: str) -> None:
        """Not every death is followed by a restart: the supervisor may stop, or a successor may be there."""
        counts, peer = self._counts(slot), self._peers.get(slot)
        if peer is not None and sum(counts.values()) < peer.slot.restarts:
            counts[reason if reason in RESTART_REASONS else "other"] += 1


def counter_metric(counter: str) -> str:
    """The metric of a counter of the scoreboard."""
    return f"peerd_{'handled_datagrams' if counter == 'handled' else counter}_total"


def _worker_counters(readings: Sequence[_Reading]) -> Iterator[Family]:
    for counter, explanation in COUNTERS.items():
        samples = [(each.labels, each.counters[counter]) for each in readings]
        yield Family(counter_metric(counter), explanation, samples)
    by_kernel = [
        (with_label(each.labels, "reason", "kernel"), each.dropped_by_kernel) for each in readings
    ]
    yield Family(
        "peerd_rx_dropped_total",
        'Datagrams that reached no handler; reason="kernel": the receive buffer was full (joined '
        "datagrams count as one).",
        [*by_kernel, *_by_reason(readings, RX_DROPPED)],
    )
    yield Family(
        "peerd_tx_dropped_total", "Replies that were not sent.", _by_reason(readings, TX_DROPPED)
    )


def _by_reason(readings: Sequence[_Reading], reasons: Mapping[str, str]) -> Samples:
    return [
        (with_label(each.labels, "reason", reason), each.counters[counter])
        for each in readings
        for counter, reason in reasons.items()
    ]


def _histograms(readings: Sequence[_Reading]) -> Iterator[Family]:
    # Bucket i of the scoreboard ends below 2**(i+1). Datagrams are whole numbers; microseconds are truncated,
    # so a time that was counted as 2**(i+1) - 1 may have been nearly 2**(i+1).
    ends = [2 ** (i + 1) for i in range(len(readings[0].histograms["batch_datagrams"]) - 1)]
    datagrams: list[tuple[str, float]] = []
    for each in readings:
        sizes, total = each.histograms["batch_datagrams"], each.counters["rx_datagrams"]
        datagrams += histogram_samples(each.labels, tuple(end - 1.0 for end in ends), sizes, total)
    text = "Datagrams read per iteration."
    yield Family("peerd_batch_datagrams", text, datagrams, is_histogram=True)
    ends = [2 ** (i + 1) for i in range(len(readings[0].histograms["turn_us"]) - 1)]
    seconds: list[tuple[str, float]] = []
    for each in readings:
        times = each.histograms["turn_us"]
        seconds += histogram_samples(each.labels, tuple(end / 1e6 for end in ends), times, None)
    text = "Time per iteration: read, handle, reply. No sum is kept."
    yield Family("peerd_turn_seconds", text, seconds, is_histogram=True)


def _one_hot(labels: str, states: type[IntEnum], state: IntEnum) -> Samples:
    return [(with_label(labels, "state", each.name.lower()), int(each is state)) for each in states]
