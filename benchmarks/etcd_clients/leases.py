"""Trial ``leases``: 1,000 leases with a TTL of 10 s kept alive by one process, and what that costs.

peerd keeps them by itself. The other clients have no loop for this, so the benchmark refreshes their
leases one after the other, starting a round at each third of the TTL. A lease is lost when etcd no longer
has it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from bench.children import cpu_seconds
from bench.noise import QUIET, Watch
from bench.progress import Progress
from bench.runner import Trial, titled_table
from bench.verdicts import Verdict, at_most, equal, failed
from etcd_clients.client_process import Bench, Child, started, title
from etcd_clients.etcd import RecordGateway, loopback, port_of
from peerd.registry.embedded_etcd import EmbeddedEtcd

LEASES = 1_000
TTL_S = 10
MAX_CPU_PERCENT = 5.0

HEADER = (
    "client",
    "CPU of a core",
    "etcd's",
    "lost",
    "connections",
    "streams/s",
    "time per round",
    "kept by",
)

_PREFIX = "leases"
_HOLD_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 30.0
_POLL_INTERVAL_S = 1.0


@dataclass(frozen=True)
class LeasesResult:
    client: str
    seconds: float = 0.0
    cpu: float = 0.0  # Of a core: user and system time of the client's process
    etcd_cpu: float = 0.0
    lost: int = 0
    connections: int = 0  # The most at a time
    streams: int = 0  # LeaseKeepAlive calls that etcd started to serve
    rounds_s: tuple[float, ...] = ()
    others: float = 0.0  # The share of all CPUs that other processes used
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
            "one call per lease" if self.rounds_s else "itself",
        )


def trial(bench: Bench) -> Trial:
    def measure(progress: Progress) -> list[LeasesResult]:
        results = []
        for name in bench.clients:
            # A new etcd per client, so that no leases of another are in its figures.
            with (
                progress.step("leases", title(name)),
                EmbeddedEtcd() as etcd,
                started(bench, name, [loopback(etcd.endpoint)]) as child,
            ):
                results.append(_measure(etcd, child, bench.seconds))
        return results

    def table(results: Sequence[LeasesResult]) -> str:
        heading = f"leases: {LEASES:,} leases with a TTL of {TTL_S} s kept for {bench.seconds:g} s"
        text = titled_table(f"{heading} by one process", [HEADER, *(r.row() for r in results)])
        if any(result.disturbed for result in results):
            text += "\n! others used more than a tenth of the CPUs meanwhile"
        return text

    return Trial(len(bench.clients), measure, table, _judge)


def _judge(results: Sequence[LeasesResult]) -> Iterator[Verdict]:
    for result in results:
        if result.client == "peerd" and result.error:
            yield from failed("leases", result.error)
        elif result.client == "peerd":
            yield from equal("leases: lost", result.lost, 0)
            yield from equal("leases: connections", result.connections, 1)
            yield from at_most("leases: CPU of a core", result.cpu * 100, MAX_CPU_PERCENT, " %")


def _measure(etcd: EmbeddedEtcd, child: Child, seconds: float) -> LeasesResult:
    gateway = RecordGateway.of(etcd.endpoint)
    answer = child.ask("hold", _HOLD_TIMEOUT_S, prefix=_PREFIX, count=LEASES, ttl_s=TTL_S)
    if "error" in answer:
        return LeasesResult(child.name, error=answer["error"])
    held = gateway.lease_ids()
    streams = gateway.calls("LeaseKeepAlive")
    noise, began_s = Watch(), time.monotonic()
    cpus_s = child.cpu_s(), cpu_seconds([etcd.pid])
    child.send("keep", seconds=seconds, every_s=TTL_S / 3)
    connections = _most_connections(child, port_of(etcd.endpoint), began_s + seconds)
    answer = child.answer(_ANSWER_TIMEOUT_S)
    elapsed_s = time.monotonic() - began_s
    ours_s, etcds_s = child.cpu_s() - cpus_s[0], cpu_seconds([etcd.pid]) - cpus_s[1]
    if "error" in answer:
        return LeasesResult(child.name, error=answer["error"])
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


def _most_connections(child: Child, port: int, end_s: float) -> int:
    most = 0
    while (left_s := end_s - time.monotonic()) > 0:
        most = max(most, child.connections([port]))
        time.sleep(min(_POLL_INTERVAL_S, left_s))
    return most
