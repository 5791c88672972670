"""One worker process, as the supervisor sees it, and the pipes between the two.

Two pipes are for the start. On one the worker reports (P: the app is loaded; R: the loop has run;
F and a text: it cannot start). On the other it waits for permission, first to load the app, and after P
to serve. A worker for a socket that no process reads finds both permissions there when it looks; a
successor waits for the second one while its predecessor serves.

The first permission is given once the worker's pid is in the scoreboard. By that pid the processes that an
app starts are found when the supervisor is killed; a worker whose supervisor is killed right after the fork
has loaded nothing, and so started nothing.

A third pipe is the worker's standard output and error (output.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable

from peerd._scoreboard import Slot
from peerd.signals import DUMP_STACK, HAND_OVER
from peerd.supervisor.loop import Callback, Loop, Timer
from peerd.supervisor.output import PeerLog, WorkerOutput
from peerd.supervisor.processes import Child, ChildPipes, Exit, spawn

MAX_REPORT_BYTES = 32 * 1024

DESCRIPTORS = 4  # Open in the supervisor for each worker while it starts: a pidfd and three pipes
STACK_TIMEOUT_S = 0.5  # How long a worker that is about to be killed has to write its stack
WorkerEntry = Callable[[int, socket.socket, Slot, "BootPipes"], int]
"""(slot number, socket, slot, report) -> exit code; runs in the worker."""


class BootPipes:
    """The worker's ends of the two pipes for the start: what serving/worker.py calls a BootReport."""

    def __init__(self, report_fd: int, permission_fd: int) -> None:
        self._report_fd = report_fd
        self._permission_fd = permission_fd

    def wait_for_load_permission(self) -> None:
        """Call it before anything of the app runs."""
        self._wait()

    def prepared(self) -> None:
        """Report that the app is loaded. Returns when this worker may read the socket."""
        os.write(self._report_fd, b"P")
        self._wait()
        os.close(self._permission_fd)

    def ready(self) -> None:
        os.write(self._report_fd, b"R")
        os.close(self._report_fd)

    def failed(self, text: str) -> None:
        os.write(self._report_fd, b"F" + text.encode("utf-8", "replace")[:MAX_REPORT_BYTES])
        os.close(self._report_fd)

    def _wait(self) -> None:
        if not os.read(self._permission_fd, 1):
            raise SystemExit(os.EX_SOFTWARE)  # the supervisor has given this worker up, or is gone


class Worker:
    def __init__(
        self,
        loop: Loop,
        child: Child,
        generation: int,
        pipe_fds: tuple[int, int],
        output: WorkerOutput,
        log: PeerLog,
    ) -> None:
        """``pipe_fds``: the supervisor's ends, for reports and for permissions."""
        self.pid = child.pid
        self.generation = generation
        self.ready_s: float | None = None  # Monotonic time of the report that its loop has run
        self.killed_for: str | None = None  # Why the supervisor killed it
        self.is_handing_over = False  # It was asked to leave the socket to its successor
        self.lines_dropped = 0  # Of its output, known once it has ended
        self._loop = loop
        self._child = child
        self._report_fd: int | None
        self._permission_fd: int | None
        self._report_fd, self._permission_fd = pipe_fds
        self._report = b""
        self._output = output
        self._log = log
        self._has_ended = False
        self._boot_limit = Timer()
        self._next_lines = Timer()
        """Lines that were read and wait for another iteration of the loop."""

    @property
    def is_prepared(self) -> bool:
        """It has loaded the app."""
        return self._report.startswith(b"P")

    @property
    def is_ready(self) -> bool:
        """Its loop has run."""
        return self.ready_s is not None

    @property
    def ready_for_s(self) -> float | None:
        """None: it is not ready."""
        return None if self.ready_s is None else time.monotonic() - self.ready_s

    @property
    def failure(self) -> str | None:
        """Why it cannot start; None unless it has reported that."""
        if not self._report.startswith(b"F"):
            return None
        return self._report[1:].decode("utf-8", "replace")

    def watch(self, on_report: Callback, on_exit: Callback) -> None:
        """Call back when it is prepared or ready, and when it has ended."""

        def read_report() -> None:
            if self._read_report():
                on_report()

        self._loop.watch(self._child.pidfd, on_exit)
        if self._report_fd is not None:
            self._loop.watch(self._report_fd, read_report)
        if self._output.fd is not None:
            self._loop.watch(self._output.fd, self._read_output)

    def allow_load(self) -> None:
        """Its pid is in the scoreboard, so it may load the app."""
        self._permit(b"L")

    def allow_serving(self) -> None:
        """It may read the socket."""
        self._permit(b"G")
        self._close_permission()

    def limit_boot(self, limit_s: float) -> None:
        """Kill it if it is not ready within this time."""
        self.cancel_boot_limit()
        self._boot_limit = self._loop.call_later(limit_s, lambda: self._on_late(limit_s))

    def cancel_boot_limit(self) -> None:
        self._boot_limit.cancel()

    def hand_over(self) -> None:
        """Ask it to leave the socket to its successor."""
        self.send(HAND_OVER)
        self.is_handing_over = True

    def send(self, number: int) -> None:
        self._child.send(number)

    def kill(self, why: str) -> None:
        self.killed_for = self.killed_for or why
        self._child.send(signal.SIGKILL)

    def kill_with_stack(self, why: str, has_recovered: Callable[[], bool]) -> None:
        """Have it write its Python stack to the log, then kill it, unless it has recovered meanwhile."""
        self.killed_for = why
        self.send(DUMP_STACK)

        def kill() -> None:
            if self._has_ended:
                return
            if has_recovered() and self.killed_for == why:
                self.killed_for = None
                self._log.log(
                    logging.WARNING, "worker pid %d has recovered and is not killed", self.pid
                )
            else:
                self.kill(why)

        self._loop.call_later(STACK_TIMEOUT_S, kill)

    def wait(self) -> Exit:
        """Wait for the end of the process, and read what it wrote until then, but not until its pipes are
        closed: other processes may have inherited them."""
        self._loop.unwatch(self._child.pidfd)
        self.cancel_boot_limit()
        end = self._child.wait()
        self._has_ended = True
        while self._report_fd is not None and self._read_report():
            pass
        self._close_report()
        self._close_permission()
        self._close_output()
        return end

    def _on_late(self, limit_s: float) -> None:
        text = "worker pid %d is not ready after %g s (--boot-timeout); its stack follows, then SIGKILL"
        self._log.log(logging.ERROR, text, self.pid, limit_s)
        self.kill_with_stack("late", lambda: self.is_ready)

    def _permit(self, what: bytes) -> None:
        if self._permission_fd is not None:
            with contextlib.suppress(BrokenPipeError):  # it has died, which its pidfd reports
                os.write(self._permission_fd, what)

    def _read_report(self) -> bool:
        """Whether there was something new."""
        assert self._report_fd is not None
        try:
            chunk = os.read(self._report_fd, MAX_REPORT_BYTES)
        except BlockingIOError:
            return False
        self._report = (self._report + chunk)[:MAX_REPORT_BYTES]
        if self._report.startswith(b"PR") and self.ready_s is None:
            self.ready_s = time.monotonic()
        if not chunk:
            self._close_report()
        return bool(chunk)

    def _close_report(self) -> None:
        if self._report_fd is not None:
            self._loop.unwatch(self._report_fd)
            os.close(self._report_fd)
            self._report_fd = None

    def _close_permission(self) -> None:
        if self._permission_fd is not None:
            os.close(self._permission_fd)
            self._permission_fd = None

    def _read_output(self) -> None:
        if self._output.fd is None:
            return
        if not self._output.read():  # it has closed both
            self._close_output()
        elif self._output.has_more and not self._next_lines.is_waiting:
            self._next_lines = self._loop.call_later(0.0, self._read_output)

    def _close_output(self) -> None:
        if self._output.fd is not None:
            self._loop.unwatch(self._output.fd)
            self.lines_dropped += self._output.finish()


def start_worker(
    loop: Loop,
    entry: WorkerEntry,
    slot: Slot,
    sock: socket.socket,
    generation: int,
    log: PeerLog,
) -> Worker:
    """Fork a worker. Raises OSError when the machine has no process or descriptor left."""
    with ChildPipes() as pipes:
        report_fd, read_report_fd = pipes.from_child()
        read_permission_fd, permission_fd = pipes.to_child()
        output_fd, read_output_fd = pipes.from_child()

        def run() -> int:
            report = BootPipes(report_fd, read_permission_fd)
            report.wait_for_load_permission()
            return entry(slot.index, sock, slot, report)

        keep_fds = (sock.fileno(), report_fd, read_permission_fd)
        child = spawn(run, keep_fds, die_with_parent=True, output_fd=output_fd)
        pipes.keep()
    os.set_blocking(read_report_fd, False)
    output = WorkerOutput(read_output_fd, lambda record: log.take(record, child.pid, generation))
    return Worker(loop, child, generation, (read_report_fd, permission_fd), output, log)
