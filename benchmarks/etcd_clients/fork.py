"""Trial ``fork``: a process that has used its client forks, and the child reads.

All clients run at the same time, because a child that hangs only sleeps.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.progress import Progress
from bench.runner import Trial, titled_table
from etcd_clients.client_process import Bench, started, title
from etcd_clients.etcd import RecordGateway, loopback
from peerd.registry.embedded_etcd import EmbeddedEtcd

RUNS = 3
TITLE = f"fork: outcome of a read in a forked child, {RUNS} runs"
HEADER = ("client", "with the parent's client", "with a new client")

_PREFIX = "fork"


@dataclass(frozen=True)
class ForkResult:
    client: str
    inherited: bool
    outcome: str


def trial(bench: Bench) -> Trial:
    def measure(progress: Progress) -> list[ForkResult]:
        with EmbeddedEtcd() as etcd:
            RecordGateway.of(etcd.endpoint).put_records(_PREFIX, range(10))
            results: list[ForkResult] = []
            for number in range(1, RUNS + 1):
                with progress.step("fork", f"run {number} of {RUNS}, all clients"):
                    results += _measure(bench, loopback(etcd.endpoint))
            return results

    def table(results: Sequence[ForkResult]) -> str:
        rows = [
            (title(name), *(_cell(results, name, inherited) for inherited in (True, False)))
            for name in bench.clients
        ]
        return titled_table(TITLE, [HEADER, *rows])

    return Trial(RUNS, measure, table)


def _measure(bench: Bench, endpoint: str) -> Iterator[ForkResult]:
    with contextlib.ExitStack() as stack:
        # A new process for each, because a fork may break the parent's client as well.
        children = [
            (stack.enter_context(started(bench, name, [endpoint])), inherited)
            for name in bench.clients
            for inherited in (True, False)
        ]
        for child, inherited in children:
            child.send("fork", prefix=_PREFIX, inherited=inherited)
        for child, inherited in children:
            answer = child.answer()
            outcome = answer.get("outcome") or answer["error"]
            yield ForkResult(child.name, inherited, outcome)


def _cell(results: Sequence[ForkResult], client: str, inherited: bool) -> str:
    outcomes = Counter(
        result.outcome
        for result in results
        if result.client == client and result.inherited is inherited
    )
    if len(outcomes) == 1:
        return next(iter(outcomes))
    return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
