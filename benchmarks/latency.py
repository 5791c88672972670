"""One measurement of round trips: an echo server in a process of its own and one client (ping.c).

The client has one request under way at a time (a closed loop), then sends at fixed rates whether or
not it is answered (an open loop). It looks at its socket all the time, so what is measured is the
server's waking up and the server's time, not the client's.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from children import ANSWER_LIMIT_S, answer, running
from datagrams import datagram
from measurement import PEERS, Bench, Subject
from noise import QUIET, Watch
from receivers import serving
from sockets import bound_sockets, dropped, port_of

CLOSED = 0
"""Instead of a rate: the closed loop."""

RATES = (CLOSED, 1_000, 10_000, 50_000)
RATES_OF_MANY = (CLOSED, 10_000, 50_000, 100_000)
"""Requests a second to all peers together, where there are several."""

CLOSED_SHARE = 2
"""The closed loop, whose p99 is compared, takes so many times the time of an open one."""

WAIT_S = 0.2
"""For how long an answer is waited for."""


@dataclass(frozen=True)
class Latency:
    regime: str
    receiver: str
    round: int
    per_second: int
    """Requests, or CLOSED."""

    sent: int
    answered: int
    client_drops: int
    """Answers that the client's own socket had no room for."""

    server_drops: int
    p50_ns: int
    p99_ns: int
    p999_ns: int
    max_ns: int
    receiver_cpu_s: float
    others: float
    """The share of all CPUs that somebody else used meanwhile."""

    @property
    def lost(self) -> int:
        return self.sent - self.answered

    @property
    def cpu_ns(self) -> float:
        return self.receiver_cpu_s / max(self.answered, 1) * 1e9

    @property
    def disturbed(self) -> bool:
        return self.others > QUIET


def measure_latency(bench: Bench, subject: Subject) -> list[Latency]:
    """One server, one load after the other."""
    return _measure(bench, subject, 1, RATES)


def measure_latency_of_many(bench: Bench, subject: Subject) -> list[Latency]:
    """PEERS sockets, requests to each in turn."""
    return _measure(bench, subject, PEERS, RATES_OF_MANY)


def _measure(bench: Bench, subject: Subject, sockets: int, rates: Sequence[int]) -> list[Latency]:
    with (
        bound_sockets(sockets) as socks,
        serving(subject.receiver, "echo", socks, bench.programs, bench.cpus.receiver) as server,
    ):
        # What is done once, at the first message, is not of interest here.
        _ping(bench, socks, CLOSED, 0.02)
        results = []
        for per_second in rates:
            drops_before = sum(map(dropped, socks))
            watch = Watch()
            cpu_before_s = server.cpu_s()
            seconds = bench.seconds * (CLOSED_SHARE if per_second == CLOSED else 1)
            said = _ping(bench, socks, per_second, seconds)
            receiver_cpu_s = server.cpu_s() - cpu_before_s
            results.append(
                Latency(
                    regime=subject.regime,
                    receiver=subject.name,
                    round=subject.round,
                    per_second=per_second,
                    sent=int(said["sent"]),
                    answered=int(said["answered"]),
                    client_drops=int(said["kernel_drops"]),
                    server_drops=sum(map(dropped, socks)) - drops_before,
                    p50_ns=int(said["p50_ns"]),
                    p99_ns=int(said["p99_ns"]),
                    p999_ns=int(said["p999_ns"]),
                    max_ns=int(said["max_ns"]),
                    receiver_cpu_s=receiver_cpu_s,
                    others=watch.others(receiver_cpu_s + said["cpu_s"]),
                )
            )
        server.stop()
    return results


def _ping(
    bench: Bench, socks: Sequence[socket.socket], per_second: int, seconds: float
) -> dict[str, float]:
    command = [bench.programs.path("ping"), "-s", str(seconds), "-w", str(WAIT_S)]
    if per_second != CLOSED:
        command += ["-r", str(per_second)]
    command += [datagram().hex(), *(str(port_of(sock)) for sock in socks)]
    with running(command) as child:
        said = answer("the client", child, ANSWER_LIMIT_S + seconds)
    result: dict[str, float] = orjson.loads(said)
    return result
