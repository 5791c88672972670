"""The clients' processes. A client that fails, hangs or dies is a result, not the end of the benchmark."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import psutil

from bench.children import cpu_seconds, running
from etcd_clients.clients import CLIENTS, LISTING_CLIENTS

START_TIMEOUT_S = 20.0
COMMAND_TIMEOUT_S = 15.0
EXIT_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Bench:
    clients: Sequence[str]
    folder: Path  # For the clients' logs
    seconds: float  # How long each client keeps its leases


class Child:
    def __init__(
        self, name: str, process: subprocess.Popen[bytes], pipe: Connection, log: Path
    ) -> None:
        self.name = name
        self.failure = ""  # Why it no longer accepts commands
        self._process = process
        self._pipe = pipe
        self._log = log

    def ask(
        self, do: str, timeout_s: float = COMMAND_TIMEOUT_S, **arguments: object
    ) -> dict[str, Any]:
        """The answer. It contains ``error`` if the client raised one, hangs or has died."""
        self.send(do, **arguments)
        return self.answer(timeout_s)

    def send(self, do: str, **arguments: object) -> None:
        with contextlib.suppress(ConnectionError):  # answer() reports it
            self._pipe.send((do, arguments))

    def answer(self, timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, Any]:
        if not self.failure:
            try:
                if self._pipe.poll(timeout_s):
                    answer: dict[str, Any] = self._pipe.recv()
                    return answer
                self.failure = "hangs"
            except (EOFError, ConnectionError):
                self.failure = self._last_words()
        return {"error": self.failure}

    def cpu_s(self) -> float:
        """User and system time so far; 0 once it has exited."""
        return cpu_seconds([self._process.pid]) if self._process.poll() is None else 0.0

    def connections(self, ports: Sequence[int]) -> int:
        """Its established TCP connections to these ports."""
        if self._process.poll() is not None:
            return 0
        return sum(
            connection.status == psutil.CONN_ESTABLISHED and connection.raddr.port in ports
            for connection in psutil.Process(self._process.pid).net_connections("tcp")
            if connection.raddr
        )

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().split("\n")
        return f"died: {lines[-1]}"


@contextlib.contextmanager
def started(bench: Bench, name: str, endpoints: Sequence[str]) -> Iterator[Child]:
    """A client with these endpoints, ready for commands unless it has a ``failure``."""
    log = bench.folder / f"{name}.log"
    pipe, childs_end = Pipe()
    fd = childs_end.fileno()
    command = [sys.executable, "-m", "etcd_clients.client_child", name, str(fd), *endpoints]
    with log.open("ab") as output, running(command, output=output, pass_fds=[fd]) as process:
        childs_end.close()
        child = Child(name, process, pipe, log)
        child.answer(START_TIMEOUT_S)
        try:
            yield child
        finally:
            # An orderly exit first, so that a child of its own does not outlive it.
            pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_TIMEOUT_S)


def title(name: str) -> str:
    return (CLIENTS | LISTING_CLIENTS)[name].title
