"""Sequence-numbered datagrams to many ports, and an exact account of the missing ones.

A peer guarantees a client that each number comes back once and in order. It has to report its losses, so
the missing numbers are compared with those that its deaths have cost (``lost_in_flight``) and those that
its socket had no room for (``rx_dropped``).
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing.connection import Pipe
from typing import Any

from peerd.errors import PeerdError
from peerd_chaos.accounts import LoadReport

PATIENCE_S = 30.0  # For an answer that should take no time


class LoadError(PeerdError):
    """The load's process has exited early (its traceback is on standard error), or hangs."""


class Load:
    """A context manager that sends until ``finish()``. Its methods may be called from any thread."""

    def __init__(
        self, ports: Iterable[int], *, rate: float, clients: int = 4, patience_s: float = PATIENCE_S
    ) -> None:
        """``rate``: datagrams per second of all clients to all ports; 0 for none yet."""
        self._ports = list(ports)
        self._rate = rate
        self._clients = clients
        self._patience_s = patience_s
        self._asking = threading.Lock()
        self._paced_s = time.monotonic()
        self._due_before = 0.0  # Datagrams that were due when the rate was last set

    @property
    def due(self) -> float:
        """Datagrams that should have been sent at the rates so far."""
        return self._due_before + self._rate * (time.monotonic() - self._paced_s)

    def __enter__(self) -> Load:
        self._pipe, childs_end = Pipe()
        with childs_end:
            arguments = map(str, (childs_end.fileno(), self._clients, self._rate))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "peerd_chaos.load_process", *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[childs_end.fileno()],
            )
        try:
            self.add(self._ports)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def add(self, ports: Iterable[int]) -> None:
        """Send to these ports as well. A port that was sent to before continues its numbers."""
        self._ask("add", list(ports))

    def remove(self, ports: Iterable[int]) -> None:
        """Stop sending to these ports before this returns. Their answers are still counted."""
        self._ask("remove", list(ports))

    def pace(self, rate: float) -> None:
        self._due_before, self._rate, self._paced_s = self.due, rate, time.monotonic()
        self._ask("pace", rate)

    def send(self, port: int, magic: str) -> bool:
        """Send one number with another magic code. False for a port that is not sent to."""
        return bool(self._ask("send", port, magic))

    def report(self) -> LoadReport:
        """The account so far. Datagrams under way count as missing."""
        report: LoadReport = self._ask("report")
        return report

    def finish(self, timeout_s: float = 30.0) -> LoadReport:
        """Stop sending, and wait until every answer has arrived or can no longer arrive."""
        report: LoadReport = self._ask("finish", timeout_s, takes_s=timeout_s)
        return report

    def _ask(self, command: str, *arguments: object, takes_s: float = 0.0) -> Any:
        """``takes_s``: how long the command itself may take."""
        within_s = takes_s + self._patience_s
        with self._asking:
            try:
                self._pipe.send((command, arguments))
                if self._pipe.poll(within_s):
                    return self._pipe.recv()
            except (EOFError, ConnectionError):
                why = "the load's process has exited early: its traceback is above"
                raise LoadError(why) from None
            # A late answer would be taken for the answer to the next command.
            self._process.kill()
        raise LoadError(f"the load's process does not answer within {within_s:g} s")
