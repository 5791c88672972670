"""Runs of all contenders in turn, and what every trial does with them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from bench.children import BenchmarkError
from bench.progress import Progress
from bench.runner import titled_table
from contenders.contender import CONTENDERS, ECHO, Contender, Environment, Order, Run
from contenders.pid_client import first_answers
from peerd.free_ports import free_ports

PEERS = 8
ANSWER_TIMEOUT_S = 20.0
SETTLE_S = 3.0  # supervisord regards a peer that exits earlier as not started (startsecs = 1)


class OfContender(Protocol):
    @property
    def contender(self) -> str: ...


AnyResult = TypeVar("AnyResult", bound=OfContender)


@dataclass(frozen=True)
class Bench:
    contenders: Sequence[Contender]
    missing: Sequence[Contender]  # Contenders that are not installed
    folder: Path
    etcd: str
    environment: Environment
    rounds: int
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def order(self, name: str, peers: int, plain: Path = ECHO, app: Path | None = None) -> Order:
        folder = self.folder / f"{name}-{next(self._numbers)}"
        first = free_ports.take(peers)
        return Order(folder, range(first, first + peers), plain, app, self.etcd, self.environment)

    def alternating(
        self, progress: Progress, trial: str, *, rounds: int | None = None
    ) -> Iterator[tuple[int, Contender]]:
        """Round by round, so that a slow minute affects all contenders."""
        for number in range(rounds or self.rounds):
            for contender in in_turn(self.contenders, number):
                with progress.step(trial, f"{contender.name}, round {number + 1}"):
                    yield number, contender

    def table(
        self,
        title: str,
        header: Sequence[str],
        results: Sequence[AnyResult],
        cells: Callable[[Contender, list[AnyResult]], Sequence[str]],
    ) -> str:
        """``cells``: of a contender with results. A missing contender has a row as well."""
        rows = [
            [contender.name, *cells(contender, found)]
            for contender in CONTENDERS.values()
            if (found := of(results, contender))
        ]
        padding = [""] * (len(header) - 2)
        absent = [
            [contender.name, "not installed: pip install 'peerd[bench]'", *padding]
            for contender in self.missing
        ]
        return titled_table(title, [header, *rows, *absent])


def in_turn(contenders: Sequence[Contender], number: int) -> Sequence[Contender]:
    """No contender always follows the same other one."""
    return contenders if number % 2 == 0 else contenders[::-1]


def wait_for_answers(contender: Contender, run: Run) -> dict[int, int]:
    """Until every peer has answered. The pids by port; 0 if the answer has no pid."""
    pids = first_answers(run.ports, ANSWER_TIMEOUT_S)
    if len(pids) < len(run.ports):
        raise BenchmarkError(
            f"{contender.name}: {len(pids)} of {len(run.ports)} peers answer {ANSWER_TIMEOUT_S:g} s "
            f"after the start; its last line was: {run.last_words()}"
        )
    return pids


def seconds_to_start(contender: Contender, run: Run) -> float:
    """From the command until every peer has answered."""
    wait_for_answers(contender, run)
    return (time.monotonic_ns() - run.began_ns) / 1e9


def of(results: Sequence[AnyResult], contender: Contender) -> list[AnyResult]:
    return [result for result in results if result.contender == contender.name]
