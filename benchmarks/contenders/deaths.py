"""Trials ``recovery``, ``orphans`` and ``loop``: what a supervisor does about deaths, its own included."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from bench.children import BenchmarkError
from bench.progress import Progress
from bench.runner import Trial
from bench.tables import spread_ms
from contenders.contender import CONTENDERS, ECHO, ECHO_APP, MORTAL, Run, started
from contenders.pid_client import next_answer_ns
from contenders.side_by_side import (
    ANSWER_TIMEOUT_S,
    PEERS,
    SETTLE_S,
    Bench,
    in_turn,
    of,
    wait_for_answers,
)

PHASE_S = 1.0
"""Deaths are spread over this time, so that they do not synchronize with a supervisor that polls once
per second."""

ORPHANS_S = 2.0
LOOP_S = 15.0


@dataclass(frozen=True)
class Recovery:
    contender: str
    round: int
    seconds: float
    """From a worker's kill -9 to the next answer on its port."""


@dataclass(frozen=True)
class Orphans:
    contender: str
    left: int
    """Of 8 peers, two seconds after the kill -9 of their supervisor."""


@dataclass(frozen=True)
class Loop:
    contender: str
    starts: int


def recovery_trial(bench: Bench) -> Trial:
    def table(results: Sequence[Recovery]) -> str:
        rows = [
            (contender.name, *spread_ms([result.seconds for result in found]))
            for contender in CONTENDERS.values()
            if (found := of(Recovery, results, contender))
        ]
        title = "recovery: from a worker's kill -9 to the next answer on its port"
        return bench.table(title, ("supervisor", "median", "min", "max", "rounds"), rows)

    return Trial(len(bench.contenders) * bench.rounds, partial(_recoveries, bench), table)


def _recoveries(bench: Bench, progress: Progress) -> list[Recovery]:
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
                    results.append(Recovery(contender.name, number, seconds))
    return results


def _recovery_s(name: str, port: int, pid: int) -> float:
    time.sleep(random.uniform(0, PHASE_S))
    if pid <= 1:  # which kill(2) would take for a process group or for all processes
        raise BenchmarkError(f"{name}: no worker has pid {pid}")
    killed_ns = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    answered_ns = next_answer_ns(port, pid, ANSWER_TIMEOUT_S)
    if answered_ns is None:
        raise BenchmarkError(f"{name}: no answer {ANSWER_TIMEOUT_S:g} s after a worker's death")
    return (answered_ns - killed_ns) / 1e9


def orphans_trial(bench: Bench) -> Trial:
    def measure(progress: Progress) -> list[Orphans]:
        results = []
        for _, contender in bench.alternating(progress, "orphans", bench.contenders, 1):
            with started(contender, bench.order("orphans", PEERS)) as run:
                wait_for_answers(contender, run)
                run.kill()
                time.sleep(ORPHANS_S)
                results.append(Orphans(contender.name, run.alive()))
        return results

    def table(results: Sequence[Orphans]) -> str:
        title = (
            f"orphans: processes {ORPHANS_S:g} s after kill -9 of the supervisor of {PEERS} peers"
        )
        rows = [(result.contender, str(result.left)) for result in results]
        return bench.table(title, ("supervisor", "left"), rows)

    return Trial(len(bench.contenders), measure, table)


def loop_trial(bench: Bench) -> Trial:
    def measure(progress: Progress) -> list[Loop]:
        """All at the same time, because none of them does much."""
        with progress.step("loop", f"{LOOP_S:g} s"), contextlib.ExitStack() as stack:
            runs = {
                contender.name: stack.enter_context(
                    started(contender, bench.order("loop", 1, MORTAL, MORTAL))
                )
                for contender in bench.contenders
            }
            time.sleep(LOOP_S)
            return [Loop(name, _starts_of(run)) for name, run in runs.items()]

    def table(results: Sequence[Loop]) -> str:
        title = f"loop: starts in {LOOP_S:g} s of a worker that dies 1.2 s after each"
        rows = [(result.contender, str(result.starts)) for result in results]
        return bench.table(title, ("supervisor", "starts"), rows)

    return Trial(1, measure, table)


def _starts_of(run: Run) -> int:
    try:
        return len((run.folder / "starts").read_text().split())
    except FileNotFoundError:
        return 0
