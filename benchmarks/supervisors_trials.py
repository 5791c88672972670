"""The trials of the supervisor benchmark: recovery, start, memory, many, orphans, loop."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from children import BenchmarkError
from progress import Progress
from registry_etcd import Gateway, port_of
from supervisors_client import first_answers, next_answer_ns
from supervisors_contenders import (
    ECHO,
    ECHO_APP,
    MORTAL,
    PEERD,
    Contender,
    Environment,
    Order,
    Run,
    free_ports,
    started,
)

PEERS = 8
MANY_PEERS = 256
ANSWER_LIMIT_S = 20.0

SETTLED_S = 3.0
"""A peer that dies earlier has not started as supervisord sees it (startsecs = 1)."""

PHASE_S = 1.0
"""Deaths are spread over so much, so that they do not fall into step with a supervisor that looks
around once a second."""

STEADY_S = 2.0
STEADY_SHARE = 0.005
"""Memory has settled when it has moved by no more than this share for so long."""

STEADY_LIMIT_S = 20.0
LARGE_BYTES = 2 << 20
LOOK_S = 0.5
ORPHANS_S = 2.0
LOOP_S = 15.0
MEMORY_ROUNDS = 3
ANSWER_WAIT_S = 0.05


@dataclass(frozen=True)
class Bench:
    folder: Path
    etcd: str
    environment: Environment
    rounds: int
    progress: Progress

    @property
    def memory_rounds(self) -> int:
        """Memory varies little, and takes long to settle."""
        return min(self.rounds, MEMORY_ROUNDS)

    def order(self, name: str, peers: int, plain: Path = ECHO, app: Path | None = None) -> Order:
        folder = self.folder / f"{name}-{next(_numbers)}"
        return Order(folder, free_ports(peers), plain, app, self.etcd, self.environment)


_numbers = itertools.count()


@dataclass(frozen=True)
class Recovery:
    contender: str
    round: int
    seconds: float
    """From the kill -9 of a worker to the next answer on its port."""


@dataclass(frozen=True)
class Start:
    contender: str
    round: int
    seconds: float
    """From the command to an answer of every peer."""


@dataclass(frozen=True)
class Memory:
    """In bytes. USS: what would be free if the process ended; PSS: what it has, of shared pages its part."""

    contender: str
    round: int
    start_s: float
    uss: int
    """The sum of the tree."""

    pss: int
    """The same: the memory that the tree takes, as far as it is alone on the machine."""

    supervisor: int
    """USS, as the two below."""

    workers: Sequence[int]
    others: int
    """peerd's registrar."""

    shared_outside: Sequence[str]
    """Large files that one process of the tree has mapped, and another program has, too: what they
    share is not in the USS, which looks too good."""


@dataclass(frozen=True)
class Orphans:
    contender: str
    left: int
    """Of 8 peers, two seconds after the kill -9 of their supervisor."""


@dataclass(frozen=True)
class Loop:
    contender: str
    starts: int


Result = Recovery | Start | Memory | Orphans | Loop


def warm_up(bench: Bench, contenders: Sequence[Contender]) -> None:
    """So that all find their files in memory, and their modules compiled."""
    for contender in contenders:
        bench.progress.begin("warm-up", contender.name)
        with started(contender, bench.order("warm-up", PEERS, ECHO, ECHO_APP)) as run:
            answers(contender, run)
        bench.progress.end()


def recovery(bench: Bench, contenders: Sequence[Contender]) -> list[Recovery]:
    """All run side by side, and a worker of each is killed in turn, none twice."""
    results = []
    for first in range(0, bench.rounds, PEERS):
        with contextlib.ExitStack() as stack:
            runs = {}
            for contender in contenders:
                run = stack.enter_context(
                    started(contender, bench.order("recovery", PEERS, ECHO, ECHO_APP))
                )
                runs[contender.name] = run, answers(contender, run)
            time.sleep(SETTLED_S)
            for number in range(first, min(first + PEERS, bench.rounds)):
                for contender in in_turn(contenders, number):
                    bench.progress.begin("recovery", f"{contender.name}, round {number + 1}")
                    run, pids = runs[contender.name]
                    port = run.ports[number - first]
                    time.sleep(random.uniform(0, PHASE_S))
                    if pids[port] <= 1:  # for kill(2), that would be everybody
                        raise BenchmarkError(f"{contender.name}: no worker has pid {pids[port]}")
                    killed_ns = time.monotonic_ns()
                    os.kill(pids[port], signal.SIGKILL)
                    answered_ns = next_answer_ns(port, pids[port], ANSWER_LIMIT_S)
                    if answered_ns is None:
                        raise BenchmarkError(
                            f"{contender.name}: no answer {ANSWER_LIMIT_S:g} s after a worker's death"
                        )
                    seconds = (answered_ns - killed_ns) / 1e9
                    results.append(Recovery(contender.name, number, seconds))
                    bench.progress.end()
    return results


def start(bench: Bench, contenders: Sequence[Contender]) -> list[Start]:
    results = []
    for number, contender in alternating(bench, "start", contenders, bench.rounds):
        with started(contender, bench.order("start", PEERS)) as run:
            results.append(Start(contender.name, number, start_s(contender, run)))
    return results


def memory(bench: Bench, contenders: Sequence[Contender]) -> list[Memory]:
    return [
        measured_memory(bench, contender, number, PEERS)
        for number, contender in alternating(bench, "memory", contenders, bench.memory_rounds)
    ]


def many(bench: Bench, contenders: Sequence[Contender]) -> list[Memory]:
    """peerd's alone."""
    return [
        measured_memory(bench, contender, number, MANY_PEERS)
        for number, contender in alternating(
            bench, "many", [one for one in contenders if one is PEERD], bench.memory_rounds
        )
    ]


def orphans(bench: Bench, contenders: Sequence[Contender]) -> list[Orphans]:
    results = []
    for _, contender in alternating(bench, "orphans", contenders, 1):
        with started(contender, bench.order("orphans", PEERS)) as run:
            answers(contender, run)
            run.kill()
            time.sleep(ORPHANS_S)
            results.append(Orphans(contender.name, run.alive()))
    return results


def loop(bench: Bench, contenders: Sequence[Contender]) -> list[Loop]:
    """All at once, since nobody does much."""
    bench.progress.begin("loop", f"{LOOP_S:g} s")
    with contextlib.ExitStack() as stack:
        runs = {
            contender.name: stack.enter_context(
                started(contender, bench.order("loop", 1, MORTAL, MORTAL))
            )
            for contender in contenders
        }
        time.sleep(LOOP_S)
        results = [Loop(name, starts_of(run)) for name, run in runs.items()]
    bench.progress.end()
    return results


def alternating(
    bench: Bench, trial: str, contenders: Sequence[Contender], rounds: int
) -> Iterator[tuple[int, Contender]]:
    """Round by round, so that a bad minute hits all of them."""
    for number in range(rounds):
        for contender in in_turn(contenders, number):
            bench.progress.begin(trial, f"{contender.name}, round {number + 1}")
            yield number, contender
            bench.progress.end()


def in_turn(contenders: Sequence[Contender], number: int) -> Sequence[Contender]:
    """Nobody is always behind the same other."""
    return contenders if number % 2 == 0 else contenders[::-1]


def answers(contender: Contender, run: Run) -> dict[int, int]:
    """When every peer has answered: the pids by port, 0 where the answer does not say."""
    pids = first_answers(run.ports, ANSWER_LIMIT_S)
    if len(pids) < len(run.ports):
        raise BenchmarkError(
            f"{contender.name}: {len(pids)} of {len(run.ports)} peers answer {ANSWER_LIMIT_S:g} s "
            f"after the start; its last line was: {run.last_words()}"
        )
    return pids


def start_s(contender: Contender, run: Run) -> float:
    answers(contender, run)
    return (time.monotonic_ns() - run.began_ns) / 1e9


def measured_memory(bench: Bench, contender: Contender, number: int, peers: int) -> Memory:
    etcd = Gateway(port_of(bench.etcd))
    leases_before = etcd.lease_ids()
    with started(contender, bench.order("memory", peers)) as run:
        seconds = start_s(contender, run)
        if contender is PEERD:
            wait_until_registered(etcd, leases_before, peers)
        try:
            settled = settled_memory(run)
            workers = workers_of(run)
        except psutil.Error as error:
            raise BenchmarkError(f"{contender.name}: {error}") from None
        uss = {pid: memory.uss for pid, memory in settled.items()}
        supervisor = next(iter(uss))
        return Memory(
            contender=contender.name,
            round=number,
            start_s=seconds,
            uss=sum(uss.values()),
            pss=sum(memory.pss for memory in settled.values()),
            supervisor=uss[supervisor],
            workers=[uss[pid] for pid in workers],
            others=sum(b for pid, b in uss.items() if pid != supervisor and pid not in workers),
            shared_outside=shared_outside(uss),
        )


def wait_until_registered(etcd: Gateway, leases_before: set[str], peers: int) -> None:
    """Each record has a lease of its own."""
    give_up_s = time.monotonic() + ANSWER_LIMIT_S
    while len(etcd.lease_ids() - leases_before) < peers:
        if time.monotonic() > give_up_s:
            raise BenchmarkError(f"peerd: {peers} peers are not registered in {ANSWER_LIMIT_S:g} s")
        time.sleep(ANSWER_WAIT_S)


@dataclass(frozen=True)
class ProcessMemory:
    uss: int
    pss: int


def settled_memory(run: Run) -> dict[int, ProcessMemory]:
    """By pid, the supervisor's first. Raises psutil.Error when a process ends meanwhile."""
    give_up_s = time.monotonic() + STEADY_LIMIT_S
    seen: list[tuple[float, int]] = []
    while True:
        found = {process.pid: memory_of(process) for process in run.tree()}
        now_s = time.monotonic()
        seen.append((now_s, sum(memory.uss for memory in found.values())))
        lately = [total for at_s, total in seen if at_s >= now_s - STEADY_S]
        is_steady = max(lately) - min(lately) <= STEADY_SHARE * max(lately)
        if now_s > give_up_s or (now_s - seen[0][0] >= STEADY_S + SETTLED_S and is_steady):
            return found
        time.sleep(LOOK_S)


def memory_of(process: psutil.Process) -> ProcessMemory:
    memory = process.memory_full_info()
    return ProcessMemory(memory.uss, memory.pss)


def workers_of(run: Run) -> list[int]:
    """Those with one of the ports. peerd's supervisor has all of them, its registrar none."""
    ports = set(run.ports)
    return [
        process.pid
        for process in run.tree()
        if sum(c.laddr.port in ports for c in process.net_connections("udp4") if c.laddr) == 1
    ]


def shared_outside(pids: Iterable[int]) -> list[str]:
    inside = [files_of(pid) for pid in pids]
    once = [
        path
        for path, size in collections.Counter(itertools.chain(*inside)).items()
        if size == 1 and os.path.getsize(path) >= LARGE_BYTES
    ]
    outside = set(itertools.chain(*(files_of(pid) for pid in set(psutil.pids()) - set(pids))))
    return sorted(os.path.basename(path) for path in once if path in outside)


def files_of(pid: int) -> set[str]:
    """The libraries and programs that it has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # somebody else's, or gone
        return set()
    # address, permissions, offset, device, inode, path: proc_pid_maps(5)
    fields = [line.split(maxsplit=5) for line in lines]
    return {
        path[0]
        for _, perms, _, _, _, *path in fields
        if "x" in perms and path and path[0][0] == "/"
    }


def starts_of(run: Run) -> int:
    try:
        return len((run.folder / "starts").read_text().split())
    except FileNotFoundError:
        return 0
