"""Trial ``watch``: how many of 8 puts around a kill -9 of etcd a watch reports.

All clients watch the same etcd at the same time, so they have the same outage.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.progress import Progress
from bench.runner import Trial, titled_table
from bench.verdicts import Verdict, equal
from etcd_clients.client_process import Bench, Child, started, title
from etcd_clients.etcd import RecordGateway, loopback, record
from peerd.registry.embedded_etcd import EmbeddedEtcd

PUTS = 8
OUTAGE_S = 3.0
TITLE = f"watch: {PUTS} puts, 1 before and {PUTS - 1} after a kill -9 of etcd and {OUTAGE_S:g} s without it"

_PREFIX = "watched"
_FIRST_EVENT_TIMEOUT_S = 3.0
_LAST_EVENT_TIMEOUT_S = 6.0
_ONE_MORE_TIMEOUT_S = 1.0
_NEW_WATCH_TIMEOUT_S = 3.0
_SETTLE_S = 0.5
_POLL_INTERVAL_S = 0.1

HEADER = (
    "client",
    "seen",
    "twice",
    "last event after",
    "the caller gets",
    "afterwards",
    "CPU in the outage",
)


@dataclass(frozen=True)
class WatchResult:
    client: str
    seen: int
    doubles: int
    late_s: float | None  # From etcd's return until the last event; None if there was none after it
    end: str  # How the watch ended; empty: the caller was not notified
    afterwards: str
    outage_cpu: float  # Share of a core while etcd was away

    def row(self) -> tuple[str, ...]:
        return (
            title(self.client),
            f"{self.seen} of {PUTS}",
            str(self.doubles),
            "-" if self.late_s is None else f"{self.late_s:.2f} s",
            self.end or "nothing",
            self.afterwards,
            f"{self.outage_cpu:.1%}",
        )


def trial(bench: Bench) -> Trial:
    def table(results: Sequence[WatchResult]) -> str:
        return titled_table(TITLE, [HEADER, *(result.row() for result in results)])

    return Trial(1, functools.partial(_measure, bench), table, _judge)


def _judge(results: Sequence[WatchResult]) -> Iterator[Verdict]:
    for result in results:
        if result.client == "peerd":
            yield from equal("watch: events", result.seen, PUTS)
            yield from equal("watch: doubled events", result.doubles, 0)
            yield from equal("watch: afterwards", result.afterwards, "it continues")


def _measure(bench: Bench, progress: Progress) -> list[WatchResult]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(progress.step("watch", "all clients"))
        etcd = stack.enter_context(EmbeddedEtcd())
        children = [
            stack.enter_context(started(bench, name, [loopback(etcd.endpoint)]))
            for name in bench.clients
        ]
        gateway = RecordGateway.of(etcd.endpoint)
        watches = [_Watch(child) for child in children]
        time.sleep(_SETTLE_S)
        gateway.put_records(_PREFIX, [0])
        _wait(watches, lambda watch: watch.saw(0), _FIRST_EVENT_TIMEOUT_S)

        outage_cpus = _outage(etcd, children)
        back_s = time.monotonic()
        for number in range(1, PUTS):
            gateway.put_records(_PREFIX, [number])
        _wait(watches, lambda watch: all(map(watch.saw, range(PUTS))), _LAST_EVENT_TIMEOUT_S)
        counts = [(len(watch.events), len(watch.ids), watch.late_s(back_s)) for watch in watches]
        afterwards = _afterwards(gateway, watches)
    return [
        WatchResult(watch.child.name, different, all_ - different, late_s, watch.end, after, cpu)
        for watch, (all_, different, late_s), after, cpu in zip(
            watches, counts, afterwards, outage_cpus, strict=True
        )
    ]


def _outage(etcd: EmbeddedEtcd, children: Sequence[Child]) -> list[float]:
    """Restart etcd, and return the share of a core that each child used while it was away."""
    etcd.kill()
    before_s = [child.cpu_s() for child in children]
    time.sleep(OUTAGE_S)
    after_s = [child.cpu_s() for child in children]
    etcd.restart()
    return [(after - before) / OUTAGE_S for before, after in zip(before_s, after_s, strict=True)]


def _afterwards(gateway: RecordGateway, watches: Sequence[_Watch]) -> list[str]:
    """Whether each watch continues, and if not, whether its client can start a new one."""
    one_more, for_new_ones = PUTS, PUTS + 1
    gateway.put_records(_PREFIX, [one_more])
    _wait(watches, lambda watch: watch.saw(one_more), _ONE_MORE_TIMEOUT_S)
    latest = [watch if watch.saw(one_more) else _Watch(watch.child) for watch in watches]
    time.sleep(_SETTLE_S)
    gateway.put_records(_PREFIX, [for_new_ones])
    new = [watch for watch in latest if watch not in watches]
    _wait(new, lambda watch: watch.saw(for_new_ones) or bool(watch.end), _NEW_WATCH_TIMEOUT_S)
    return [
        "it continues"
        if watch not in new
        else "a new watch works"
        if watch.saw(for_new_ones)
        else f"a new watch: {watch.end or 'sees nothing'}"
        for watch in latest
    ]


class _Watch:
    """A child's watch, as of the last update()."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.events: list[tuple[str, float]] = []
        self.end: str = child.ask("watch", prefix=_PREFIX).get("error", "")

    def update(self) -> None:
        answer = self.child.ask("seen")
        self.events = answer.get("seen", self.events)
        self.end = answer.get("error", "") or answer["end"]

    @property
    def ids(self) -> set[str]:
        return {peer_id for peer_id, _ in self.events}

    def saw(self, number: int) -> bool:
        return record(number).peer_id in self.ids

    def late_s(self, back_s: float) -> float | None:
        return max((at_s - back_s for _, at_s in self.events if at_s > back_s), default=None)


def _wait(watches: Sequence[_Watch], done: Callable[[_Watch], bool], timeout_s: float) -> None:
    """Until all are done or the timeout, because a watch without events does not report that."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        for watch in watches:
            watch.update()
        if all(map(done, watches)) or time.monotonic() > give_up_s:
            return
        time.sleep(_POLL_INTERVAL_S)
