"""peerd workers as ``peerd supervise`` runs them: forked, one per socket, by peerd.serving.worker.

    python -m udp.peerd_workers APP LINGER_US|default OFFLOAD FD [FD ...]

As a program it is a receiver (regimes/receivers.py describes their protocol). soak.py and flood.py call
start_workers(), because they read the scoreboard while a worker runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson

from bench.children import BenchmarkError
from peerd._scoreboard import Scoreboard, Slot
from peerd.serving import worker
from peerd.settings import DatagramSettings, default_linger_us
from peerd.supervisor.processes import Child, spawn

DRAIN_TIMEOUT_S = 10.0

GetResult: TypeAlias = Callable[[], dict[str, Any]]  # Runs in a worker once its loop has ended


def main(app: str, linger: str, offload: str, *fds: str) -> None:
    # Ctrl-C belongs to the benchmark, which then ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The default of `peerd supervise` for this number of peers on one CPU.
    linger_us = default_linger_us(len(fds), 1) if linger == "default" else int(linger)
    settings = DatagramSettings(offload=offload == "1", linger_us=linger_us)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket(fileno=int(fd))) for fd in fds]
        workers = stack.enter_context(start_workers(socks, app, settings, counted_messages))
        print("ready", *(each.pid for each in workers), flush=True)
        sys.stdin.read()
        messages = sum(each.stop()["messages"] for each in workers)
        print(orjson.dumps({"messages": messages}).decode())


def counted_messages() -> dict[str, Any]:
    """How many messages the handlers of regimes/apps.py have received."""
    from regimes import apps

    return {"messages": apps.messages()}


@dataclass(frozen=True)
class Worker:
    child: Child
    slot: Slot
    results: int  # The reading end of the worker's pipe

    @property
    def pid(self) -> int:
        return self.child.pid

    def check_alive(self) -> None:
        if select.select([self.child.pidfd], [], [], 0)[0]:
            raise BenchmarkError(f"a worker exited: {self.child.wait()}")

    def stop(self) -> dict[str, Any]:
        """Stop it as the supervisor does, and return its result."""
        self.child.send(signal.SIGTERM)
        with open(self.results, "rb") as results:
            said = results.read()
        exit_ = self.child.wait()
        if exit_.code != 0:
            raise BenchmarkError(f"a worker exited: {exit_}")
        result: dict[str, Any] = orjson.loads(said)
        return result


@contextlib.contextmanager
def start_workers(
    socks: Sequence[socket.socket], app: str, settings: DatagramSettings, get_result: GetResult
) -> Iterator[list[Worker]]:
    """One worker per socket, all ready."""
    board = Scoreboard(len(socks))
    workers: list[Worker] = []
    try:
        for sock, slot in zip(socks, board.slots, strict=True):
            reading, writing = os.pipe()
            entry = functools.partial(_run, sock, slot, app, settings, get_result, writing)
            child = spawn(entry, {sock.fileno(), writing}, die_with_parent=True)
            os.close(writing)
            workers.append(Worker(child, slot, reading))
            if os.read(reading, 1) != b"+":
                raise BenchmarkError(f"a worker did not start: {os.read(reading, 65536).decode()}")
        yield workers
    finally:
        for each in workers:
            with contextlib.suppress(OSError):  # stopped and waited for already
                each.child.send(signal.SIGKILL)


def _run(
    sock: socket.socket,
    slot: Slot,
    app: str,
    settings: DatagramSettings,
    get_result: GetResult,
    fd: int,
) -> int:
    worker_settings = worker.WorkerSettings(
        peer_id=f"benchmark:{sock.getsockname()[1]}",
        app=app,
        datagrams=settings,
        drain_timeout_s=DRAIN_TIMEOUT_S,
    )
    code = worker.run(worker_settings, sock, slot, _PipeReport(fd))
    os.write(fd, orjson.dumps(get_result()))
    return code


class _PipeReport:
    """A BootReport that writes to a pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def prepared(self) -> None:
        """There is no predecessor to wait for."""

    def ready(self) -> None:
        os.write(self._fd, b"+")

    def failed(self, text: str) -> None:
        os.write(self._fd, b"-" + text.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
