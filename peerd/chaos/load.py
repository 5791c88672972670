"""Sequence-numbered datagrams to many ports, and an exact account of what is missing of them.

What a peer owes a client is that each number comes back once and in order. What it may lose it has to
report: so the numbers that are missing are compared with what it says that its deaths have cost
(``lost_in_flight``) and what its socket had no room for (``rx_dropped``).
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from peerd.chaos.streams import Count
from peerd.errors import PeerdError

PATIENCE_S = 30.0
"""For an answer that should come at once."""


class LoadError(PeerdError):
    """The process that sends and receives has ended early (its traceback is on standard error), or hangs."""


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
    """Sends from its beginning to ``finish()``, for a ``with`` block. Any thread may ask it anything."""

    def __init__(
        self,
        ports: Iterable[int],
        *,
        rate: float,
        clients: int = 4,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """``rate``: datagrams a second, of all clients to all ports together; 0 for none yet."""
        self._ports = list(ports)
        self._rate = rate
        self._clients = clients
        self._patience_s = patience_s
        self._asking = threading.Lock()
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

    def send(self, port: int, magic: str) -> bool:
        """One number with another magic code, which counts like all others. False when the port is not
        sent to."""
        return bool(self._ask("send", port=port, magic=magic)["sent"])

    def report(self) -> LoadReport:
        """So far: what is under way is missing."""
        return _report(self._ask("report"))

    def finish(self, timeout_s: float = 30.0) -> LoadReport:
        """Send no more, and wait until everything is answered or cannot come any more."""
        return _report(self._ask("finish", timeout_s=timeout_s, patience_s=timeout_s))

    def _ask(self, command: str, *, patience_s: float = 0.0, **arguments: object) -> Any:
        """``patience_s``: what the answer may take by itself."""
        assert self._process is not None
        assert self._process.stdin is not None
        with self._asking:
            try:
                self._process.stdin.write(orjson.dumps({"do": command, **arguments}) + b"\n")
                self._process.stdin.flush()
                answer = _read_line(self._process, patience_s + self._patience_s)
            except BrokenPipeError:
                answer = b""
            except TimeoutError as error:
                # An answer that comes late would be taken for that to the next question.
                self._process.kill()
                raise LoadError(f"the load's process {error}") from None
        if not answer:
            raise LoadError("the load's process has ended early: its traceback is above")
        return orjson.loads(answer)


def _read_line(process: subprocess.Popen[bytes], within_s: float) -> bytes:
    """Empty at the process's end."""
    assert process.stdout is not None
    until_s = time.monotonic() + within_s
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, until_s - time.monotonic()) * 1e3):
            raise TimeoutError(f"does not answer within {within_s:g} s")
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        if not chunk:
            return b""
        line += chunk
    return line


def _report(answer: dict[str, Any]) -> LoadReport:
    counts = tuple(Count(**count) for count in answer.pop("streams"))
    return LoadReport(counts, **answer)
