"""Trial ``fork``: a process that has used its client forks, and the child reads.

All clients at once, since a child that hangs only sleeps.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peerd.registry.embedded_etcd import EmbeddedEtcd
from registry_etcd import Gateway, loopback, port_of
from registry_trials import Bench, started, title

RUNS = 3
TITLE = f"fork: what a read gives in a forked child, {RUNS} runs"
HEADER = ("client", "with the parent's client", "with one of its own")

_PREFIX = "fork"


@dataclass(frozen=True)
class ForkResult:
    client: str
    inherited: bool
    outcome: str


def steps(clients: Sequence[str]) -> int:
    return RUNS


def run(bench: Bench, clients: Sequence[str]) -> list[ForkResult]:
    with EmbeddedEtcd() as etcd:
        Gateway(port_of(etcd.endpoint)).put(_PREFIX, range(10))
        results: list[ForkResult] = []
        for number in range(1, RUNS + 1):
            bench.progress.begin("fork", f"run {number} of {RUNS}, all clients at once")
            results += _measure(bench, clients, loopback(etcd.endpoint))
            bench.progress.end()
        return results


def _measure(bench: Bench, clients: Sequence[str], endpoint: str) -> Iterator[ForkResult]:
    with contextlib.ExitStack() as stack:
        # A fresh process for each: a fork may leave its parent's client broken, too.
        children = [
            (stack.enter_context(started(bench, name, [endpoint])), inherited)
            for name in clients
            for inherited in (True, False)
        ]
        for child, inherited in children:
            child.tell("fork", prefix=_PREFIX, inherited=inherited)
        for child, inherited in children:
            answer = child.answer()
            outcome = answer.get("outcome") or answer["error"]
            yield ForkResult(child.name, inherited, outcome)


def rows(results: Sequence[ForkResult], clients: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for name in clients:
        yield (title(name), *(_cell(results, name, inherited) for inherited in (True, False)))


def _cell(results: Sequence[ForkResult], client: str, inherited: bool) -> str:
    outcomes = Counter(
        result.outcome
        for result in results
        if result.client == client and result.inherited is inherited
    )
    if len(outcomes) == 1:
        return next(iter(outcomes))
    return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
