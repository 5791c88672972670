"""Trials ``orphans`` and ``loop``: what a supervisor's death leaves, and a worker that keeps dying."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.progress import Progress
from bench.runner import Trial
from bench.verdicts import Verdict, equal
from contenders.contender import MORTAL, PEERD, Run, started
from contenders.side_by_side import PEERS, Bench, of, wait_for_answers

ORPHANS_S = 2.0
LOOP_S = 15.0


@dataclass(frozen=True)
class Orphans:
    contender: str
    left: int  # Of 8 peers, two seconds after the kill -9 of their supervisor


@dataclass(frozen=True)
class Loop:
    contender: str
    starts: int


def orphans_trial(bench: Bench) -> Trial:
    def measure(progress: Progress) -> list[Orphans]:
        results = []
        for _, contender in bench.alternating(progress, "orphans", rounds=1):
            with started(contender, bench.order("orphans", PEERS)) as run:
                wait_for_answers(contender, run)
                run.kill()
                time.sleep(ORPHANS_S)
                results.append(Orphans(contender.name, run.alive()))
        return results

    def table(results: Sequence[Orphans]) -> str:
        after = f"{ORPHANS_S:g} s after kill -9 of the supervisor of {PEERS} peers"
        return bench.table(
            f"orphans: processes {after}",
            ("supervisor", "left"),
            results,
            lambda _, found: [str(found[0].left)],
        )

    def judge(results: Sequence[Orphans]) -> Iterator[Verdict]:
        for orphans in of(results, PEERD):
            yield from equal("orphans", orphans.left, 0)

    return Trial(len(bench.contenders), measure, table, judge)


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
        header = ("supervisor", "starts")
        return bench.table(title, header, results, lambda _, found: [str(found[0].starts)])

    return Trial(1, measure, table)


def _starts_of(run: Run) -> int:
    try:
        return len((run.folder / "starts").read_text().split())
    except FileNotFoundError:
        return 0
