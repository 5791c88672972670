"""One measurement of throughput: one receiver in a process of its own, one sender, what became of it.

The sockets are made here and inherited by the receiver. So this process sees through SO_MEMINFO when
the queues are empty and how much the kernel dropped, and every datagram is accounted for:

    sent = delivered + dropped by the kernel

The clock runs from the first send until the queues are empty. What waits in the buffers when the
sender stops is therefore not given away, and no receiver has to read a clock for each message. For
an echo it runs until the last reply instead, and what counts is the replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from children import ANSWER_LIMIT_S, answer, running
from datagrams import SEGMENTS, datagram
from machine import Cpus
from noise import QUIET, Watch
from programs import Programs
from receivers import Receiver, Role, serving
from sockets import bound_sockets, dropped, port_of, takes_joined, wait_until_empty

PEERS = 8
THIN_RATE = 200_000
"""Datagrams a second to all peers together where traffic is spread thin."""

ECHO_WINDOW = 64 * SEGMENTS
"""Requests under way at most when an echo server is saturated."""


@dataclass(frozen=True)
class Bench:
    """What all measurements of a run have in common."""

    programs: Programs
    cpus: Cpus
    seconds: float


@dataclass(frozen=True)
class Subject:
    """What is measured: a receiver, in a regime, in a round."""

    regime: str
    name: str
    receiver: Receiver
    round: int


@dataclass(frozen=True)
class Throughput:
    regime: str
    receiver: str
    round: int
    sent: int
    sender_s: float
    sender_cpu_s: float
    send_errors: int
    delivered: int
    """What reached the receiver's handler."""

    answered: int | None
    """What came back; None where nothing is to."""

    kernel_drops: int
    window_s: float
    """From the first send until the queues were empty, or the last reply was there."""

    receiver_cpu_s: float
    """User and system time of the receiver's processes in that time."""

    others: float
    """The share of all CPUs that somebody else used meanwhile."""

    @property
    def counted(self) -> int:
        return self.delivered if self.answered is None else self.answered

    @property
    def rate(self) -> float:
        return self.counted / self.window_s

    @property
    def offered_rate(self) -> float:
        return self.sent / self.sender_s

    @property
    def cpu_ns(self) -> float:
        return self.receiver_cpu_s / max(self.delivered, 1) * 1e9

    @property
    def loss(self) -> float:
        return 1 - self.counted / self.sent

    @property
    def busy(self) -> float:
        return self.receiver_cpu_s / self.window_s

    @property
    def unaccounted(self) -> int:
        return self.sent - self.delivered - self.kernel_drops

    @property
    def limited_by(self) -> str:
        if self.busy >= 0.9:
            return "receiver"
        # With time left and nothing lost, a faster sender would have shown more.
        return "sender" if self.counted == self.sent else "unclear"

    @property
    def disturbed(self) -> bool:
        return self.others > QUIET


@dataclass(frozen=True)
class Load:
    """What the sender says of itself."""

    sent: int
    started_ns: int
    seconds: float
    errors: int
    cpu_s: float
    answered: int | None = None


def measure_stream(bench: Bench, subject: Subject) -> Throughput:
    """One socket; each send carries SEGMENTS datagrams."""
    command = [bench.programs.path("load"), "-g", str(SEGMENTS)]
    return _measure(bench, subject, "count", 1, command, SEGMENTS)


def measure_interleaved(bench: Bench, subject: Subject) -> Throughput:
    """Eight sockets, one plain datagram to each in turn."""
    return _measure(bench, subject, "count", PEERS, [bench.programs.path("load")], 1)


def measure_thin(bench: Bench, subject: Subject) -> Throughput:
    """The same at THIN_RATE, which leaves the receivers time to sleep in between."""
    command = [bench.programs.path("load"), "-r", str(THIN_RATE)]
    return _measure(bench, subject, "count", PEERS, command, 1)


def measure_echo(bench: Bench, subject: Subject) -> Throughput:
    """A client that keeps ECHO_WINDOW requests under way, SEGMENTS a send."""
    command = [bench.programs.path("echo_load"), "-g", str(SEGMENTS), "-w", str(ECHO_WINDOW)]
    return _measure(bench, subject, "echo", 1, command, SEGMENTS)


def _measure(
    bench: Bench, subject: Subject, role: Role, sockets: int, sender: list[str], joined: int
) -> Throughput:
    """``joined``: how many datagrams the sender puts into a send."""
    with (
        bound_sockets(sockets) as socks,
        serving(subject.receiver, role, socks, bench.programs, bench.cpus.receiver) as server,
    ):
        drops_before = [dropped(sock) for sock in socks]
        watch = Watch()
        cpu_before_s = server.cpu_s()
        ports = [str(port_of(sock)) for sock in socks]
        load = run_sender(
            [*sender, "-s", str(bench.seconds), datagram().hex(), *ports], bench.seconds
        )
        drained_ns = wait_until_empty(socks, server.check_alive)
        receiver_cpu_s = server.cpu_s() - cpu_before_s
        others = watch.others(receiver_cpu_s + load.cpu_s)
        # Joined datagrams that find no room are one drop to the kernel, however many they are. On
        # loopback they are those of one send.
        a_drop = joined if takes_joined(socks[0]) else 1
        delivered = server.stop()
        drops = sum(
            (dropped(sock) - before) % 2**32
            for sock, before in zip(socks, drops_before, strict=True)
        )
    return Throughput(
        regime=subject.regime,
        receiver=subject.name,
        round=subject.round,
        sent=load.sent,
        sender_s=load.seconds,
        sender_cpu_s=load.cpu_s,
        send_errors=load.errors,
        delivered=delivered,
        answered=load.answered,
        kernel_drops=drops * a_drop,
        window_s=load.seconds if role == "echo" else (drained_ns - load.started_ns) / 1e9,
        receiver_cpu_s=receiver_cpu_s,
        others=others,
    )


def run_sender(command: Sequence[str], seconds: float) -> Load:
    """It inherits this process's CPU."""
    with running(command) as child:
        said = answer("the load generator", child, ANSWER_LIMIT_S + seconds)
    return Load(**orjson.loads(said))
