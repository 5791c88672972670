"""One measurement of throughput: one receiver process, one sender, and an account of every datagram.

The receiver inherits its sockets from this process, which reads from SO_MEMINFO when the queues are
empty and how much the kernel dropped. So every datagram is accounted for:

    sent = delivered + dropped by the kernel

The clock runs from the first send until the queues are empty. So the datagrams that are queued when the
sender stops count too, and no receiver has to read a clock per message. For an echo the clock runs until
the last reply, and the replies are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from bench.children import ANSWER_TIMEOUT_S, answer, running
from bench.machine import Cpus
from bench.noise import QUIET, Watch
from regimes.receivers import Receiver, Role, serving
from udp.envelope import SEGMENTS, datagram
from udp.programs import Programs
from udp.udp_sockets import bound_sockets, dropped, port_of, takes_joined, wait_until_empty

PEERS = 8
THIN_RATE = 200_000  # Datagrams per second to all peers in the regime of thin traffic
ECHO_WINDOW = 64 * SEGMENTS  # The most requests under way when an echo server is saturated


@dataclass(frozen=True)
class RunSettings:
    programs: Programs
    cpus: Cpus
    seconds: float


@dataclass(frozen=True)
class Subject:
    regime: str
    name: str
    receiver: Receiver
    round: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    regime: str
    receiver: str
    round: int
    sent: int
    receiver_cpu_s: float  # User and system time of the receiver's processes
    others: float  # The share of all CPUs that other processes used meanwhile

    @property
    def disturbed(self) -> bool:
        return self.others > QUIET


@dataclass(frozen=True, kw_only=True)
class Throughput(Measured):
    sender_s: float
    sender_cpu_s: float
    send_errors: int
    delivered: int  # Datagrams that reached the receiver's handler
    answered: int | None  # Replies; None for a receiver that does not reply
    kernel_drops: int
    window_s: float  # From the first send until the queues were empty, or until the last reply

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
        # The receiver had time left and lost nothing: a faster sender would show more.
        return "sender" if self.counted == self.sent else "unclear"


@dataclass(frozen=True)
class Sent:
    sent: int
    started_ns: int
    seconds: float
    errors: int
    cpu_s: float
    answered: int | None = None


@dataclass(frozen=True, kw_only=True)
class Traffic:
    role: Role
    sockets: int
    sender: str  # A C program and its options
    joined: int  # Datagrams per send


STREAM = Traffic(role="count", sockets=1, sender=f"load -g {SEGMENTS}", joined=SEGMENTS)
INTERLEAVED = Traffic(role="count", sockets=PEERS, sender="load", joined=1)
"""One plain datagram to each socket in turn."""

THIN = Traffic(role="count", sockets=PEERS, sender=f"load -r {THIN_RATE}", joined=1)
"""The same at THIN_RATE, at which the receivers sleep in between."""

ECHO = Traffic(
    role="echo", sockets=1, sender=f"echo_load -g {SEGMENTS} -w {ECHO_WINDOW}", joined=SEGMENTS
)
"""A client that keeps ECHO_WINDOW requests under way, SEGMENTS per send."""


def measure(traffic: Traffic, run: RunSettings, subject: Subject) -> list[Throughput]:
    program, *options = traffic.sender.split()
    with (
        bound_sockets(traffic.sockets) as socks,
        serving(subject.receiver, traffic.role, socks, run.programs, run.cpus.receiver) as server,
    ):
        drops_before = [dropped(sock) for sock in socks]
        watch = Watch()
        cpu_before_s = server.cpu_s()
        ports = [str(port_of(sock)) for sock in socks]
        command = [run.programs.path(program), *options, "-s", str(run.seconds)]
        sent = run_sender([*command, datagram().hex(), *ports], run.seconds)
        drained_ns = wait_until_empty(socks, server.check_alive)
        receiver_cpu_s = server.cpu_s() - cpu_before_s
        others = watch.others(receiver_cpu_s + sent.cpu_s)
        # The kernel counts joined datagrams that it drops as one. On loopback they are those of
        # one send.
        datagrams_per_drop = traffic.joined if takes_joined(socks[0]) else 1
        delivered = server.stop()
        drops = sum(
            (dropped(sock) - before) % 2**32
            for sock, before in zip(socks, drops_before, strict=True)
        )
    result = Throughput(
        regime=subject.regime,
        receiver=subject.name,
        round=subject.round,
        sent=sent.sent,
        sender_s=sent.seconds,
        sender_cpu_s=sent.cpu_s,
        send_errors=sent.errors,
        delivered=delivered,
        answered=sent.answered,
        kernel_drops=drops * datagrams_per_drop,
        window_s=sent.seconds if traffic.role == "echo" else (drained_ns - sent.started_ns) / 1e9,
        receiver_cpu_s=receiver_cpu_s,
        others=others,
    )
    return [result]


def run_sender(command: Sequence[str], seconds: float) -> Sent:
    """The sender inherits this process's CPU."""
    with running(command) as child:
        said = answer("the load generator", child, ANSWER_TIMEOUT_S + seconds)
    return Sent(**orjson.loads(said))
