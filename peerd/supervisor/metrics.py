"""``--metrics``: the scoreboard as Prometheus text, and two health checks, over HTTP.

    /metrics        what the workers count, and how each peer gets on
    /healthz/live   200 while the supervisor's loop turns: no answer means that it does not
    /healthz/ready  200 when every peer is ready and gets on, else 503, with who is not in one line

The server lives in the supervisor's selector and never blocks. Every connection carries one GET, and
costs one bounded entry in a table: too long a request is dropped, so is who takes too long, when the
next one comes, and the oldest when the table is full.

The counters are in the scoreboard, which outlives the workers: none goes back when one is replaced.
While the supervisor writes them it does nothing else, and to write the 70 samples of a peer takes
prometheus_client 0.35 ms. But nothing of the text changes except its numbers. So prometheus_client writes
it once, at the start, and a scrape fills in the numbers: 2 ms for 64 peers instead of 23. And a text is
given out again for ten times as long as it took to write: however often and by how many it is asked
for, it takes a tenth of the supervisor's time.

Rejected: prometheus_client's own server. It is a thread, and what forks has none. For the same reason
nothing here counts by prometheus_client's metrics, and its collectors of this process are left out.

This module is imported for ``--metrics`` only: prometheus_client takes 65 ms and some megabytes.
"""

from __future__ import annotations

import logging
import re
import selectors
import socket
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from http import HTTPStatus
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from peerd._scoreboard import COUNTER_NAMES, PeerState, RegistryState, Scoreboard, Slot
from peerd.supervisor.history import History
from peerd.supervisor.listener import Listener
from peerd.supervisor.loop import Loop
from peerd.supervisor.sockets import QueueState
from peerd.supervisor.status import StatusReport
from peerd.supervisor.supervised_peer import Peer
from peerd.supervisor.surroundings import Surroundings

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 8 * 1024
MAX_CLIENTS = 32
CLIENT_TIMEOUT_S = 5.0

SPARED = 10
"""A text is given out again for so many times as long as it took to write."""

MOST_NAMES = 8
"""Peers in the one line of /healthz/ready."""

# Every name that we give is plain ASCII, so this is true with any version of prometheus_client, whose
# constant for "the latest" is of a format that old servers do not know.
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
PLAIN_TEXT = "text/plain; charset=utf-8"

COUNTERS: Mapping[str, tuple[str, str]] = {
    "rx_datagrams": ("peerd_rx_datagrams_total", "Datagrams that workers have read."),
    "rx_messages": ("peerd_rx_messages_total", "Messages that handlers were called with."),
    "rx_bytes": ("peerd_rx_bytes_total", "Bytes of the datagrams that workers have read."),
    "handled": (
        "peerd_handled_datagrams_total",
        "Datagrams that workers are done with; those lost in flight too, once there is a successor.",
    ),
    "handler_errors": ("peerd_handler_errors_total", "Messages whose handler raised."),
    "tx_messages": ("peerd_tx_messages_total", "Replies that the kernel took."),
    "tx_bytes": ("peerd_tx_bytes_total", "Bytes of the replies that the kernel took."),
    "tx_gso_refused": (
        "peerd_tx_gso_refused_total",
        "Joined sends (UDP_SEGMENT) that the kernel refused, and that went out one by one.",
    ),
    "icmp_errors": (
        "peerd_icmp_errors_total",
        "ICMP errors about replies, such as port unreachable.",
    ),
    "lingers": ("peerd_lingers_total", "Turns that waited for more after a short batch."),
    "turns": ("peerd_turns_total", "Turns of the workers' loops."),
}
"""The metric and its help, by the scoreboard's counter."""

RX_DROPPED: Mapping[str, str] = {
    name: name.removeprefix("rx_")
    for name in COUNTER_NAMES
    if name in ("rx_truncated", "unknown_magic") or name.startswith("decode_")
}
TX_DROPPED: Mapping[str, str] = {
    name: name.removeprefix("tx_dropped_")
    for name in COUNTER_NAMES
    if name.startswith("tx_dropped_")
}
"""The reason, by the scoreboard's counter."""

RESTART_REASONS = ("signal", "exit", "oom", "stuck", "late", "boot", "other")

RELOAD_GAP_ENDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

END_OF_HEADERS = re.compile(rb"\r?\n\r?\n")


class MetricsServer:
    """Answers HTTP from within the supervisor's selector; never blocks."""

    def __init__(
        self,
        listener: socket.socket,
        collector: ScoreboardCollector,
        status: StatusReport,
        loop: Loop,
    ) -> None:
        """The listener must not block. It is the server's from here on."""
        self._collector = collector
        self._form: _Form | None = _Form(collector)
        self._status = status
        self._selector = loop.selector
        self._clients: dict[socket.socket, _Client] = {}
        self._text = b""
        self._text_until_s = 0.0
        self._pages: Mapping[bytes, Callable[[], _Response]] = {
            b"/metrics": self._metrics,
            b"/healthz/live": lambda: _response(HTTPStatus.OK, b"live\n"),
            b"/healthz/ready": self._ready,
        }
        self._listener = Listener(loop, listener, self._admit)

    def peers_have_changed(self) -> None:
        """There are more or fewer of them: the text has other lines, from the next scrape on."""
        self._form = None
        self._text_until_s = 0.0

    def close(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._listener.close()

    def _admit(self, connection: socket.socket) -> None:
        now_s = time.monotonic()
        for late in [each for each in self._clients.values() if each.deadline_s <= now_s]:
            self._drop(late)
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(next(iter(self._clients.values())))
        connection.setblocking(False)
        client = self._clients[connection] = _Client(connection, now_s + CLIENT_TIMEOUT_S)
        self._selector.register(
            client.connection, selectors.EVENT_READ, lambda _: self._read(client)
        )

    def _read(self, client: _Client) -> None:
        try:
            chunk = client.connection.recv(MAX_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        client.received += chunk
        if not chunk or len(client.received) > MAX_REQUEST_BYTES:
            self._drop(client)
        elif END_OF_HEADERS.search(client.received):
            try:
                answer = self._answer(client.received)
            except Exception:  # no scrape is worth the whole service
                log.exception("a request for the metrics failed")
                answer = _response(HTTPStatus.INTERNAL_SERVER_ERROR, b"see the supervisor's log\n")
            client.unsent = deque(memoryview(part) for part in answer)
            self._selector.modify(
                client.connection, selectors.EVENT_WRITE, lambda _: self._write(client)
            )
            self._write(client)

    def _write(self, client: _Client) -> None:
        try:
            while client.unsent:
                part = client.unsent[0]
                part = client.unsent[0] = part[client.connection.send(part) :]
                if not part:
                    client.unsent.popleft()
        except BlockingIOError:
            return
        except OSError:
            pass  # it went away
        self._drop(client)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.connection]
        self._selector.unregister(client.connection)
        client.connection.close()

    def _answer(self, request: bytes) -> _Response:
        words = request.splitlines()[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST, b"this speaks HTTP/1.1\n")
        if words[0] != b"GET":
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"GET is all there is\n", "Allow: GET")
        page = self._pages.get(words[1].partition(b"?")[0])
        if page is None:
            known = b", ".join(self._pages)
            return _response(HTTPStatus.NOT_FOUND, b"there are " + known + b"\n")
        return page()

    def _metrics(self) -> _Response:
        begun_s = time.monotonic()
        if begun_s >= self._text_until_s:
            self._form = self._form or _Form(self._collector)
            self._text = self._form.filled_in()
            ended_s = time.monotonic()
            self._text_until_s = ended_s + SPARED * (ended_s - begun_s)
        return _response(HTTPStatus.OK, self._text, f"Content-Type: {PROMETHEUS_TEXT}")

    def _ready(self) -> _Response:
        laggards = self._status.laggards()
        if not laggards:
            return _response(HTTPStatus.OK, b"ready\n")
        more = len(laggards) - MOST_NAMES
        if more > 0:
            laggards[MOST_NAMES:] = [f"and {more} more"]
        line = f"not ready: {', '.join(laggards)}\n"
        return _response(HTTPStatus.SERVICE_UNAVAILABLE, line.encode("utf-8", "replace"))


class _Client:
    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        self.connection = connection
        self.deadline_s = deadline_s
        self.received = b""
        self.unsent: deque[memoryview] = deque()


_Response = tuple[bytes, bytes]
"""Headers and body; apart, so that clients share one text of the metrics."""


def _response(status: HTTPStatus, body: bytes, *headers: str) -> _Response:
    """Plain text, unless a header says otherwise."""
    if not any(header.startswith("Content-Type:") for header in headers):
        headers = (f"Content-Type: {PLAIN_TEXT}", *headers)
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        *headers,
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode(), body


@dataclass(frozen=True)
class _Reading:
    """One peer, as it was when the scrape began."""

    peer_id: str
    slot: Slot
    queue: QueueState
    dropped_by_kernel: int
    counters: Mapping[str, int]
    histograms: Mapping[str, Sequence[int]]


class _Family(NamedTuple):
    """A counter or a gauge, with a value for each set of labels."""

    make: type[CounterMetricFamily | GaugeMetricFamily]
    name: str
    explained: str
    labels: tuple[str, ...]
    samples: Sequence[tuple[tuple[str, ...], float]]

    def metric(self) -> Metric:
        metric = self.make(self.name, self.explained, labels=self.labels)
        for labels, value in self.samples:
            metric.add_metric(labels, value)
        return metric

    def values(self) -> Iterable[float]:
        return [value for _, value in self.samples]


class _Histogram(NamedTuple):
    """The scoreboard's buckets, and the sum of what they count where one is kept."""

    name: str
    explained: str
    labels: tuple[str, ...]
    ends: Sequence[float]
    """Of all buckets but the last, which has none."""

    samples: Sequence[tuple[tuple[str, ...], Sequence[int], float | None]]
    """Labels, buckets, sum."""

    def metric(self) -> Metric:
        metric = HistogramMetricFamily(self.name, self.explained, labels=self.labels)
        ends = [*map(str, self.ends), "+Inf"]
        for labels, counts, total in self.samples:
            # Each bucket of Prometheus holds those below it as well.
            buckets = list(zip(ends, accumulate(counts), strict=True))
            metric.add_metric(labels, buckets, total)
        return metric

    def values(self) -> Iterable[float]:
        for _, counts, total in self.samples:
            yield from accumulate(counts)
            if total is not None:
                yield sum(counts)
                yield total


class ScoreboardCollector(Collector):
    """What prometheus_client writes down. Counters are read at the time of the scrape, not kept.

    Peers, states and reasons are known from the start: the same samples come every time.
    """

    def __init__(
        self,
        peers: Mapping[int, Peer],
        board: Scoreboard,
        status: StatusReport,
        history: History,
        surroundings: Surroundings,
    ) -> None:
        """``peers`` may grow and shrink; then the samples are others."""
        self._board = board
        self._status = status
        self._surroundings = surroundings
        self._started_ns = time.monotonic_ns()
        self._peers = peers
        self._past = _Past(history, peers)

    def describe(self) -> Iterable[Metric]:
        """Nothing clashes with these names: the registry has this collector only."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Raises OSError when the kernel does not tell about a socket."""
        return (family.metric() for family in self._families())

    def values(self) -> Iterator[float]:
        """The values of what ``collect`` gives, in that order. Raises OSError as it does."""
        return (value for family in self._families() for value in family.values())

    def _families(self) -> Iterator[_Family | _Histogram]:
        readings = [
            _Reading(
                peer.peer_id,
                peer.slot,
                *peer.drops.read(),
                peer.slot.counters(),
                peer.slot.histograms(),
            )
            for peer in self._peers.values()
        ]
        yield _gauge(
            "peerd_info", "The supervisor.", ("version",), [((self._surroundings.version,), 1)]
        )
        yield _gauge(
            "peerd_registry_state",
            "1 for the state of the connection to etcd, 0 for the others.",
            ("state",),
            _one_hot((), RegistryState, self._status.registry_state()),
        )
        yield _counter(
            "peerd_log_records_dropped_total",
            "Records of the supervisor's log that nobody read.",
            (),
            [((), self._surroundings.log_dropped())],
        )
        yield from _of_slots(readings, self._started_ns)
        self._past.read()
        yield _counter(
            "peerd_restarts_total",
            "Workers that were started because another had died: by a signal, by exiting, by the "
            "kernel's OOM killer, or killed as it was stuck or late; or as it could not start (boot).",
            ("peer", "reason"),
            [
                ((each.peer_id, reason), count)
                for each in readings
                for reason, count in self._past.restarts_of(each.peer_id).items()
            ],
        )
        yield _Histogram(
            "peerd_reload_gap_seconds",
            "For how long a socket had no reader while its worker was replaced (reload, restart).",
            (),
            RELOAD_GAP_ENDS_S,
            [((), self._past.gap_counts, self._past.gaps_s)],
        )
        yield from _of_workers(readings)
        yield _batches(readings)
        yield _turns(readings)


class _Form:
    """The text of a collector, as prometheus_client writes it, with the numbers left open."""

    def __init__(self, collector: ScoreboardCollector) -> None:
        self._collector = collector
        registry = CollectorRegistry()
        registry.register(collector)
        self._before_values: list[str] = []
        comments = ""
        for line in generate_latest(registry).decode().split("\n")[:-1]:
            if line.startswith("#"):
                comments += f"{line}\n"
            else:
                self._before_values.append(comments + line.rpartition(" ")[0])
                comments = ""

    def filled_in(self) -> bytes:
        pairs = zip(self._before_values, self._collector.values(), strict=True)
        return "".join([f"{before} {value}\n" for before, value in pairs]).encode()


class _Past:
    """What the history tells, added up: it forgets, so each scrape takes in what is new.

    Should so much happen between two scrapes that it has forgotten some, restarts are still all
    counted, for another reason.
    """

    def __init__(self, history: History, peers: Mapping[int, Peer]) -> None:
        self._history = history
        self._peers = peers
        self._last = 0
        self._restarts: dict[str, dict[str, int]] = {}
        self.gap_counts = [0] * (len(RELOAD_GAP_ENDS_S) + 1)
        self.gaps_s = 0.0

    def restarts_of(self, peer_id: str) -> dict[str, int]:
        """By reason; together as many as the scoreboard has."""
        return self._restarts.setdefault(peer_id, dict.fromkeys(RESTART_REASONS, 0))

    def read(self) -> None:
        slots = {peer.peer_id: peer.slot for peer in self._peers.values()}
        events: list[dict[str, Any]] = self._history.since({"after": self._last})
        for event in events:
            self._last = event["number"]
            peer_id: str = event.get("peer_id", "")
            if event["event"] == "replaced":
                gap_s = event["gap_ms"] / 1e3
                self.gap_counts[bisect_left(RELOAD_GAP_ENDS_S, gap_s)] += 1
                self.gaps_s += gap_s
            elif peer_id not in slots:  # about the registrar, or a peer that was scaled away
                continue
            elif event["event"] == "died":
                cause = event["cause"]
                self._restarted(
                    slots[peer_id], peer_id, cause if cause in RESTART_REASONS else "other"
                )
            elif event["event"] == "cannot start":
                self._restarted(slots[peer_id], peer_id, "boot")
        for peer_id, slot in slots.items():
            while self._restarted(slot, peer_id, "other"):
                pass

    def _restarted(self, slot: Slot, peer_id: str, reason: str) -> bool:
        """Not every death is followed by a restart: the supervisor may stop, a successor be there."""
        counts = self.restarts_of(peer_id)
        if sum(counts.values()) >= slot.restarts:
            return False
        counts[reason] += 1
        return True


def _of_slots(readings: Sequence[_Reading], started_ns: int) -> Iterator[_Family]:
    """What the supervisor and the registrar know of each peer."""
    now_ns = time.monotonic_ns()
    yield _gauge(
        "peerd_peer_state",
        "1 for the peer's state, 0 for the others.",
        ("peer", "state"),
        [
            sample
            for each in readings
            for sample in _one_hot((each.peer_id,), PeerState, each.slot.state)
        ],
    )
    yield _gauge(
        "peerd_heartbeat_age_seconds",
        "Since the last turn of the worker's loop, or the supervisor's start; 0.25 at most in a loop "
        "that turns.",
        ("peer",),
        [
            ((each.peer_id,), max(0, now_ns - (each.slot.heartbeat_ns or started_ns)) / 1e9)
            for each in readings
        ],
    )
    yield _gauge(
        "peerd_registered",
        "1 while the peer's record is in etcd.",
        ("peer",),
        [((each.peer_id,), int(each.slot.registered)) for each in readings],
    )
    yield _gauge(
        "peerd_conflict",
        "1 while somebody else's live record has the peer's id.",
        ("peer",),
        [((each.peer_id,), int(bool(each.slot.holder))) for each in readings],
    )
    yield _counter(
        "peerd_worker_starts_total",
        "Workers that were started: the first, restarted ones, those of a reload.",
        ("peer",),
        [((each.peer_id,), each.slot.generation) for each in readings],
    )
    yield _counter(
        "peerd_lost_in_flight_total",
        "Datagrams that workers had read and not answered when they died.",
        ("peer",),
        [((each.peer_id,), each.slot.lost_in_flight) for each in readings],
    )
    yield _counter(
        "peerd_lost_unread_total",
        "Datagrams that were in the queue when the port was closed: scaled away with workers that die.",
        ("peer",),
        [((each.peer_id,), each.slot.lost_unread) for each in readings],
    )
    yield _counter(
        "peerd_output_dropped_total",
        "Writes of workers to their output that found no room, as the supervisor had not read it yet.",
        ("peer",),
        [((each.peer_id,), each.slot.log_dropped) for each in readings],
    )


def _of_workers(readings: Sequence[_Reading]) -> Iterator[_Family]:
    for name, (metric, explained) in COUNTERS.items():
        yield _counter(
            metric,
            explained,
            ("peer",),
            [((each.peer_id,), each.counters[name]) for each in readings],
        )
    received = [
        ((each.peer_id, reason), each.counters[name])
        for each in readings
        for name, reason in RX_DROPPED.items()
    ]
    yield _counter(
        "peerd_rx_dropped_total",
        'Datagrams that no handler saw; reason="kernel": the receive buffer was full (joined '
        "datagrams count as one).",
        ("peer", "reason"),
        [*(((each.peer_id, "kernel"), each.dropped_by_kernel) for each in readings), *received],
    )
    yield _counter(
        "peerd_tx_dropped_total",
        "Replies that were not sent.",
        ("peer", "reason"),
        [
            ((each.peer_id, reason), each.counters[name])
            for each in readings
            for name, reason in TX_DROPPED.items()
        ],
    )
    yield _gauge(
        "peerd_rx_queued_bytes",
        "What the kernel holds for the worker to read.",
        ("peer",),
        [((each.peer_id,), each.queue.queued_bytes) for each in readings],
    )


def _batches(readings: Sequence[_Reading]) -> _Histogram:
    samples = [
        ((each.peer_id,), each.histograms["batch_datagrams"], each.counters["rx_datagrams"])
        for each in readings
    ]
    # Bucket i ends with 2**(i+1) - 1, and datagrams are whole ones.
    ends = [float(2 ** (i + 1) - 1) for i in range(len(samples[0][1]) - 1)]
    return _Histogram(
        "peerd_batch_datagrams", "Datagrams that one turn has read.", ("peer",), ends, samples
    )


def _turns(readings: Sequence[_Reading]) -> _Histogram:
    samples = [((each.peer_id,), each.histograms["turn_us"], None) for each in readings]
    # Whole microseconds, cut off: what is counted as 2**(i+1) - 1 took less than 2**(i+1).
    ends = [2 ** (i + 1) / 1e6 for i in range(len(samples[0][1]) - 1)]
    return _Histogram(
        "peerd_turn_seconds",
        "How long a turn took: read, handle, reply. It has no sum, since none is kept.",
        ("peer",),
        ends,
        samples,
    )


_Samples = Sequence[tuple[tuple[str, ...], float]]


def _counter(name: str, explained: str, labels: tuple[str, ...], samples: _Samples) -> _Family:
    return _Family(CounterMetricFamily, name, explained, labels, samples)


def _gauge(name: str, explained: str, labels: tuple[str, ...], samples: _Samples) -> _Family:
    return _Family(GaugeMetricFamily, name, explained, labels, samples)


def _one_hot(labels: tuple[str, ...], states: type[IntEnum], state: IntEnum) -> _Samples:
    return [((*labels, each.name.lower()), int(each is state)) for each in states]
