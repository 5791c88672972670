"""Trial ``leases``: 1,000 leases with a TTL of 10 s kept alive by one process, and what that costs.

peerd keeps them by itself. The others have no loop for it: there the benchmark refreshes lease after
lease, beginning a round at each third of the TTL, as long as their method for one lease takes.
What was lost is what etcd no longer has.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from children import cpu_seconds
from noise import QUIET, Watch
from peerd.registry.embedded_etcd import EmbeddedEtcd
from registry_etcd import Gateway, loopback, port_of
from registry_trials import Bench, Child, started, title

LEASES = 1_000
TTL_S = 10
HEADER = (
    "client",
    "CPU of a core",
    "etcd's",
    "lost",
    "connections",
    "streams/s",
    "a round takes",
    "kept by",
)

_PREFIX = "leases"
_HOLD_LIMIT_S = 60.0
_ANSWER_LIMIT_S = 30.0
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class LeasesResult:
    client: str
    seconds: float
    cpu: float
    """Of a core: user and system time of the client's process."""

    etcd_cpu: float
    lost: int
    connections: int
    """The most that were seen."""

    streams: int
    """LeaseKeepAlive calls that etcd began to serve."""

    rounds_s: tuple[float, ...]
    others: float
    """The share of all CPUs that somebody else had."""

    error: str = ""

    @property
    def disturbed(self) -> bool:
        return self.others > QUIET

    def row(self) -> tuple[str, ...]:
        if self.error:
            return (title(self.client), self.error, *["-"] * (len(HEADER) - 2))
        return (
            title(self.client) + (" !" if self.disturbed else ""),
            f"{self.cpu:.1%}",
            f"{self.etcd_cpu:.1%}",
            f"{self.lost:,}",
            str(self.connections),
            f"{self.streams / self.seconds:,.1f}",
            f"{median(self.rounds_s):.2f} s" if self.rounds_s else "-",
            "one call a lease" if self.rounds_s else "itself",
        )


def heading(seconds: float) -> str:
    return (
        f"leases: {LEASES:,} leases with a TTL of {TTL_S} s kept for {seconds:g} s by one process"
    )


def steps(clients: Sequence[str]) -> int:
    return len(clients)


def run(bench: Bench, clients: Sequence[str]) -> list[LeasesResult]:
    results = []
    for name in clients:
        bench.progress.begin("leases", title(name))
        # An etcd of its own: nobody's leases are in another's figures.
        with EmbeddedEtcd() as etcd, started(bench, name, [loopback(etcd.endpoint)]) as child:
            results.append(_measure(etcd, child, bench.seconds))
        bench.progress.end()
    return results


def _measure(etcd: EmbeddedEtcd, child: Child, seconds: float) -> LeasesResult:
    gateway = Gateway(port_of(etcd.endpoint))
    answer = child.ask("hold", _HOLD_LIMIT_S, prefix=_PREFIX, count=LEASES, ttl_s=TTL_S)
    if "error" in answer:
        return _failed(child.name, answer["error"])
    held = gateway.lease_ids()
    streams = gateway.calls("LeaseKeepAlive")
    noise, began_s = Watch(), time.monotonic()
    cpus_s = child.cpu_s(), cpu_seconds([etcd.pid])
    child.tell("keep", seconds=seconds, every_s=TTL_S / 3)
    connections = _most_connections(child, port_of(etcd.endpoint), began_s + seconds)
    answer = child.answer(_ANSWER_LIMIT_S)
    elapsed_s = time.monotonic() - began_s
    ours_s, etcds_s = child.cpu_s() - cpus_s[0], cpu_seconds([etcd.pid]) - cpus_s[1]
    if "error" in answer:
        return _failed(child.name, answer["error"])
    return LeasesResult(
        client=child.name,
        seconds=elapsed_s,
        cpu=ours_s / elapsed_s,
        etcd_cpu=etcds_s / elapsed_s,
        lost=max(len(held - gateway.lease_ids()), answer["gone"]),
        connections=connections,
        streams=gateway.calls("LeaseKeepAlive") - streams,
        rounds_s=tuple(answer["rounds_s"]),
        others=noise.others(ours_s + etcds_s),
    )


def _failed(client: str, error: str) -> LeasesResult:
    return LeasesResult(client, 0.0, 0.0, 0.0, 0, 0, 0, (), 0.0, error)


def _most_connections(child: Child, port: int, end_s: float) -> int:
    most = 0
    while (left_s := end_s - time.monotonic()) > 0:
        most = max(most, child.connections([port]))
        time.sleep(min(_LOOK_EVERY_S, left_s))
    return most
