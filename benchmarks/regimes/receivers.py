"""The receivers that are compared, and how each is started, measured and stopped.

A receiver is a child process that inherits bound sockets. It writes ``ready`` to stdout when it serves
them, followed by the pids of its workers if it has any. It serves until the end of its stdin and then
writes one line of JSON with the number of ``messages`` that it has counted. Its stdin also ends when the
benchmark is killed, so no receiver outlives it.

To add a receiver, write it in other_receivers.py or reference.c and add it to the tables below.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Literal

import orjson

from bench.children import BenchmarkError, answer, cpu_seconds, running
from udp.programs import Programs

Role = Literal["count", "echo"]


@dataclass(frozen=True)
class Receiver:
    title: str
    kind: Literal["peerd", "other", "c"]
    does: str  # Its name among the receivers of its kind
    needs: str | None = None  # A package that has to be installed
    linger_us: int | None = None  # peerd only; None: its default
    offload: bool = True  # peerd only

    @property
    def available(self) -> bool:
        return self.needs is None or find_spec(self.needs) is not None

    def command(self, role: Role, programs: Programs) -> list[str]:
        if self.kind == "c":
            return [programs.path("reference"), self.does]
        if self.kind == "other":
            return [sys.executable, "-m", "regimes.other_receivers", self.does, role]
        linger = "default" if self.linger_us is None else str(self.linger_us)
        arguments = [f"regimes.apps:{self.does}", linger, str(int(self.offload))]
        return [sys.executable, "-m", "udp.peerd_workers", *arguments]


def peerd(title: str, does: str) -> Receiver:
    return Receiver(f"peerd, {title}", "peerd", does)


def other(name: str, title: str) -> Receiver:
    return Receiver(title, "other", name, needs=None if name in ("recvfrom", "asyncio") else name)


COUNTING: dict[str, Receiver] = {
    "peerd": peerd("per message", "counting"),
    "peerd-batch": peerd("batch", "counting_batch"),
    "peerd-async": peerd("async def", "counting_async"),
    "c-gro": Receiver("C recvmmsg, GRO", "c", "count-gro"),
    "c": Receiver("C recvmmsg", "c", "count"),
    "recvfrom": other("recvfrom", "socket.recvfrom loop"),
    "rloop": other("rloop", "rloop"),
    "uvloop": other("uvloop", "uvloop"),
    "aiofastnet": other("aiofastnet", "aiofastnet"),
    "asyncio": other("asyncio", "asyncio"),
}

ON_MANY_SOCKETS: dict[str, Receiver] = {
    "peerd": peerd("8 workers", "counting"),
    "c": Receiver("C epoll + recvmmsg", "c", "count-epoll"),
    **{name: COUNTING[name] for name in ("rloop", "uvloop", "aiofastnet", "asyncio")},
}

ECHOING: dict[str, Receiver] = {
    "peerd": peerd("per message", "echo"),
    "peerd-async": peerd("async def", "echo_async"),
    "c-gro": Receiver("C with GRO and GSO", "c", "echo-gro"),
    "c": Receiver("C recvfrom + sendto", "c", "echo"),
    "recvfrom": other("recvfrom", "socket.recvfrom + sendto"),
    **{name: COUNTING[name] for name in ("rloop", "uvloop", "aiofastnet", "asyncio")},
}


def without_offload(receivers: dict[str, Receiver]) -> dict[str, Receiver]:
    return {name: replace(receiver, offload=False) for name, receiver in receivers.items()}


def with_lingers(receivers: dict[str, Receiver], lingers_us: Sequence[int]) -> dict[str, Receiver]:
    """Add peerd with each of these linger times, behind peerd with its default."""
    default = receivers["peerd"]
    lingering = {
        f"peerd-linger-{us}": replace(
            default, title=f"{default.title}, linger {us} us", linger_us=us
        )
        for us in lingers_us
    }
    others = {name: receiver for name, receiver in receivers.items() if name != "peerd"}
    return {"peerd": default, **lingering, **others}


@dataclass(frozen=True)
class Serving:
    title: str
    child: subprocess.Popen[bytes]
    pids: list[int] = field(default_factory=list)

    def cpu_s(self) -> float:
        return cpu_seconds(self.pids)

    def check_alive(self) -> None:
        if self.child.poll() is not None:
            raise BenchmarkError(f"{self.title} exited (its error is above)")

    def stop(self) -> int:
        """Stop it, and return how many messages it has counted."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        messages: int = orjson.loads(answer(self.title, self.child))["messages"]
        return messages


@contextlib.contextmanager
def serving(
    receiver: Receiver,
    role: Role,
    socks: Sequence[socket.socket],
    programs: Programs,
    cpu: int | None,
) -> Iterator[Serving]:
    fds = [sock.fileno() for sock in socks]
    command = [*receiver.command(role, programs), *map(str, fds)]
    with running(command, stdin=subprocess.PIPE, pass_fds=fds, cpu=cpu) as child:
        ready, *pids = answer(receiver.title, child).split()
        if ready != b"ready":
            raise BenchmarkError(f"{receiver.title} did not start (its error is above)")
        yield Serving(receiver.title, child, [int(pid) for pid in pids] or [child.pid])
