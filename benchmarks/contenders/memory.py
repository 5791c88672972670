"""Trials ``memory`` and ``many``: the memory of a supervisor and its peers once it is steady."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import psutil

from bench.children import BenchmarkError
from bench.progress import Progress
from bench.runner import Trial
from bench.tables import mib
from bench.verdicts import Verdict, at_most, failed
from contenders.contender import PEERD, SUPERVISORD, Contender, Run, started
from contenders.side_by_side import (
    ANSWER_TIMEOUT_S,
    PEERS,
    SETTLE_S,
    Bench,
    of,
    seconds_to_start,
)
from etcd_clients.etcd import RecordGateway

MANY_PEERS = 256
MAX_MANY_S = 5.0
MAX_WORKER_MIB = 3.0

MAX_ROUNDS = 3  # Memory varies little, and takes long to settle
STEADY_S = 2.0
STEADY_SHARE = 0.005  # Memory is steady when it has changed by no more than this share for STEADY_S
STEADY_TIMEOUT_S = 20.0
LARGE_BYTES = 2 << 20
SAMPLE_INTERVAL_S = 0.5
POLL_INTERVAL_S = 0.05


@dataclass(frozen=True)
class Memory:
    """In bytes. USS: what would be freed if the process ended. PSS: the USS and a share of shared pages."""

    contender: str
    round: int
    start_s: float
    uss: int  # The sum of the tree
    pss: int  # The sum of the tree: all of its memory, if it shares no pages with other programs
    supervisor: int  # USS, like the two below
    workers: Sequence[int]
    others: int  # peerd's registrar
    shared_outside: Sequence[str]
    """Large files that one process of the tree and another program have mapped. The USS does not contain
    these shared pages, so it is too low."""


def memory_trial(bench: Bench) -> Trial:
    def table(results: Sequence[Memory]) -> str:
        def cells(contender: Contender, found: Sequence[Memory]) -> list[str]:
            return [
                mib(median(result.uss for result in found))
                + (" !" if _files_of_others(found) else ""),
                mib(median(result.supervisor for result in found)),
                *_worker_cells(found),
                mib(median(result.others for result in found)) if contender is PEERD else "-",
                mib(median(result.pss for result in found)),
            ]

        header = (
            "supervisor",
            "USS, all",
            "itself",
            "mean worker",
            "largest",
            "registrar",
            "PSS, all",
        )
        text = bench.table(f"memory: {PEERS} peers, steady", header, results, cells)
        if files := _files_of_others(results):
            text += (
                f"\n! Other programs on this machine use {files}, too: the USS of the marked "
                "supervisors does not contain the pages that they share."
            )
        return text

    def judge(results: Sequence[Memory]) -> Iterator[Verdict]:
        claim = f"memory: USS with {PEERS} peers : supervisord"
        ours, theirs = of(results, PEERD), of(results, SUPERVISORD)
        if not ours:
            return
        if not theirs:
            yield from failed(claim, "not judged: there is no supervisord")
        elif files := _files_of_others([*ours, *theirs]):
            yield from failed(claim, f"not judged: stop the programs that use {files}")
        else:
            uss, bound = (median(result.uss for result in found) for found in (ours, theirs))
            yield Verdict(claim, f"<= {mib(bound)}", mib(uss), uss <= bound)

    return _trial(bench, "memory", PEERS, table, judge)


def many_trial(bench: Bench) -> Trial:
    contenders = [contender for contender in bench.contenders if contender is PEERD]
    of_peerd = replace(bench, contenders=contenders, missing=[])

    def table(results: Sequence[Memory]) -> str:
        def cells(_: Contender, found: Sequence[Memory]) -> list[str]:
            seconds = f"{median(result.start_s for result in found):.2f} s"
            totals = (mib(median(getattr(r, kind) for r in found)) for kind in ("uss", "pss"))
            return [seconds, *_worker_cells(found), *totals]

        header = ("supervisor", "all answer", "mean worker", "largest", "USS, all", "PSS, all")
        return of_peerd.table(f"many: {MANY_PEERS} peers", header, results, cells)

    def judge(results: Sequence[Memory]) -> Iterator[Verdict]:
        if results:
            seconds = median(result.start_s for result in results)
            yield from at_most(f"many: {MANY_PEERS} peers answer", seconds, MAX_MANY_S, " s")
            largest = max(max(result.workers) for result in results) / 2**20
            yield from at_most("many: USS of a worker", largest, MAX_WORKER_MIB, " MiB")

    return _trial(of_peerd, "many", MANY_PEERS, table, judge)


def _worker_cells(found: Sequence[Memory]) -> tuple[str, str]:
    return (
        mib(median(mean(result.workers) for result in found), 2),
        mib(max(max(result.workers) for result in found), 2),
    )


def _files_of_others(results: Iterable[Memory]) -> str:
    return ", ".join(sorted({file for result in results for file in result.shared_outside}))


def _trial(
    bench: Bench,
    name: str,
    peers: int,
    table: Callable[[Sequence[Memory]], str],
    judge: Callable[[Sequence[Memory]], Iterator[Verdict]],
) -> Trial:
    rounds = min(bench.rounds, MAX_ROUNDS)

    def measure(progress: Progress) -> list[Memory]:
        return [
            _measure(bench, contender, number, peers)
            for number, contender in bench.alternating(progress, name, rounds=rounds)
        ]

    return Trial(rounds * len(bench.contenders), measure, table, judge)


def _measure(bench: Bench, contender: Contender, number: int, peers: int) -> Memory:
    etcd = RecordGateway.of(bench.etcd)
    leases_before = etcd.lease_ids()
    with started(contender, bench.order("memory", peers)) as run:
        seconds = seconds_to_start(contender, run)
        if contender is PEERD:
            _wait_until_registered(etcd, leases_before, peers)
        try:
            steady = _steady_memory(run)
            workers = _workers_of(run)
        except psutil.Error as error:
            raise BenchmarkError(f"{contender.name}: {error}") from None
        uss = {pid: memory.uss for pid, memory in steady.items()}
        supervisor = next(iter(uss))
        return Memory(
            contender=contender.name,
            round=number,
            start_s=seconds,
            uss=sum(uss.values()),
            pss=sum(memory.pss for memory in steady.values()),
            supervisor=uss[supervisor],
            workers=[uss[pid] for pid in workers],
            others=sum(b for pid, b in uss.items() if pid != supervisor and pid not in workers),
            shared_outside=_shared_outside(uss),
        )


def _wait_until_registered(etcd: RecordGateway, leases_before: set[str], peers: int) -> None:
    """Each record has its own lease."""
    give_up_s = time.monotonic() + ANSWER_TIMEOUT_S
    while len(etcd.lease_ids() - leases_before) < peers:
        if time.monotonic() > give_up_s:
            raise BenchmarkError(
                f"peerd: {peers} peers are not registered after {ANSWER_TIMEOUT_S:g} s"
            )
        time.sleep(POLL_INTERVAL_S)


def _steady_memory(run: Run) -> dict[int, Any]:
    """By pid, the supervisor's first. Raises psutil.Error when a process ends meanwhile."""
    give_up_s = time.monotonic() + STEADY_TIMEOUT_S
    samples: list[tuple[float, int]] = []
    while True:
        found = {process.pid: process.memory_full_info() for process in run.tree()}
        now_s = time.monotonic()
        samples.append((now_s, sum(memory.uss for memory in found.values())))
        latest = [total for at_s, total in samples if at_s >= now_s - STEADY_S]
        is_steady = max(latest) - min(latest) <= STEADY_SHARE * max(latest)
        if now_s > give_up_s or (now_s - samples[0][0] >= STEADY_S + SETTLE_S and is_steady):
            return found
        time.sleep(SAMPLE_INTERVAL_S)


def _workers_of(run: Run) -> list[int]:
    """The processes with one of the ports. peerd's supervisor has all of them, its registrar none."""
    ports = set(run.ports)
    return [
        process.pid
        for process in run.tree()
        if sum(c.laddr.port in ports for c in process.net_connections("udp4") if c.laddr) == 1
    ]


def _shared_outside(pids: Iterable[int]) -> list[str]:
    inside = [_mapped_files(pid) for pid in pids]
    once = [
        path
        for path, count in Counter(itertools.chain(*inside)).items()
        if count == 1 and os.path.getsize(path) >= LARGE_BYTES
    ]
    strangers = set(psutil.pids()) - set(pids)
    outside = set(itertools.chain(*(_mapped_files(pid) for pid in strangers)))
    return sorted(os.path.basename(path) for path in once if path in outside)


def _mapped_files(pid: int) -> set[str]:
    """The libraries and programs that a process has mapped."""
    try:
        maps = psutil.Process(pid).memory_maps(grouped=False)
    except psutil.Error:  # of another user, or gone
        return set()
    return {each.path for each in maps if "x" in each.perms and each.path.startswith("/")}
