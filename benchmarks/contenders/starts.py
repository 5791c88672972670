"""Trials ``start`` and ``help``: from a command to its effect."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.children import BenchmarkError
from bench.progress import Progress
from bench.runner import Trial
from bench.tables import ratio, spread_ms, times
from contenders.contender import CIRCUS, CONTENDERS, PEERD, Contender, started
from contenders.side_by_side import PEERS, Bench, of, seconds_to_start


@dataclass(frozen=True)
class Start:
    contender: str
    round: int
    seconds: float
    """From the command to an answer of every peer."""


@dataclass(frozen=True)
class Help:
    contender: str
    round: int
    seconds: float
    """From the command ``--help`` to its exit."""


def start_trial(bench: Bench) -> Trial:
    def measure(progress: Progress) -> list[Start]:
        results = []
        for number, contender in bench.alternating(
            progress, "start", bench.contenders, bench.rounds
        ):
            with started(contender, bench.order("start", PEERS)) as run:
                results.append(Start(contender.name, number, seconds_to_start(contender, run)))
        return results

    title = f"start: from the command to an answer of each of {PEERS} peers"
    return _trial(bench, title, Start, measure)


def help_trial(bench: Bench) -> Trial:
    def measure(progress: Progress) -> list[Help]:
        return [
            Help(contender.name, number, _help_s(bench, contender))
            for number, contender in bench.alternating(
                progress, "help", bench.contenders, bench.rounds
            )
        ]

    return _trial(bench, "help: from the command --help to its exit", Help, measure)


def _help_s(bench: Bench, contender: Contender) -> float:
    command = [str(contender.executable(bench.environment)), "--help"]
    began_s = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: exit code {done.returncode}")
    return time.monotonic() - began_s


def _trial(
    bench: Bench,
    title: str,
    kind: type[Start] | type[Help],
    measure: Callable[[Progress], Sequence[Start | Help]],
) -> Trial:
    def table(results: Sequence[Start | Help]) -> str:
        against_circus = times(times_circus(results, kind))
        rows = [
            (
                contender.name,
                *spread_ms([result.seconds for result in found]),
                against_circus if contender is PEERD else "",
            )
            for contender in CONTENDERS.values()
            if (found := of(kind, results, contender))
        ]
        header = ("supervisor", "median", "min", "max", "rounds", "peerd/circus")
        return bench.table(title, header, rows)

    return Trial(len(bench.contenders) * bench.rounds, measure, table)


def times_circus(results: Sequence[object], kind: type[Start] | type[Help]) -> float | None:
    peerd, circus = (
        {result.round: result.seconds for result in of(kind, results, contender)}
        for contender in (PEERD, CIRCUS)
    )
    return ratio(peerd, circus)
