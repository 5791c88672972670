"""What must hold of a supervisor when nobody disturbs it any more, and when it has stopped.

Each check returns one invariant with the numbers that it has looked at, whether it holds or not.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peerd.chaos.app import DIE_CODE
from peerd.chaos.load import LoadReport
from peerd.chaos.subject import Subject, is_free, wait_for
from peerd.errors import RegistryError

SETTLED_WITHIN_S = 5.0

REPORTED = {
    "lost_in_flight": "lost in flight",
    "rx_dropped": "dropped",
    "lost_unread": "unread",
}
"""Where the status of a peer says what it has lost, and in words."""

ERRORS = ("decode_errors", "handler_errors", "tx_dropped")


@dataclass(frozen=True)
class Invariant:
    name: str
    holds: bool
    counted: str
    """The numbers that it is about; of a broken one, those that show it."""


def load(report: LoadReport, peers: Sequence[Mapping[str, Any]], ordered: bool) -> list[Invariant]:
    """What the clients have and what the peers say of it. ``ordered``: whether they promise the order."""
    by_peer = {peer["slot"]: (report.of(peer["port"]).missing, _lost(peer)) for peer in peers}
    wrong = [
        f"slot {peer['slot']}: {by_peer[peer['slot']][0]} missing, {_reported([peer])}"
        for peer in peers
        if by_peer[peer["slot"]][0] != by_peer[peer["slot"]][1]
    ]
    lost = sum(_lost(peer) for peer in peers)
    errors = {name: sum(peer[name] for peer in peers) for name in ERRORS}
    return [
        Invariant(
            "all is answered or lost",
            report.finished and not report.dropped and not report.foreign,
            f"{report.sent} sent, {report.sent - report.missing} answered, {report.missing} lost; "
            f"by the clients themselves {report.dropped}, strangers' {report.foreign}",
        ),
        Invariant(
            "the loss is what is reported",
            not wrong and report.missing == lost,
            "; ".join([f"{report.missing} missing; reported: {_reported(peers)}", *wrong]),
        ),
        Invariant("nothing is doubled", not report.doubled, str(report.doubled)),
        *([_in_order(report)] if ordered else []),
        Invariant(
            "no datagram is an error",
            not any(errors.values()),
            ", ".join(f"{name} {count}" for name, count in errors.items()),
        ),
    ]


def deaths(
    events: Iterable[Mapping[str, Any]], harmed: Collection[int], asked_to_die: int
) -> Invariant:
    """``harmed``: the pids of those that were killed or stopped. Nobody else is to die."""
    by_themselves, strange, count = 0, [], 0
    for event in events:
        count += 1
        if event["how"] == f"exit code {DIE_CODE}":
            by_themselves += 1
        elif event["pid"] not in harmed:
            strange.append(f"pid {event['pid']} ({event['how']})")
    return Invariant(
        "only who was harmed has died",
        not strange and by_themselves <= asked_to_die,
        f"{count} deaths, {by_themselves} of them by themselves of {asked_to_die} asked to; "
        f"of no cause: {', '.join(strange) or 'none'}",
    )


def records(subject: Subject, within_s: float) -> Invariant:
    """Within a lease's time, etcd has the ready peers and nobody else."""
    stored, ready = set[str](), set[str]()
    from peerd.registry import Registry

    def same() -> bool:
        with contextlib.suppress(RegistryError):
            stored.clear()
            stored.update(f"{node.peer_id} {node.port}" for node in registry.nodes())
        ready.clear()
        ready.update(
            f"{peer['peer_id']} {peer['port']}"
            for peer in subject.peers()
            if peer["state"] == "ready"
        )
        return stored == ready

    with Registry(subject.etcd, subject.prefix) as registry:
        holds = wait_for(same, within_s)
    differ = f"; not both: {', '.join(sorted(stored ^ ready))}" if stored != ready else ""
    return Invariant(
        "records and ready peers are the same",
        holds,
        f"{len(stored)} records, {len(ready)} ready{differ}",
    )


def processes(subject: Subject) -> Invariant:
    """The supervisor, a worker for each peer and the registrar; nothing else descends from it."""
    more, fewer, zombies = set[int | None](), set[int | None](), list[int]()
    workers = 0

    def exact() -> bool:
        nonlocal more, fewer, zombies, workers
        children = subject.children()
        peers = {peer["pid"] for peer in subject.peers()}
        expected = {subject.pid, subject.registrar(), *peers}
        found = set[int | None](subject.processes())
        workers, more, fewer = len(peers), found - expected, expected - found
        zombies = [child.pid for child in children if child.status() == "zombie"]
        return not more and not fewer and not zombies and len(children) == workers + 1

    holds = wait_for(exact, SETTLED_WITHIN_S)
    counted = f"{workers} workers and a registrar"
    if not holds:
        counted += f"; zombies {zombies}, others {sorted(map(str, more))}, missing {fewer}"
    return Invariant("no orphan, no zombie", holds, counted)


def descriptors(subject: Subject, before: Sequence[str]) -> Invariant:
    """With as many peers as before."""
    now: list[str] = []

    def same() -> bool:
        now[:] = subject.descriptors()
        return now == before

    holds = wait_for(same, SETTLED_WITHIN_S)
    more, fewer = Counter(now) - Counter(before), Counter(before) - Counter(now)
    differ = "" if holds else f"; more {dict(more)}, fewer {dict(fewer)}"
    return Invariant(
        "the supervisor's descriptors are as before",
        holds,
        f"{len(before)} before, {len(now)} after{differ}",
    )


def nothing_left(subject: Subject, ports: Iterable[int]) -> Invariant:
    """After its end."""
    left: list[str] = []

    def gone() -> bool:
        left[:] = [f"process {pid}" for pid in subject.processes()]
        left.extend(f"port {port}" for port in ports if not is_free(port))
        left.extend(f"file {path}" for path in subject.temporary.iterdir())
        left.extend(f"file {path}" for path in (subject.control,) if path.exists())
        left.extend(f"record {node.peer_id}" for node in registry.nodes())
        return not left

    from peerd.registry import Registry

    with Registry(subject.etcd, subject.prefix) as registry:
        holds = wait_for(gone, SETTLED_WITHIN_S)
    return Invariant("nothing is left", holds, ", ".join(left) or "no process, port, file, record")


def log(subject: Subject) -> Invariant:
    count = (subject.folder / "err").read_text(errors="replace").count("Traceback")
    return Invariant("no traceback in the log", not count, str(count))


def _in_order(report: LoadReport) -> Invariant:
    return Invariant("nothing is out of order", not report.out_of_order, str(report.out_of_order))


def _lost(peer: Mapping[str, Any]) -> int:
    return sum(peer[name] for name in REPORTED)


def _reported(peers: Iterable[Mapping[str, Any]]) -> str:
    counts = {words: sum(peer[name] for peer in peers) for name, words in REPORTED.items()}
    return ", ".join(f"{count} {words}" for words, count in counts.items())
