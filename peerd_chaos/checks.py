"""The guarantees of a supervisor once the disturbances are over, and once it has stopped.

Each check returns invariants with the numbers behind the verdict.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from peerd.errors import RegistryError
from peerd.free_ports import is_free
from peerd.registry import Registry
from peerd_chaos.accounts import LoadReport
from peerd_chaos.chaos_apps import DIE_CODE
from peerd_chaos.subject import Subject, wait_for

Events = Iterable[Mapping[str, Any]]

SETTLE_TIMEOUT_S = 5.0

REPORTED = {
    "lost_in_flight": "lost in flight",
    "rx_dropped": "dropped",
    "lost_unread": "unread",
}
"""The fields of a peer's status that count losses, and their names in messages."""

DEFECTS = re.compile("Traceback|Fatal Python error|Exception ignored|Logging error")
"""Lines that Python prints for an unexpected error."""

KILLED_BY_SUPERVISOR = ("stuck", "late")
"""No action here holds a worker up long enough for these verdicts."""

MIN_SENT_SHARE = 0.5  # Of the datagrams that were due. A run that sends few datagrams proves little
ERRORS = ("decode_errors", "handler_errors", "tx_dropped")


@dataclass(frozen=True)
class Invariant:
    name: str
    holds: bool
    counted: str  # The numbers behind the verdict


def load(
    report: LoadReport, peers: Sequence[Mapping[str, Any]], *, ordered: bool, due: float
) -> list[Invariant]:
    """Compare what the clients received with what the peers report.

    ``ordered``: whether the peers guarantee the order. ``due``: datagrams that should have been sent.
    """
    wrong = [
        f"slot {peer['slot']}: {missing} missing, {_reported([peer])}"
        for peer in peers
        if (missing := report.of(peer["port"]).missing) != _lost(peer)
    ]
    lost, late = sum(_lost(peer) for peer in peers), report.out_of_order
    errors = {name: sum(peer[name] for peer in peers) for name in ERRORS}
    return [
        Invariant(
            "there was a load",
            report.sent >= MIN_SENT_SHARE * due > 0,
            f"{report.sent} sent of {due:.0f}",
        ),
        Invariant(
            "every datagram is answered or lost",
            report.finished and not report.dropped and not report.foreign,
            f"{report.sent} sent, {report.sent - report.missing} answered, {report.missing} lost; "
            f"{report.dropped} dropped by the clients, {report.foreign} not asked for",
        ),
        Invariant(
            "the reported loss is the real loss",
            not wrong and report.missing == lost,
            "; ".join([f"{report.missing} missing; reported: {_reported(peers)}", *wrong]),
        ),
        Invariant("nothing is doubled", not report.doubled, str(report.doubled)),
        *([Invariant("nothing is out of order", not late, str(late))] if ordered else []),
        Invariant(
            "no datagram is an error",
            not any(errors.values()),
            ", ".join(f"{name} {count}" for name, count in errors.items()),
        ),
    ]


def deaths(
    died: Events,
    peers: Iterable[Mapping[str, Any]],
    *,
    killed: Collection[int],
    may_have_exited: Collection[int | None],
    asked_to_die: int,
) -> list[Invariant]:
    """Compare the death certificates, ``died``, with the actions.

    ``killed``: pids of the workers that were sent SIGKILL; no other worker may die, not even one that was
    stopped for a while. ``may_have_exited``: pids that may have exited in order instead.
    """
    asked, unexplained, certified, lost = 0, list[str](), set[int](), 0
    for event in died:
        certified.add(event["pid"])
        lost += event["lost_in_flight"]
        if event["how"] == f"exit code {DIE_CODE}":
            asked += 1
        elif event["pid"] in may_have_exited and event["how"] == "exit code 0":
            pass
        elif event["pid"] not in killed or event["cause"] in KILLED_BY_SUPERVISOR:
            unexplained.append(f"pid {event['pid']} ({event['how']}, cause {event['cause']})")
    uncertified = sorted({*killed} - certified - {*may_have_exited})
    lost_of_peers = sum(peer["lost_in_flight"] for peer in peers)
    return [
        Invariant(
            "only killed workers have died",
            not unexplained and asked <= asked_to_die,
            f"{len(certified)} deaths, {asked} of {asked_to_die} requested; "
            f"unexplained: {', '.join(unexplained) or 'none'}",
        ),
        Invariant(
            "each kill has a certificate",
            not uncertified,
            f"{len(killed)} kills; without one: {', '.join(map(str, uncertified)) or 'none'}",
        ),
        Invariant(
            "the certificates account for the whole loss",
            lost == lost_of_peers,
            f"{lost} of {lost_of_peers} lost in flight",
        ),
    ]


def records(subject: Subject, within_s: float) -> Invariant:
    """Within the lease TTL, etcd has records of the ready peers only."""

    def look() -> tuple[list[str], list[str]]:
        stored = list[str]()
        with contextlib.suppress(RegistryError):
            stored = [f"{node.peer_id} {node.port}" for node in registry.nodes()]
        ready = (peer for peer in subject.peers() if peer["state"] == "ready")
        return stored, [f"{peer['peer_id']} {peer['port']}" for peer in ready]

    with Registry(subject.etcd, subject.prefix) as registry:
        return _becomes("the records are those of the ready peers", "records", look, within_s)


def processes(subject: Subject) -> Invariant:
    """The supervisor's descendants are one worker per peer and the registrar."""

    def look() -> tuple[list[str], list[str]]:
        children = subject.children()
        zombies = list[str]()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() == psutil.STATUS_ZOMBIE:
                    zombies.append(f"zombie {child.pid}")
        found = [*subject.processes(), *(child.pid for child in children)]
        expected = [subject.registrar(), *(peer["pid"] for peer in subject.peers())]
        # Each has to be a child, and a process of this run, as the supervisor is.
        return [*map(str, found), *zombies], [*map(str, [subject.pid, *expected, *expected])]

    return _becomes("no orphan, no zombie", "processes", look, SETTLE_TIMEOUT_S)


def descriptors(subject: Subject, before: Sequence[str]) -> Invariant:
    """With as many peers as ``before`` was taken with."""
    name = "the supervisor's descriptors are as before"
    return _becomes(name, "descriptors", lambda: (subject.descriptors(), before), SETTLE_TIMEOUT_S)


def nothing_left(subject: Subject, ports: Iterable[int]) -> Invariant:
    """Once the supervisor has exited."""

    def look() -> tuple[list[str], list[str]]:
        left = [f"process {pid}" for pid in subject.processes()]
        left += [f"port {port}" for port in ports if not is_free(port)]
        left += [f"file {path}" for path in subject.temporary.iterdir()]
        left += [f"file {path}" for path in (subject.control,) if path.exists()]
        return left + [f"record {node.peer_id}" for node in registry.nodes()], []

    with Registry(subject.etcd, subject.prefix) as registry:
        what = "processes, ports, files, records"
        return _becomes("nothing is left", what, look, SETTLE_TIMEOUT_S)


def log(subject: Subject) -> Invariant:
    found = Counter[str]()
    for name in ("err", "out"):
        found.update(DEFECTS.findall((subject.folder / name).read_text(errors="replace")))
    counted = ", ".join(f"{count} {what!r}" for what, count in found.items())
    return Invariant("no traceback in the log", not found, counted or "0")


def _becomes(
    name: str, what: str, look: Callable[[], tuple[Iterable[str], Iterable[str]]], within_s: float
) -> Invariant:
    """What ``look`` finds (the first) becomes what it expects (the second) within the time."""
    found, expected = Counter[str](), Counter[str]()

    def same() -> bool:
        nonlocal found, expected
        found, expected = map(Counter, look())
        return found == expected

    holds = wait_for(same, within_s)
    counted = f"{found.total()} {what}, {expected.total()} expected"
    if not holds:
        more, fewer = (", ".join(each.elements()) for each in (found - expected, expected - found))
        counted += f"; unexpected: {more or 'none'}; missing: {fewer or 'none'}"
    return Invariant(name, holds, counted)


def _lost(peer: Mapping[str, Any]) -> int:
    return sum(peer[name] for name in REPORTED)


def _reported(peers: Iterable[Mapping[str, Any]]) -> str:
    counts = {words: sum(peer[name] for peer in peers) for name, words in REPORTED.items()}
    return ", ".join(f"{count} {words}" for words, count in counts.items())
