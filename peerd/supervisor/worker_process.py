"""One worker process, and what it says.

Two pipes for its start: on one the worker tells how it gets on (P: the app is loaded; R: the loop has
turned; F and a text: it cannot start), on the other it is told to go on, to load the app at first and
after P to serve. A worker that is started where nobody serves finds both words there at once; a successor
waits for the second while its predecessor serves. The first comes when its pid is in the scoreboard: what
an app starts is found by that pid when the supervisor is killed, and a supervisor that is killed right
after its fork leaves a worker that has started nothing.

A third pipe is its standard output and error (output.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable

from peerd._scoreboard import Slot
from peerd.supervisor.loop import Callback, Loop, Timer
from peerd.supervisor.output import PeerLog, WorkerOutput
from peerd.supervisor.processes import EX_SOFTWARE, Child, ChildPipes, Exit, spawn

MAX_REPORT_BYTES = 32 * 1024

DESCRIPTORS = 4
"""That a worker takes of the supervisor while it starts: a pidfd and three pipes."""

WorkerEntry = Callable[[int, socket.socket, Slot, "BootReport"], int]
"""(slot number, socket, slot, report) -> exit code; runs in the worker."""


class BootReport:
    """The worker's ends of the pipes."""

    def __init__(self, report_fd: int, go_fd: int) -> None:
        self._report_fd = report_fd
        self._go_fd = go_fd

    def wait_until_noted(self) -> None:
        """Nothing of the app may run before."""
        self._wait()

    def prepared(self) -> None:
        """The app is loaded. Returns when this worker may read the socket: a predecessor may still."""
        os.write(self._report_fd, b"P")
        self._wait()
        os.close(self._go_fd)

    def ready(self) -> None:
        os.write(self._report_fd, b"R")
        os.close(self._report_fd)

    def failed(self, text: str) -> None:
        os.write(self._report_fd, b"F" + text.encode("utf-8", "replace")[:MAX_REPORT_BYTES])
        os.close(self._report_fd)

    def _wait(self) -> None:
        if not os.read(self._go_fd, 1):
            raise SystemExit(EX_SOFTWARE)  # the supervisor does without, or is gone


class Worker:
    """The supervisor's view of it."""

    def __init__(
        self, child: Child, generation: int, report_fd: int, go_fd: int, output: WorkerOutput
    ) -> None:
        self.pid = child.pid
        self.generation = generation
        self.ready_s: float | None = None
        self.killed_for: str | None = None
        """Why the supervisor has killed it."""

        self.deadline = Timer()
        """Until when it is to be ready, or prepared."""

        self.leaves = False
        """It was told to leave the socket to its successor."""

        self.lines_dropped = 0
        """Of its output, at its end."""

        self._child = child
        self._report_fd: int | None = report_fd
        self._go_fd: int | None = go_fd
        self._said = b""
        self._output = output
        self._loop: Loop | None = None
        self._rest = Timer()
        """Lines that were read and have to wait for another turn."""

    @property
    def is_prepared(self) -> bool:
        """It has loaded the app."""
        return self._said.startswith(b"P")

    @property
    def is_ready(self) -> bool:
        """Its loop has turned."""
        return self.ready_s is not None

    @property
    def failure(self) -> str | None:
        """Why it cannot start; None when it has not said so."""
        if not self._said.startswith(b"F"):
            return None
        return self._said[1:].decode("utf-8", "replace")

    def watch(self, loop: Loop, on_report: Callback, on_exit: Callback) -> None:
        """Hear of it: that it is prepared, that it is ready, that it has ended."""

        def read_report() -> None:
            if self._read_report():
                on_report()

        self._loop = loop
        loop.watch(self._child.pidfd, on_exit)
        if self._report_fd is not None:
            loop.watch(self._report_fd, read_report)
        if self._output.fd is not None:
            loop.watch(self._output.fd, self._read_output)

    def is_noted(self) -> None:
        """Its pid is in the scoreboard, so it may load the app."""
        assert self._go_fd is not None
        with contextlib.suppress(BrokenPipeError):  # dead, and its pidfd tells
            os.write(self._go_fd, b"L")

    def go(self) -> None:
        """It may read the socket."""
        if self._go_fd is not None:
            with contextlib.suppress(BrokenPipeError):  # dead, and its pidfd tells
                os.write(self._go_fd, b"G")
            os.close(self._go_fd)
            self._go_fd = None

    def send(self, number: int) -> None:
        self._child.send(number)

    def kill(self, why: str) -> None:
        self.killed_for = self.killed_for or why
        self._child.send(signal.SIGKILL)

    def wait(self) -> Exit:
        """The end of the process; blocks until it comes. What it has said until then is read: others may
        have inherited its pipes, so nobody waits for their ends."""
        if self._loop is not None:
            self._loop.unwatch(self._child.pidfd)
        self.deadline.cancel()
        end = self._child.wait()
        while self._report_fd is not None and self._read_report():
            pass
        self._close_report()
        if self._go_fd is not None:
            os.close(self._go_fd)
            self._go_fd = None
        self._close_output()
        return end

    def _read_report(self) -> bool:
        """Whether it has said something new."""
        assert self._report_fd is not None
        try:
            chunk = os.read(self._report_fd, MAX_REPORT_BYTES)
        except BlockingIOError:
            return False
        self._said = (self._said + chunk)[:MAX_REPORT_BYTES]
        if self._said.startswith(b"PR") and self.ready_s is None:
            self.ready_s = time.monotonic()
        if not chunk:
            self._close_report()
        return bool(chunk)

    def _close_report(self) -> None:
        if self._report_fd is not None:
            if self._loop is not None:
                self._loop.unwatch(self._report_fd)
            os.close(self._report_fd)
            self._report_fd = None

    def _read_output(self) -> None:
        if self._output.fd is None:
            return
        if not self._output.read():  # it has closed both
            self._close_output()
        elif self._output.has_more and self._loop is not None and not self._rest.is_waiting:
            self._rest = self._loop.call_later(0.0, self._read_output)

    def _close_output(self) -> None:
        if self._output.fd is not None:
            if self._loop is not None:
                self._loop.unwatch(self._output.fd)
            self.lines_dropped += self._output.finish()


def start_worker(
    entry: WorkerEntry, slot: Slot, sock: socket.socket, generation: int, log: PeerLog
) -> Worker:
    """Fork one. Raises OSError when there is no process or no descriptor to be had."""
    with ChildPipes() as pipes:
        report_fd, read_report_fd = pipes.from_child()
        await_go_fd, go_fd = pipes.to_child()
        output_fd, read_output_fd = pipes.from_child()

        def run() -> int:
            report = BootReport(report_fd, await_go_fd)
            report.wait_until_noted()
            return entry(slot.index, sock, slot, report)

        child = spawn(
            run,
            (sock.fileno(), report_fd, await_go_fd),
            die_with_parent=True,
            output_fd=output_fd,
        )
        pipes.keep()
    os.set_blocking(read_report_fd, False)
    output = WorkerOutput(read_output_fd, lambda record: log.take(record, child.pid, generation))
    return Worker(child, generation, read_report_fd, go_fd, output)
