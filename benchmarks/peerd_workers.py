"""peerd's workers as ``peerd supervise`` runs them: forked, one per socket, by peerd.serving.worker.

    python peerd_workers.py APP LINGER_US|default OFFLOAD FD [FD ...]

As a program it is a receiver (receivers.py says how those speak). start_workers() is also what
soak.py and flood.py use, which look at the scoreboard while a worker runs.
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
from typing import TypeAlias

import orjson

import peerd.serving.worker
from children import BenchmarkError
from peerd._scoreboard import Scoreboard, Slot
from peerd.settings import DatagramSettings, default_linger_us
from peerd.supervisor.processes import Child, spawn

DRAIN_TIMEOUT_S = 10.0

Result: TypeAlias = dict[str, object]


def main(app: str, linger: str, offload: str, *fds: str) -> None:
    # Ctrl-C belongs to the benchmark, which then ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The default is that of `peerd supervise` for so many peers on the CPU that they are given.
    linger_us = default_linger_us(len(fds), 1) if linger == "default" else int(linger)
    settings = DatagramSettings(offload=offload == "1", linger_us=linger_us)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket(fileno=int(fd))) for fd in fds]
        workers = stack.enter_context(start_workers(socks, app, settings, counted_messages))
        print("ready", *(worker.pid for worker in workers), flush=True)
        sys.stdin.read()
        messages = sum(int(str(worker.stop()["messages"])) for worker in workers)
        print(orjson.dumps({"messages": messages}).decode())


def counted_messages() -> Result:
    """What a worker tells in the end: how many messages reached the handlers of apps.py."""
    import apps

    return {"messages": apps.messages()}


@dataclass(frozen=True)
class Worker:
    child: Child
    slot: Slot
    results: int
    """The reading end of the worker's pipe."""

    @property
    def pid(self) -> int:
        return self.child.pid

    def check_alive(self) -> None:
        if select.select([self.child.pidfd], [], [], 0)[0]:
            raise BenchmarkError(f"a worker ended: {self.child.wait()}")

    def stop(self) -> Result:
        """End it as the supervisor does; what its ``result`` said."""
        self.child.send(signal.SIGTERM)
        with open(self.results, "rb") as results:
            said = results.read()
        exit_ = self.child.wait()
        if exit_.code != 0:
            raise BenchmarkError(f"a worker ended: {exit_}")
        result: Result = orjson.loads(said)
        return result


@contextlib.contextmanager
def start_workers(
    socks: Sequence[socket.socket],
    app: str,
    settings: DatagramSettings,
    result: Callable[[], Result],
) -> Iterator[list[Worker]]:
    """One worker for each socket, ready. ``result`` runs in a worker when it has ended its loop."""
    board = Scoreboard(len(socks))
    workers: list[Worker] = []
    try:
        for sock, slot in zip(socks, board.slots, strict=True):
            workers.append(_start(sock, slot, app, settings, result))
        yield workers
    finally:
        for worker in workers:
            with contextlib.suppress(OSError):  # stopped and waited for already
                worker.child.send(signal.SIGKILL)


def _start(
    sock: socket.socket,
    slot: Slot,
    app: str,
    settings: DatagramSettings,
    result: Callable[[], Result],
) -> Worker:
    results, told = os.pipe()
    entry = functools.partial(_run_worker, sock, slot, app, settings, result, told)
    child = spawn(entry, {sock.fileno(), told}, die_with_parent=True)
    os.close(told)
    if os.read(results, 1) != b"+":
        raise BenchmarkError(f"a worker did not start: {os.read(results, 65536).decode()}")
    return Worker(child, slot, results)


def _run_worker(
    sock: socket.socket,
    slot: Slot,
    app: str,
    settings: DatagramSettings,
    result: Callable[[], Result],
    told: int,
) -> int:
    worker_settings = peerd.serving.worker.WorkerSettings(
        peer_id=f"benchmark:{sock.getsockname()[1]}",
        app=app,
        datagrams=settings,
        drain_timeout_s=DRAIN_TIMEOUT_S,
    )
    code = peerd.serving.worker.run(worker_settings, sock, slot, _Boot(told))
    os.write(told, orjson.dumps(result()))
    return code


class _Boot:
    """A BootReport that writes to a pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def prepared(self) -> None:
        """Nobody serves before it."""

    def ready(self) -> None:
        os.write(self._fd, b"+")

    def failed(self, text: str) -> None:
        os.write(self._fd, b"-" + text.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
