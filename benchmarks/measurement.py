"""One measurement: one receiver in a process of its own, one load generator, and what became of it.

The socket is made here and inherited by the receiver. So this process sees through SO_MEMINFO when
the queue is empty and how much the kernel dropped, and every datagram is accounted for:

    sent = delivered + dropped by the kernel

The clock runs from the first send until the queue is empty. What waits in the buffer when the
generator stops is therefore not given away, and no receiver has to read a clock for each message.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from machine import Cpus
from peerd._core import encode
from receivers import MAGIC, Report

HERE = Path(__file__).parent
DATAGRAM_BYTES = 64
SEGMENTS = 64  # datagrams in one send; the most that every Linux takes (UDP_MAX_SEGMENTS)
BUFFER_BYTES = 64 << 20  # what every receiver's socket asks for
ANSWER_LIMIT_S = 15.0
DRAIN_LIMIT_S = 60.0

# asm-generic/socket.h and linux/sock_diag.h; Python's socket module does not have them.
SO_RCVBUFFORCE = 33
SO_MEMINFO = 55
SK_MEMINFO = struct.Struct("@9I")
SK_MEMINFO_RMEM_ALLOC = 0
SK_MEMINFO_DROPS = 8


class BenchmarkError(Exception):
    """The benchmark cannot go on; the text is for the user."""


@dataclass(frozen=True)
class Load:
    """What the generator says of itself."""

    sent: int
    started_ns: int
    seconds: float
    errors: int
    cpu_s: float


@dataclass(frozen=True)
class Measurement:
    receiver: str
    round: int
    load: Load
    delivered: int
    kernel_drops: int
    window_s: float
    """From the first send until the receiver had emptied the queue."""
    receiver_cpu_s: float

    @property
    def rate(self) -> float:
        return self.delivered / self.window_s

    @property
    def offered_rate(self) -> float:
        return self.load.sent / self.load.seconds

    @property
    def cpu_ns(self) -> float:
        return self.receiver_cpu_s / max(self.delivered, 1) * 1e9

    @property
    def loss(self) -> float:
        return 1 - self.delivered / self.load.sent

    @property
    def busy(self) -> float:
        return self.receiver_cpu_s / self.window_s

    @property
    def unaccounted(self) -> int:
        return self.load.sent - self.delivered - self.kernel_drops

    @property
    def limited_by(self) -> str:
        if self.busy >= 0.9:
            return "receiver"
        # With time left and nothing lost, a faster sender would have shown more.
        return "sender" if self.delivered == self.load.sent else "unclear"


def measure(receiver: str, number: int, generator: Path, seconds: float, cpus: Cpus) -> Measurement:
    with bound_socket() as sock, receiver_process(receiver, sock, cpus) as child:
        drops_before = meminfo(sock)[SK_MEMINFO_DROPS]
        load = run_generator(generator, sock, seconds)
        drained_ns = wait_until_drained(receiver, sock, child)
        report = stop(receiver, child)
        drops = meminfo(sock)[SK_MEMINFO_DROPS] - drops_before
    return Measurement(
        receiver=receiver,
        round=number,
        load=load,
        delivered=report.messages,
        # Joined datagrams that find no room are one drop to the kernel, however many they are
        # (__udp_enqueue_schedule_skb in net/ipv4/udp.c). On loopback they are those of one send.
        kernel_drops=drops * SEGMENTS if report.joined else drops,
        window_s=(drained_ns - load.started_ns) / 1e9,
        receiver_cpu_s=report.cpu_s,
    )


def build_generator(folder: Path) -> Path:
    """Compile load.c. It takes a tenth of a second, so it is done anew for every run."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    generator = folder / "load"
    command = [*compiler, "-O2", "-Wall", "-Wextra", "-o", str(generator), str(HERE / "load.c")]
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise BenchmarkError(
            f"no C compiler for the load generator: {compiler[0]}: {error.strerror}. "
            "Install gcc, or name another with the environment variable CC"
        ) from None
    except subprocess.CalledProcessError:
        raise BenchmarkError("load.c does not compile (the compiler's errors are above)") from None
    return generator


def bound_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    try:
        # CAP_NET_ADMIN may go past net.core.rmem_max (socket(7)).
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    return sock


def granted_buffer_bytes() -> int:
    with bound_socket() as sock:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def meminfo(sock: socket.socket) -> tuple[int, ...]:
    return SK_MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, SK_MEMINFO.size))


@contextlib.contextmanager
def receiver_process(
    receiver: str, sock: socket.socket, cpus: Cpus
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(HERE / "receivers.py"), receiver, str(sock.fileno())]
    if cpus.receiver is not None:
        command.append(str(cpus.receiver))
    with running(command, stdin=subprocess.PIPE, pass_fds=(sock.fileno(),)) as child:
        if answer(receiver, child) != b"ready\n":
            raise BenchmarkError(f"{receiver} did not start (its error is above)")
        yield child


def run_generator(generator: Path, sock: socket.socket, seconds: float) -> Load:
    datagram = encode(MAGIC, "1.0", bytes(DATAGRAM_BYTES - len(encode(MAGIC, "1.0"))))
    port = sock.getsockname()[1]
    command = [str(generator), str(port), str(seconds), str(SEGMENTS), datagram.hex()]
    with running(command) as child:
        said = answer("the load generator", child, ANSWER_LIMIT_S + seconds)
    return Load(**orjson.loads(said))


def wait_until_drained(receiver: str, sock: socket.socket, child: subprocess.Popen[bytes]) -> int:
    """When the queue was empty, to about a millisecond, on the monotonic clock."""
    deadline = time.monotonic() + DRAIN_LIMIT_S
    while time.monotonic() < deadline:
        now = time.monotonic_ns()
        empty = meminfo(sock)[SK_MEMINFO_RMEM_ALLOC] == 0
        time.sleep(0.001)
        # Twice, since something may still be on its way from the generator into the queue.
        if empty and meminfo(sock)[SK_MEMINFO_RMEM_ALLOC] == 0:
            return now
        if child.poll() is not None:
            raise BenchmarkError(f"{receiver} died (its error is above)")
    raise BenchmarkError(f"{receiver} did not empty its queue in {DRAIN_LIMIT_S:.0f} s")


def stop(receiver: str, child: subprocess.Popen[bytes]) -> Report:
    assert child.stdin is not None
    child.stdin.close()
    return Report(**orjson.loads(answer(receiver, child)))


@contextlib.contextmanager
def running(
    command: list[str], *, stdin: int = subprocess.DEVNULL, pass_fds: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that has ended when the block is left, in whichever way."""
    with subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        pass_fds=pass_fds,
        # Ctrl-C at the terminal is for this process only; it ends its children itself.
        process_group=0,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def answer(name: str, child: subprocess.Popen[bytes], limit_s: float = ANSWER_LIMIT_S) -> bytes:
    """The child's next line."""
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], limit_s)[0]:
        raise BenchmarkError(f"{name} did not answer in {limit_s:.0f} s")
    line = child.stdout.readline()
    if not line:
        raise BenchmarkError(f"{name} ended without an answer (its error is above)")
    return line
