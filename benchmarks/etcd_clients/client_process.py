"""The clients' processes. A client that fails, hangs or dies is a result, not the end of the benchmark."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from bench.children import BenchmarkError, answer, cpu_seconds, running
from etcd_clients.clients import CLIENTS, LISTING_CLIENTS

START_TIMEOUT_S = 20.0
COMMAND_TIMEOUT_S = 15.0
EXIT_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Bench:
    clients: Sequence[str]
    folder: Path
    """For the clients' logs."""

    seconds: float
    """How long each client keeps its leases."""


class Child:
    """A client in its own process."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.failure = ""
        """Why it no longer accepts commands."""

        self._process = process
        self._log = log

    def ask(
        self, do: str, timeout_s: float = COMMAND_TIMEOUT_S, **arguments: object
    ) -> dict[str, Any]:
        """The answer. It contains ``error`` if the client raised one, hangs or has died."""
        self.send(do, **arguments)
        return self.answer(timeout_s)

    def send(self, do: str, **arguments: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # answer() reports it
            self._process.stdin.write(orjson.dumps({"do": do} | arguments) + b"\n")
            self._process.stdin.flush()

    def answer(self, timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, Any]:
        if not self.failure:
            try:
                given: dict[str, Any] = orjson.loads(answer(self.name, self._process, timeout_s))
            except BenchmarkError:
                self.failure = "hangs" if self._process.poll() is None else self._last_words()
            else:
                return given
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
    command = [sys.executable, "-m", "etcd_clients.client_child", name, str(log), *endpoints]
    with running(command, stdin=subprocess.PIPE) as process:
        child = Child(name, process, log)
        child.answer(START_TIMEOUT_S)
        try:
            yield child
        finally:
            # An orderly exit first, so that a child of its own does not outlive it.
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                process.stdin.close()
                process.wait(EXIT_TIMEOUT_S)


def title(name: str) -> str:
    return (CLIENTS | LISTING_CLIENTS)[name].title
