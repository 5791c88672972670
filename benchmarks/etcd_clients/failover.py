"""Trial ``failover``: the member that a client is connected to fails, one of three, and the client reads on.

A killed member's connections end immediately. Those of a stopped one (SIGSTOP) stay open without an
answer, as when a machine hangs or is cut off. If it was the leader, no client can read until the other
members have elected a new one, which takes one to two seconds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.progress import Progress
from bench.runner import Trial, titled_table
from bench.verdicts import Verdict, at_most, failed
from etcd_clients.client_process import Bench, Child, started, title
from etcd_clients.clients import CLIENTS, TIMEOUT_S
from etcd_clients.etcd import RecordGateway, etcd_binary
from harness.etcd_cluster import EtcdCluster
from harness.etcd_process import EtcdProcess

TITLE = "failover: seconds until a read succeeds after the connected member of three has failed"
CASES = ("follower killed", "follower stopped", "leader killed", "leader stopped")
HEADER = ("client", *CASES, "errors until then")

MAX_FAILOVER_S = 3.0
ELECTION_S = 2.0  # The time of an election, in which no client can read
_PREFIX = "failover"
_TIMEOUT_S = 20.0
_SAMPLE_READS = 5  # Enough to see which member serves a client


@dataclass(frozen=True)
class FailoverResult:
    client: str
    case: str
    seconds: float | None
    errors: dict[str, int] = field(default_factory=dict)
    """The errors of the reads until one succeeded."""

    error: str = ""


def trial(bench: Bench) -> Trial:
    able = [name for name in bench.clients if CLIENTS[name].several_endpoints]

    def measure(progress: Progress) -> list[FailoverResult]:
        if not able:
            return []
        folder = bench.folder / "cluster"
        folder.mkdir()
        with EtcdCluster(etcd_binary(), folder) as members:
            RecordGateway(members.members[0].client).put_records(_PREFIX, range(_SAMPLE_READS))
            results = []
            for case, name in itertools.product(CASES, able):
                with (
                    progress.step("failover", f"{title(name)}, {case}"),
                    started(bench, name, members.endpoints.split(",")) as child,
                ):
                    results.append(_measure(child, members, case))
            return results

    def table(results: Sequence[FailoverResult]) -> str:
        return titled_table(TITLE, [HEADER, *_rows(results, bench.clients)])

    return Trial(len(CASES) * len(able), measure, table, _judge)


def _judge(results: Sequence[FailoverResult]) -> Iterator[Verdict]:
    for result in results:
        if result.client == "peerd":
            claim = f"failover, {result.case}"
            if result.seconds is None:
                yield from failed(claim, result.error)
            bound_s = MAX_FAILOVER_S + (ELECTION_S if result.case.startswith("leader") else 0.0)
            yield from at_most(claim, result.seconds, bound_s, " s")


def _measure(child: Child, members: EtcdCluster, case: str) -> FailoverResult:
    role, fate = case.split()
    before = child.ask("listing", prefix=_PREFIX)
    if "error" in before:
        return FailoverResult(child.name, case, None, error=before["error"])
    member = _connected(child, members)
    members.move_leader(member if role == "leader" else members.others(member)[0])
    child.ask("listing", prefix=_PREFIX)  # after the election, so that its connection works
    try:
        if fate == "killed":
            member.kill()
        else:
            member.stop()
        failed_s = time.monotonic()
        answer = child.ask(
            "read_until_answered", _TIMEOUT_S + TIMEOUT_S, prefix=_PREFIX, for_s=_TIMEOUT_S
        )
    finally:
        if fate == "killed":
            member.start()
        else:
            member.cont()
            member.wait_ready()
    members.leader()
    error = answer.get("error", "")
    seconds = None if error else answer["at_s"] - failed_s
    return FailoverResult(child.name, case, seconds, answer.get("errors", {}), error)


def _connected(child: Child, members: EtcdCluster) -> EtcdProcess:
    """The member that serves the client's reads, by that member's own count."""
    gateways = [RecordGateway(member.client) for member in members.members]
    before = [gateway.calls("Range") for gateway in gateways]
    for _ in range(_SAMPLE_READS):
        child.ask("listing", prefix=_PREFIX)
    after = [gateway.calls("Range") for gateway in gateways]
    served = [now - then for now, then in zip(after, before, strict=True)]
    return members.members[served.index(max(served))]


def _rows(results: Sequence[FailoverResult], clients: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for name in clients:
        if not CLIENTS[name].several_endpoints:
            yield (title(name), *["n/a (one endpoint)"] * len(CASES), "-")
            continue
        of_client = {result.case: result for result in results if result.client == name}
        errors = {error for result in of_client.values() for error in result.errors}
        cells = (_cell(of_client[case]) for case in CASES)
        yield (title(name), *cells, ", ".join(sorted(errors)) or "none")


def _cell(result: FailoverResult) -> str:
    return result.error if result.seconds is None else f"{result.seconds:.2f}"
