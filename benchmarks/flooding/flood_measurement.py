"""One flood against one worker, and an account of every datagram.

The kernel counts its drops, but not whose they are. No datagram of the flood can be a PING (flood.c), so
the worker's handler counts the pings that reached it, and the others were dropped before it. This is
verified by an identity:

    flood sent - flood reached = (kernel drops - pings dropped) x datagrams per send

in which the kernel drops are those of SO_MEMINFO. A ping that peerd had lost would break it.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from bench.children import (
    ANSWER_TIMEOUT_S,
    BenchmarkError,
    answer,
    cpu_seconds,
    resident_bytes,
    running,
)
from bench.machine import Cpus
from flooding.flood_apps import result
from peerd._scoreboard import Slot
from peerd.settings import DatagramSettings
from udp.envelope import SEGMENTS, datagram
from udp.peerd_workers import Worker, start_workers
from udp.programs import Programs
from udp.udp_sockets import bound_socket, dropped, port_of, wait_until_empty

PINGS_PER_SECOND = 100
WAIT_TIMEOUT_S = 2.0  # How long the client waits for the answer to a ping
PROBE_S = 0.05
MAX_DELAY_NS = 20_000_000


@dataclass(frozen=True)
class Flood:
    title: str
    app: str  # A name in flood_apps.py
    valid: bool  # Messages for a handler, instead of random bytes
    joined: bool  # SEGMENTS datagrams per send, instead of one


@dataclass(frozen=True)
class Heartbeat:
    oldest_ns: int
    longest_gap_ns: int  # The longest time between two readings of the heartbeat


@dataclass(frozen=True)
class Outcome:
    title: str
    app: str
    seconds: float
    sent: int
    reached: int
    decoded: int  # Those of them that reached a handler
    kernel_drops: int  # In the kernel's count, in which joined datagrams are one
    unexplained: int  # The difference between the two sides of the identity above
    pings: int
    pings_reached: int
    answered: int
    answers_dropped: int  # By the kernel, at the client's socket
    p50_ns: int
    p99_ns: int
    heartbeat: Heartbeat
    timer_fires: int
    timer_late_ns: int
    busy: float
    kept_waiting: float
    """The share of time in which the worker was ready to run and another process had its CPU."""

    grown_bytes: int
    changed: tuple[str, ...]  # Changes of anything but counters

    @property
    def complaints(self) -> list[str]:
        wrong = list(self.changed)
        if self.unexplained:
            wrong.append(f"{self.unexplained:,} datagrams unexplained")
        if self.answered + self.answers_dropped < self.pings_reached:
            wrong.append(
                f"{self.pings_reached - self.answered:,} pings arrived and were not answered"
            )
        if self.heartbeat.oldest_ns > MAX_DELAY_NS:
            wrong.append(f"the heartbeat was {self.heartbeat.oldest_ns / 1e6:.1f} ms old")
        if self.timer_late_ns > MAX_DELAY_NS:
            wrong.append(f"the timer was {self.timer_late_ns / 1e6:.1f} ms late")
        return wrong


def run_flood(flood: Flood, programs: Programs, cpus: Cpus, seconds: float) -> Outcome:
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(bound_socket())
        (worker,) = stack.enter_context(
            start_workers([sock], f"flooding.flood_apps:{flood.app}", DatagramSettings(), result)
        )
        cpus.pin_receiver(worker.pid)
        probes = _probe(programs, sock)  # the first one starts the timer
        before = _Snapshot(worker, sock)
        with (
            running(_flood_command(flood, programs, sock, seconds)) as flooding,
            running(_ping_command(programs, sock, seconds)) as pinging,
        ):
            heartbeat = watch(worker.slot, flooding)
            sent = orjson.loads(answer("the flood", flooding, ANSWER_TIMEOUT_S + seconds))
            pings = orjson.loads(answer("the client", pinging, ANSWER_TIMEOUT_S + seconds))
        wait_until_empty([sock], worker.check_alive)
        busy_s = cpu_seconds([worker.pid]) - before.cpu_s
        waited_s = waited_seconds(worker.pid) - before.waited_s
        after = _Snapshot(worker, sock)
        probes += _probe(programs, sock)
        counts = worker.stop()
    pings_reached = counts["pings"] - probes
    pings_dropped = pings["sent"] - pings_reached
    reached = after.counters["rx_datagrams"] - before.counters["rx_datagrams"] - pings_reached
    kernel_drops = (after.drops - before.drops) % 2**32
    datagrams_per_drop = SEGMENTS if flood.joined else 1
    return Outcome(
        title=flood.title,
        app=flood.app,
        seconds=sent["seconds"],
        sent=sent["sent"],
        reached=reached,
        decoded=counts["messages"],
        kernel_drops=kernel_drops,
        unexplained=sent["sent"] - reached - (kernel_drops - pings_dropped) * datagrams_per_drop,
        pings=pings["sent"],
        pings_reached=pings_reached,
        answered=pings["answered"],
        answers_dropped=pings["kernel_drops"],
        p50_ns=pings["p50_ns"],
        p99_ns=pings["p99_ns"],
        heartbeat=heartbeat,
        timer_fires=counts["fires"],
        timer_late_ns=counts["longest_delay_ns"],
        busy=busy_s / sent["seconds"],
        kept_waiting=waited_s / sent["seconds"],
        grown_bytes=after.resident_bytes - before.resident_bytes,
        changed=tuple(after.changes_since(before)),
    )


def watch(slot: Slot, flooding: subprocess.Popen[bytes]) -> Heartbeat:
    """Read the age of the heartbeat every millisecond, from the first datagrams of the flood to its end."""
    begun = slot.counters()["rx_datagrams"]
    while slot.counters()["rx_datagrams"] < begun + 1000 and flooding.poll() is None:
        time.sleep(0.0001)
    oldest_ns = longest_gap_ns = 0
    last_ns = time.monotonic_ns()
    while flooding.poll() is None:
        heartbeat_ns = slot.heartbeat_ns
        now_ns = time.monotonic_ns()
        # Unchanged on both sides of the clock reading, so this was the heartbeat at that time, even
        # if this process was not running in between.
        if slot.heartbeat_ns == heartbeat_ns:
            oldest_ns = max(oldest_ns, now_ns - heartbeat_ns)
            longest_gap_ns = max(longest_gap_ns, now_ns - last_ns)
            last_ns = now_ns
        time.sleep(0.001)
    return Heartbeat(oldest_ns, longest_gap_ns)


def _probe(programs: Programs, sock: socket.socket) -> int:
    """Ping the idle worker, which has to answer every ping; the number of pings."""
    with running(_ping_command(programs, sock, PROBE_S)) as child:
        said = orjson.loads(answer("the client", child))
    if said["answered"] != said["sent"]:
        raise BenchmarkError(f"an idle worker answered {said['answered']} of {said['sent']} pings")
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
    # It sleeps between its pings, because it shares a CPU with the flood.
    command = [programs.path("ping"), "-b", "-s", str(seconds), "-w", str(WAIT_TIMEOUT_S)]
    return [*command, "-r", str(PINGS_PER_SECOND), datagram("PING").hex(), str(port_of(sock))]


def waited_seconds(pid: int) -> float:
    """Time in which a process was ready to run and did not (Documentation/scheduler/sched-stats)."""
    _, waited_ns, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    return int(waited_ns) / 1e9


class _Snapshot:
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

    def changes_since(self, before: _Snapshot) -> Iterator[str]:
        for name, value in self._state.items():
            if value != before._state[name]:
                yield f"{name} was {before._state[name]} and is {value}"
