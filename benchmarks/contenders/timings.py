"""Trials ``recovery``, ``start`` and ``help``: from a death or a command to its effect."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from bench.children import BenchmarkError
from bench.progress import Progress
from bench.runner import Trial
from bench.tables import ratio, spread_ms, times
from bench.verdicts import Verdict, at_most, failed
from contenders.contender import CIRCUS, ECHO, ECHO_APP, PEERD, Contender, started
from contenders.pid_client import next_answer_ns
from contenders.side_by_side import (
    ANSWER_TIMEOUT_S,
    PEERS,
    SETTLE_S,
    Bench,
    in_turn,
    of,
    seconds_to_start,
    wait_for_answers,
)

MAX_RECOVERY_MS = 20.0
MAX_HELP_MS = 200.0
MAX_TIMES_CIRCUS = 0.5

PHASE_S = 1.0
"""Deaths are spread over this time, so that they do not synchronize with a supervisor that polls once
per second."""


@dataclass(frozen=True)
class Timing:
    contender: str
    round: int
    seconds: float


Timings = Sequence[Timing]


def recovery_trial(bench: Bench) -> Trial:
    def measure(progress: Progress) -> Timings:
        """All run side by side, and a worker of each is killed in turn, each worker once."""
        results = []
        for first in range(0, bench.rounds, PEERS):
            with contextlib.ExitStack() as stack:
                runs = {}
                for contender in bench.contenders:
                    order = bench.order("recovery", PEERS, ECHO, ECHO_APP)
                    run = stack.enter_context(started(contender, order))
                    runs[contender.name] = run, wait_for_answers(contender, run)
                time.sleep(SETTLE_S)
                for number in range(first, min(first + PEERS, bench.rounds)):
                    for contender in in_turn(bench.contenders, number):
                        run, pids = runs[contender.name]
                        port = run.ports[number - first]
                        with progress.step("recovery", f"{contender.name}, round {number + 1}"):
                            seconds = _recovery_s(contender.name, port, pids[port])
                        results.append(Timing(contender.name, number, seconds))
        return results

    def judge(results: Timings) -> Iterator[Verdict]:
        return at_most("recovery", _median_ms(results), MAX_RECOVERY_MS, " ms")

    title = "recovery: from a worker's kill -9 to the next answer on its port"
    return _trial(bench, title, measure, judge, against_circus=False)


def start_trial(bench: Bench) -> Trial:
    def measure(progress: Progress) -> Timings:
        results = []
        for number, contender in bench.alternating(progress, "start"):
            with started(contender, bench.order("start", PEERS)) as run:
                results.append(Timing(contender.name, number, seconds_to_start(contender, run)))
        return results

    def judge(results: Timings) -> Iterator[Verdict]:
        if of(results, PEERD):
            times_circus = _times_circus(results)
            yield from at_most("start : circus", times_circus, MAX_TIMES_CIRCUS)
            if times_circus is None:
                yield from failed("start : circus", "not judged: there is no circus")

    title = f"start: from the command to an answer of each of {PEERS} peers"
    return _trial(bench, title, measure, judge)


def help_trial(bench: Bench) -> Trial:
    def measure(progress: Progress) -> Timings:
        return [
            Timing(contender.name, number, _help_s(bench, contender))
            for number, contender in bench.alternating(progress, "help")
        ]

    def judge(results: Timings) -> Iterator[Verdict]:
        return at_most("peerd --help", _median_ms(results), MAX_HELP_MS, " ms")

    return _trial(bench, "help: from the command --help to its exit", measure, judge)


def _recovery_s(name: str, port: int, pid: int) -> float:
    """From a worker's kill -9 to the next answer on its port."""
    time.sleep(random.uniform(0, PHASE_S))
    if pid <= 1:  # which kill(2) would take for a process group or for all processes
        raise BenchmarkError(f"{name}: no worker has pid {pid}")
    killed_ns = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    answered_ns = next_answer_ns(port, pid, ANSWER_TIMEOUT_S)
    if answered_ns is None:
        raise BenchmarkError(f"{name}: no answer {ANSWER_TIMEOUT_S:g} s after a worker's death")
    return (answered_ns - killed_ns) / 1e9


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
    measure: Callable[[Progress], Timings],
    judge: Callable[[Timings], Iterator[Verdict]],
    against_circus: bool = True,
) -> Trial:
    def table(results: Timings) -> str:
        def cells(contender: Contender, found: Timings) -> list[str]:
            more = [times(_times_circus(results)) if contender is PEERD else ""]
            return [*spread_ms([r.seconds for r in found]), *(more if against_circus else [])]

        header = ["supervisor", "median", "min", "max", "rounds"]
        header += ["peerd/circus"] if against_circus else []
        return bench.table(title, header, results, cells)

    return Trial(len(bench.contenders) * bench.rounds, measure, table, judge)


def _median_ms(results: Timings) -> float | None:
    """Of peerd."""
    seconds = [result.seconds for result in of(results, PEERD)]
    return median(seconds) * 1e3 if seconds else None


def _times_circus(results: Timings) -> float | None:
    peerd, circus = (
        {result.round: result.seconds for result in of(results, contender)}
        for contender in (PEERD, CIRCUS)
    )
    return ratio(peerd, circus)
