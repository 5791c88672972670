"""What the trials of the registry benchmark share: who takes part, and the clients' processes.

A client that fails, hangs or dies is a result, not an end of the benchmark.
"""

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

from children import BenchmarkError, answer, cpu_seconds, running
from progress import Progress
from registry_clients import CLIENTS, FOR_LISTINGS

CHILD = Path(__file__).with_name("registry_child.py")
START_LIMIT_S = 20.0
COMMAND_LIMIT_S = 15.0
END_LIMIT_S = 1.0


@dataclass(frozen=True)
class Bench:
    folder: Path
    """For the clients' logs."""

    seconds: float
    """Of each client's keep-alives."""

    progress: Progress


class Child:
    """A client in a process of its own."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.failure = ""
        """Why it can no longer be asked."""

        self._process = process
        self._log = log

    def ask(self, do: str, limit_s: float = COMMAND_LIMIT_S, **arguments: object) -> dict[str, Any]:
        """The answer; what the client raised, or that it hangs, is ``error`` in it."""
        self.tell(do, **arguments)
        return self.answer(limit_s)

    def tell(self, do: str, **arguments: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says so
            self._process.stdin.write(orjson.dumps({"do": do} | arguments) + b"\n")
            self._process.stdin.flush()

    def answer(self, limit_s: float = COMMAND_LIMIT_S) -> dict[str, Any]:
        if not self.failure:
            try:
                given: dict[str, Any] = orjson.loads(answer(self.name, self._process, limit_s))
            except BenchmarkError:
                self.failure = "hangs" if self._process.poll() is None else self._last_words()
            else:
                return given
        return {"error": self.failure}

    def cpu_s(self) -> float:
        """User and system time so far; what it was when last asked, once it has ended."""
        return cpu_seconds([self._process.pid]) if self._process.poll() is None else 0.0

    def connections(self, ports: Sequence[int]) -> int:
        """Its TCP connections to these ports of ours that are up."""
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
    """A client that knows these endpoints, ready for commands unless it has a ``failure``."""
    log = bench.folder / f"{name}.log"
    command = [sys.executable, str(CHILD), name, str(log), *endpoints]
    with running(command, stdin=subprocess.PIPE) as process:
        child = Child(name, process, log)
        child.answer(START_LIMIT_S)
        try:
            yield child
        finally:
            # Politely first, so that a child of its own does not outlive it.
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                process.stdin.close()
                process.wait(END_LIMIT_S)


def title(name: str) -> str:
    return (CLIENTS | FOR_LISTINGS)[name].title
