"""Trial ``failover``: a member of three goes, and the client that was connected to it reads on.

Killed, its connections end at once; stopped (SIGSTOP), they stay and nothing answers, as when a
machine hangs or is cut off. Where it was the leader, nobody can read before the others have elected
another, which takes them one to two seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from registry_clients import CLIENTS, TIMEOUT_S
from registry_etcd import Cluster, Member, cluster
from registry_trials import Bench, Child, started, title

TITLE = "failover: seconds until a read succeeds after the connected member of three has gone"
CASES = ("follower killed", "follower stopped", "leader killed", "leader stopped")
HEADER = ("client", *CASES, "errors until then")

_PREFIX = "failover"
_LIMIT_S = 20.0
_READS_TO_TELL = 5


@dataclass(frozen=True)
class FailoverResult:
    client: str
    case: str
    seconds: float | None
    errors: dict[str, int] = field(default_factory=dict)
    """What the reads raised until one succeeded."""

    error: str = ""


def steps(clients: Sequence[str]) -> int:
    return len(CASES) * len(_able(clients))


def run(bench: Bench, clients: Sequence[str]) -> list[FailoverResult]:
    if not _able(clients):
        return []
    with cluster() as members:
        members.members[0].gateway.put(_PREFIX, range(_READS_TO_TELL))
        return list(_results(bench, _able(clients), members))


def _able(clients: Sequence[str]) -> list[str]:
    return [name for name in clients if CLIENTS[name].several_endpoints]


def _results(bench: Bench, clients: Sequence[str], members: Cluster) -> Iterator[FailoverResult]:
    for case in CASES:
        for name in clients:
            bench.progress.begin("failover", f"{title(name)}, {case}")
            with started(bench, name, members.endpoints) as child:
                yield _measure(child, members, case)
            bench.progress.end()


def _measure(child: Child, members: Cluster, case: str) -> FailoverResult:
    role, fate = case.split()
    before = child.ask("listing", prefix=_PREFIX)
    if "error" in before:
        return FailoverResult(child.name, case, None, error=before["error"])
    member = _connected(child, members)
    members.make_leader(member if role == "leader" else members.other_than(member))
    child.ask("listing", prefix=_PREFIX)  # elections are over, and its connection is well
    try:
        if fate == "killed":
            member.kill()
        else:
            member.stop()
        gone_s = time.monotonic()
        answer = child.ask(
            "read_until_answered", _LIMIT_S + TIMEOUT_S, prefix=_PREFIX, for_s=_LIMIT_S
        )
    finally:
        if fate == "killed":
            members.start(member)
        else:
            member.go_on()
    members.wait_until_healthy()
    if "error" in answer:
        return FailoverResult(
            child.name, case, None, answer.get("errors", {}), error=answer["error"]
        )
    return FailoverResult(child.name, case, answer["at_s"] - gone_s, answer["errors"])


def _connected(child: Child, members: Cluster) -> Member:
    """The member that serves its reads, by that member's own count."""
    before = [member.gateway.calls("Range") for member in members.members]
    for _ in range(_READS_TO_TELL):
        child.ask("listing", prefix=_PREFIX)
    served = [
        member.gateway.calls("Range") - count
        for member, count in zip(members.members, before, strict=True)
    ]
    return members.members[served.index(max(served))]


def rows(results: Sequence[FailoverResult], clients: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for name in clients:
        if not CLIENTS[name].several_endpoints:
            yield (title(name), *["n/a (one endpoint)"] * len(CASES), "-")
            continue
        of_client = {result.case: result for result in results if result.client == name}
        errors = {error for result in of_client.values() for error in result.errors}
        yield (
            title(name),
            *(_cell(of_client[case]) for case in CASES),
            ", ".join(sorted(errors)) or "none",
        )


def _cell(result: FailoverResult) -> str:
    return result.error if result.seconds is None else f"{result.seconds:.2f}"
