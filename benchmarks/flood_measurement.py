"""One flood against one worker: what it did, and what it did not.

Which pings did the kernel drop? It counts drops, not whose. But no flood datagram can be a PING
(flood.c), so the worker's ping handler counts those that reached it, and the rest were dropped before
it. That this is the whole truth is checked by the identity of all datagrams:

    flood sent - flood reached = (kernel drops - pings dropped) x datagrams of a send

where the kernel's drops are those of SO_MEMINFO. A ping that peerd had lost would break it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from children import ANSWER_LIMIT_S, BenchmarkError, answer, cpu_seconds, running
from datagrams import SEGMENTS, datagram
from flood_apps import result
from machine import Cpus
from peerd._scoreboard import Slot
from peerd.settings import DatagramSettings
from peerd_workers import Worker, start_workers
from process_memory import resident_bytes
from programs import Programs
from sockets import bound_socket, dropped, port_of, wait_until_empty

PINGS_A_SECOND = 100
WAIT_S = 2.0
"""For how long a ping's answer is waited for."""

PROBE_S = 0.05
LATE_NS = 20_000_000


@dataclass(frozen=True)
class Flood:
    title: str
    app: str
    """One of flood_apps.py."""

    valid: bool
    """Messages for a handler; else random bytes."""

    joined: bool
    """SEGMENTS datagrams a send; else one."""


@dataclass(frozen=True)
class Heartbeat:
    oldest_ns: int
    longest_gap_ns: int
    """The longest time between two looks: what was in between has not been seen."""


@dataclass(frozen=True)
class Outcome:
    title: str
    app: str
    seconds: float
    sent: int
    reached: int
    decoded: int
    """Of them, those that a handler got."""

    kernel_drops: int
    """As the kernel counts: joined datagrams are one."""

    unexplained: int
    """What the identity above leaves over."""

    pings: int
    pings_reached: int
    answered: int
    answers_dropped: int
    """By the kernel, at the client's socket."""

    p50_ns: int
    p99_ns: int
    heartbeat: Heartbeat
    timer_fires: int
    timer_late_ns: int
    busy: float
    kept_waiting: float
    """The share of the time that the worker wanted its CPU and another process had it."""

    grown_bytes: int
    changed: tuple[str, ...]
    """What has changed beside counters."""

    @property
    def complaints(self) -> list[str]:
        wrong = list(self.changed)
        if self.unexplained:
            wrong.append(f"{self.unexplained:,} datagrams unexplained")
        if self.answered + self.answers_dropped < self.pings_reached:
            wrong.append(f"{self.pings_reached - self.answered:,} pings came and were not answered")
        if self.heartbeat.oldest_ns > LATE_NS:
            wrong.append(f"the heartbeat was {self.heartbeat.oldest_ns / 1e6:.1f} ms old")
        if self.timer_late_ns > LATE_NS:
            wrong.append(f"the timer was {self.timer_late_ns / 1e6:.1f} ms late")
        return wrong


def run_flood(flood: Flood, programs: Programs, cpus: Cpus, seconds: float) -> Outcome:
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(bound_socket())
        (worker,) = stack.enter_context(
            start_workers([sock], f"flood_apps:{flood.app}", DatagramSettings(), result)
        )
        if cpus.receiver is not None:
            os.sched_setaffinity(worker.pid, {cpus.receiver})
        probes = _probe(programs, sock)  # the first one starts the timer
        before = _Look(worker, sock)
        with (
            running(_flood_command(flood, programs, sock, seconds)) as flooding,
            running(_ping_command(programs, sock, seconds)) as pinging,
        ):
            heartbeat = watch(worker.slot, flooding)
            sent = orjson.loads(answer("the flood", flooding, ANSWER_LIMIT_S + seconds))
            pings = orjson.loads(answer("the client", pinging, ANSWER_LIMIT_S + seconds))
        wait_until_empty([sock], worker.check_alive)
        busy_s = cpu_seconds([worker.pid]) - before.cpu_s
        waited_s = waited_seconds(worker.pid) - before.waited_s
        after = _Look(worker, sock)
        probes += _probe(programs, sock)
        told = worker.stop()
    pings_reached = int(str(told["pings"])) - probes
    pings_dropped = pings["sent"] - pings_reached
    reached = after.counters["rx_datagrams"] - before.counters["rx_datagrams"] - pings_reached
    kernel_drops = (after.drops - before.drops) % 2**32
    a_drop = SEGMENTS if flood.joined else 1
    return Outcome(
        title=flood.title,
        app=flood.app,
        seconds=sent["seconds"],
        sent=sent["sent"],
        reached=reached,
        decoded=int(str(told["messages"])),
        kernel_drops=kernel_drops,
        unexplained=sent["sent"] - reached - (kernel_drops - pings_dropped) * a_drop,
        pings=pings["sent"],
        pings_reached=pings_reached,
        answered=pings["answered"],
        answers_dropped=pings["kernel_drops"],
        p50_ns=pings["p50_ns"],
        p99_ns=pings["p99_ns"],
        heartbeat=heartbeat,
        timer_fires=int(str(told["fires"])),
        timer_late_ns=int(str(told["latest_ns"])),
        busy=busy_s / sent["seconds"],
        kept_waiting=waited_s / sent["seconds"],
        grown_bytes=after.resident_bytes - before.resident_bytes,
        changed=tuple(after.changes_since(before)),
    )


def watch(slot: Slot, flooding: subprocess.Popen[bytes]) -> Heartbeat:
    """The heartbeat's age, looked at every millisecond from the flood's first datagrams to its end."""
    begun = slot.counters()["rx_datagrams"]
    while slot.counters()["rx_datagrams"] < begun + 1000 and flooding.poll() is None:
        time.sleep(0.0001)
    oldest_ns = longest_gap_ns = 0
    last_ns = time.monotonic_ns()
    while flooding.poll() is None:
        heartbeat_ns = slot.heartbeat_ns
        now_ns = time.monotonic_ns()
        # The same on both sides of the clock, so it was the heartbeat at that time, however long
        # this process was kept from running in between.
        if slot.heartbeat_ns == heartbeat_ns:
            oldest_ns = max(oldest_ns, now_ns - heartbeat_ns)
            longest_gap_ns = max(longest_gap_ns, now_ns - last_ns)
            last_ns = now_ns
        time.sleep(0.001)
    return Heartbeat(oldest_ns, longest_gap_ns)


def _probe(programs: Programs, sock: socket.socket) -> int:
    """How many pings were sent to the quiet worker, which must all be answered."""
    with running(_ping_command(programs, sock, PROBE_S)) as child:
        said = orjson.loads(answer("the client", child))
    if said["answered"] != said["sent"]:
        raise BenchmarkError(f"a quiet worker answered {said['answered']} of {said['sent']} pings")
    count: int = said["sent"]
    return count


def _flood_command(
    flood: Flood, programs: Programs, sock: socket.socket, seconds: float
) -> list[str]:
    arguments = ["-s", str(seconds)]
    port = str(port_of(sock))
    if flood.valid:
        segments = str(SEGMENTS if flood.joined else 1)
        return [programs.path("load"), *arguments, "-g", segments, datagram().hex(), port]
    return [programs.path("flood"), *arguments, *(["-j"] if flood.joined else []), port]


def _ping_command(programs: Programs, sock: socket.socket, seconds: float) -> list[str]:
    # It sleeps between its pings, since it shares a CPU with the flood.
    command = [programs.path("ping"), "-b", "-s", str(seconds), "-w", str(WAIT_S)]
    return [*command, "-r", str(PINGS_A_SECOND), datagram("PING").hex(), str(port_of(sock))]


def waited_seconds(pid: int) -> float:
    """For how long a process has been ready to run and did not (Documentation/scheduler/sched-stats)."""
    _, waited_ns, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    return int(waited_ns) / 1e9


class _Look:
    """What is known of a worker at one time."""

    def __init__(self, worker: Worker, sock: socket.socket) -> None:
        slot = worker.slot
        process = Path(f"/proc/{worker.pid}")
        self.counters = slot.counters()
        self.drops = dropped(sock)
        self.cpu_s = cpu_seconds([worker.pid])
        self.waited_s = waited_seconds(worker.pid)
        self.resident_bytes = resident_bytes(worker.pid)
        self._state = {
            "the slot's pid": slot.pid,
            "the slot's generation": slot.generation,
            "the slot's state": slot.state,
            "the slot's restarts": slot.restarts,
            "the slot's lease": slot.lease_id,
            "the slot's holder": slot.holder,
            "the number of open files": len(list((process / "fd").iterdir())),
            "the number of threads": len(list((process / "task").iterdir())),
        }

    def changes_since(self, before: _Look) -> Iterator[str]:
        for name, value in self._state.items():
            if value != before._state[name]:
                yield f"{name} was {before._state[name]} and is {value}"
