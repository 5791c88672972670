"""One measurement of round trips: an echo server in a separate process, and one client (ping.c).

The client first has one request under way at a time (a closed loop), then sends at fixed rates whether
or not it gets answers (an open loop). It polls its socket without sleeping, so the figures contain the
wake-up and the work of the server, not the client's.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from bench.children import ANSWER_TIMEOUT_S, answer, running
from bench.noise import Watch
from regimes.rates import Measured, RunSettings, Subject
from regimes.receivers import serving
from udp.envelope import datagram
from udp.udp_sockets import bound_sockets, dropped, port_of

CLOSED = 0  # The closed loop, in place of a rate
RATES = (CLOSED, 1_000, 10_000, 50_000)
RATES_OF_MANY = (CLOSED, 10_000, 50_000, 100_000)  # Requests per second to all peers
CLOSED_SHARE = 2
"""The closed loop, whose p99 is compared, lasts this many times as long as an open one."""

WAIT_TIMEOUT_S = 0.2  # How long the client waits for an answer


@dataclass(frozen=True, kw_only=True)
class Latency(Measured):
    per_second: int  # Requests per second, or CLOSED
    answered: int
    client_drops: int  # Answers that the client's own socket had no room for
    server_drops: int
    p50_ns: int
    p99_ns: int
    p999_ns: int
    max_ns: int

    @property
    def lost(self) -> int:
        return self.sent - self.answered

    @property
    def cpu_ns(self) -> float:
        return self.receiver_cpu_s / max(self.answered, 1) * 1e9


def measure_latency(
    sockets: int, rates: Sequence[int], run: RunSettings, subject: Subject
) -> list[Latency]:
    """One server, requests to each of its sockets in turn, and one load after the other."""
    with (
        bound_sockets(sockets) as socks,
        serving(subject.receiver, "echo", socks, run.programs, run.cpus.receiver) as server,
    ):
        # Leave out the work that a server does once, for its first message.
        _ping(run, socks, CLOSED, 0.02)
        results = []
        for per_second in rates:
            drops_before = sum(map(dropped, socks))
            watch = Watch()
            cpu_before_s = server.cpu_s()
            seconds = run.seconds * (CLOSED_SHARE if per_second == CLOSED else 1)
            said = _ping(run, socks, per_second, seconds)
            names = ("sent", "answered", "p50_ns", "p99_ns", "p999_ns", "max_ns")
            figures = {name: int(said[name]) for name in names}
            receiver_cpu_s = server.cpu_s() - cpu_before_s
            results.append(
                Latency(
                    regime=subject.regime,
                    receiver=subject.name,
                    round=subject.round,
                    per_second=per_second,
                    client_drops=int(said["kernel_drops"]),
                    server_drops=sum(map(dropped, socks)) - drops_before,
                    **figures,
                    receiver_cpu_s=receiver_cpu_s,
                    others=watch.others(receiver_cpu_s + said["cpu_s"]),
                )
            )
        server.stop()
    return results


def _ping(
    run: RunSettings, socks: Sequence[socket.socket], per_second: int, seconds: float
) -> dict[str, float]:
    command = [run.programs.path("ping"), "-s", str(seconds), "-w", str(WAIT_TIMEOUT_S)]
    if per_second != CLOSED:
        command += ["-r", str(per_second)]
    command += [datagram().hex(), *(str(port_of(sock)) for sock in socks)]
    with running(command) as child:
        said = answer("the client", child, ANSWER_TIMEOUT_S + seconds)
    result: dict[str, float] = orjson.loads(said)
    return result
