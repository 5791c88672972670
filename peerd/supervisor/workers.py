"""One worker process, and what it says of its start.

Two pipes: on one the worker tells how it gets on (P: the app is loaded; R: the loop has turned; F and
a text: it cannot start), on the other it is told to go on after P. A worker that is started where
nobody serves finds that word there at once; a successor waits for it while its predecessor serves.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable

from peerd._scoreboard import Slot
from peerd.supervisor.processes import EX_SOFTWARE, Child, Exit, spawn

MAX_REPORT_BYTES = 32 * 1024

WorkerEntry = Callable[[int, socket.socket, Slot, "BootReport"], int]
"""(slot number, socket, slot, report) -> exit code; runs in the worker."""


class BootReport:
    """The worker's ends of the pipes."""

    def __init__(self, report_fd: int, go_fd: int) -> None:
        self._report_fd = report_fd
        self._go_fd = go_fd

    def prepared(self) -> None:
        """The app is loaded. Returns when this worker may read the socket: a predecessor may still."""
        os.write(self._report_fd, b"P")
        if not os.read(self._go_fd, 1):
            raise SystemExit(EX_SOFTWARE)  # the supervisor does without, or is gone
        os.close(self._go_fd)

    def ready(self) -> None:
        os.write(self._report_fd, b"R")
        os.close(self._report_fd)

    def failed(self, text: str) -> None:
        os.write(self._report_fd, b"F" + text.encode("utf-8", "replace")[:MAX_REPORT_BYTES])
        os.close(self._report_fd)


class Worker:
    """The supervisor's view of it."""

    def __init__(self, child: Child, report_fd: int, go_fd: int) -> None:
        self.child = child
        self.report_fd: int | None = report_fd
        self.started_s = time.monotonic()
        self.ready_s: float | None = None
        self._go_fd: int | None = go_fd
        self._said = b""

    @property
    def is_prepared(self) -> bool:
        return self._said.startswith(b"P")

    @property
    def is_ready(self) -> bool:
        return self._said.startswith(b"PR")

    @property
    def failure(self) -> str | None:
        """Why it cannot start; None when it has not said so."""
        if not self._said.startswith(b"F"):
            return None
        return self._said[1:].decode("utf-8", "replace")

    def read_report(self) -> bool:
        """Once there is something to read. False at its end, where the pipe is closed."""
        assert self.report_fd is not None
        chunk = os.read(self.report_fd, MAX_REPORT_BYTES)
        self._said += chunk
        if self.is_ready and self.ready_s is None:
            self.ready_s = time.monotonic()
        return bool(chunk)

    def go(self) -> None:
        """It may read the socket."""
        if self._go_fd is not None:
            with contextlib.suppress(BrokenPipeError):  # dead, and its pidfd tells
                os.write(self._go_fd, b"G")
            os.close(self._go_fd)
            self._go_fd = None

    def close(self) -> None:
        for fd in (self.report_fd, self._go_fd):
            if fd is not None:
                os.close(fd)
        self.report_fd = self._go_fd = None

    def wait(self) -> Exit:
        return self.child.wait()


def start_worker(entry: WorkerEntry, slot: Slot, sock: socket.socket) -> Worker:
    """Fork one. Raises OSError when there is no process or no descriptor to be had."""
    report_read, report_write = os.pipe()
    try:
        go_read, go_write = os.pipe()
    except OSError:
        os.close(report_read)
        os.close(report_write)
        raise
    try:
        child = spawn(
            lambda: entry(slot.index, sock, slot, BootReport(report_write, go_read)),
            (sock.fileno(), report_write, go_read),
            die_with_parent=True,
        )
    except OSError:
        os.close(report_read)
        os.close(go_write)
        raise
    finally:
        os.close(report_write)
        os.close(go_read)
    return Worker(child, report_read, go_write)
