"""Sequence-numbered datagrams to many ports, and an exact account of the missing ones.

A peer guarantees a client that each number comes back once and in order. It has to report its losses, so
the missing numbers are compared with those that its deaths have cost (``lost_in_flight``) and those that
its socket had no room for (``rx_dropped``).
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

from peerd.errors import PeerdError
from peerd_chaos.accounts import Count

PATIENCE_S = 30.0
"""For an answer that should take no time."""


class LoadError(PeerdError):
    """The load's process has exited early (its traceback is on standard error), or hangs."""


@dataclass(frozen=True)
class LoadReport:
    counts: tuple[Count, ...]
    """One per client and port."""

    dropped: int
    """Answers that the clients' own buffers had no room for. Above 0, the loss does not indict the peers."""

    foreign: int
    """Answers to datagrams that were never sent."""

    finished: bool
    """Every datagram was answered or overtaken by later answers; only then is the loss final."""

    def of(self, port: int | None = None) -> Count:
        """The sum over the clients of a port, or of all ports; ``client`` is how many counts there are."""
        counts = [count for count in self.counts if port in (None, count.port)]
        return Count(
            client=len(counts),
            port=port or 0,
            sent=sum(count.sent for count in counts),
            received=sum(count.received for count in counts),
            missing=sum(count.missing for count in counts),
            doubled=sum(count.doubled for count in counts),
            out_of_order=sum(count.out_of_order for count in counts),
        )

    @property
    def sent(self) -> int:
        return self.of().sent

    @property
    def missing(self) -> int:
        return self.of().missing

    @property
    def doubled(self) -> int:
        return self.of().doubled

    @property
    def out_of_order(self) -> int:
        return self.of().out_of_order


class Load:
    """A context manager that sends until ``finish()``. Its methods may be called from any thread."""

    def __init__(
        self,
        ports: Iterable[int],
        *,
        rate: float,
        clients: int = 4,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """``rate``: datagrams per second of all clients to all ports; 0 for none yet."""
        self._ports = list(ports)
        self._rate = rate
        self._clients = clients
        self._patience_s = patience_s
        self._asking = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._paced_s = time.monotonic()
        self._due_before = 0.0
        """Datagrams that were due when the rate was last set."""

    @property
    def due(self) -> float:
        """Datagrams that should have been sent at the rates so far."""
        return self._due_before + self._rate * (time.monotonic() - self._paced_s)

    def __enter__(self) -> Load:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "peerd_chaos.load_process", str(self._clients), str(self._rate)],
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
        """Send to these ports as well. A port that was sent to before continues its numbers."""
        self._ask("add", ports=list(ports))

    def remove(self, ports: Iterable[int]) -> None:
        """Stop sending to these ports before this returns. Their answers are still counted."""
        self._ask("remove", ports=list(ports))

    def pace(self, rate: float) -> None:
        """Set the rate, in datagrams per second to all ports."""
        self._due_before, self._rate, self._paced_s = self.due, rate, time.monotonic()
        self._ask("pace", rate=rate)

    def send(self, port: int, magic: str) -> bool:
        """Send one number with another magic code. False for a port that is not sent to."""
        return bool(self._ask("send", port=port, magic=magic)["sent"])

    def report(self) -> LoadReport:
        """The account so far. Datagrams under way count as missing."""
        return _report(self._ask("report"))

    def finish(self, timeout_s: float = 30.0) -> LoadReport:
        """Stop sending, and wait until every answer has arrived or can no longer arrive."""
        return _report(self._ask("finish", timeout_s=timeout_s, patience_s=timeout_s))

    def _ask(self, command: str, *, patience_s: float = 0.0, **arguments: object) -> Any:
        """``patience_s``: how long the command itself may take."""
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
                # A late answer would be taken for the answer to the next command.
                self._process.kill()
                raise LoadError(f"the load's process {error}") from None
        if not answer:
            raise LoadError("the load's process has exited early: its traceback is above")
        return orjson.loads(answer)


def _read_line(process: subprocess.Popen[bytes], within_s: float) -> bytes:
    """Empty once the process has exited."""
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
