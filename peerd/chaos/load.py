"""Sequence-numbered datagrams to many ports, and an exact account of what is missing of them.

What a peer owes a client is that each number comes back once and in order. What it may lose it has to
report: so the numbers that are missing are compared with what it says that its deaths have cost
(``lost_in_flight``) and what its socket had no room for (``rx_dropped``).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from peerd.chaos.streams import Count
from peerd.errors import PeerdError


class LoadError(PeerdError):
    """The process that sends and receives has ended early: its traceback is on standard error."""


@dataclass(frozen=True)
class LoadReport:
    counts: tuple[Count, ...]
    """One for each client and port."""

    dropped: int
    """What the clients' own buffers had no room for. Above 0, the loss says nothing of the peers."""

    foreign: int
    """Answers to what was never asked."""

    finished: bool
    """Everything was answered or passed over by later answers; only a finished load's loss is final."""

    def of(self, port: int) -> Count:
        """All clients of a port together; their number is in ``client``."""
        counts = [count for count in self.counts if count.port == port]
        return Count(
            client=len(counts),
            port=port,
            sent=sum(count.sent for count in counts),
            received=sum(count.received for count in counts),
            missing=sum(count.missing for count in counts),
            doubled=sum(count.doubled for count in counts),
            out_of_order=sum(count.out_of_order for count in counts),
        )

    @property
    def sent(self) -> int:
        return sum(count.sent for count in self.counts)

    @property
    def missing(self) -> int:
        return sum(count.missing for count in self.counts)

    @property
    def doubled(self) -> int:
        return sum(count.doubled for count in self.counts)

    @property
    def out_of_order(self) -> int:
        return sum(count.out_of_order for count in self.counts)


class Load:
    """Sends from its beginning to ``finish()``, for a ``with`` block."""

    def __init__(self, ports: Iterable[int], *, rate: float, clients: int = 4) -> None:
        """``rate``: datagrams a second, of all clients to all ports together; 0 for none yet."""
        self._ports = list(ports)
        self._rate = rate
        self._clients = clients
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Load:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "peerd.chaos.client", str(self._clients), str(self._rate)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self.add(self._ports)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def add(self, ports: Iterable[int]) -> None:
        """Send to these as well, on with their numbers if they were sent to before."""
        self._ask("add", ports=list(ports))

    def remove(self, ports: Iterable[int]) -> None:
        """When this returns, nothing is sent to them any more; answers are still taken."""
        self._ask("remove", ports=list(ports))

    def pace(self, rate: float) -> None:
        self._ask("pace", rate=rate)

    def send(self, port: int, magic: str) -> None:
        """One number with another magic code, which counts like all others."""
        self._ask("send", port=port, magic=magic)

    def report(self) -> LoadReport:
        """So far: what is under way is missing."""
        return _report(self._ask("report"))

    def finish(self, timeout_s: float = 30.0) -> LoadReport:
        """Send no more, and wait until everything is answered or cannot come any more."""
        return _report(self._ask("finish", timeout_s=timeout_s))

    def _ask(self, command: str, **arguments: object) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(orjson.dumps({"do": command, **arguments}) + b"\n")
            self._process.stdin.flush()
            return orjson.loads(self._process.stdout.readline())
        except (BrokenPipeError, orjson.JSONDecodeError):
            raise LoadError("the load's process has ended early: its traceback is above") from None


def _report(answer: dict[str, Any]) -> LoadReport:
    counts = tuple(Count(**count) for count in answer.pop("streams"))
    return LoadReport(counts, **answer)
