"""The format of log lines, and how they are written: to standard error, one line per write, never blocking.

A reader that stops reading fills the pipe, and a blocking write would then stop the supervisor. So a line
that finds no room is dropped and counted. A pipe that poll() reports as writable takes PIPE_BUF bytes
without blocking (pipe(7)), so lines are written in pieces of that size. O_NONBLOCK would also work, but all
processes that have the terminal open share it.

Standard output and error of a worker are a pipe to its supervisor (supervisor/output.py). What handlers
print and log is written by the same rule, so a worker does not wait for its supervisor either.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from peerd.supervisor.output import record_line, without_surrogates

STDERR = 2


def configure(level: str, log_format: str = "auto") -> Callable[[], int]:
    """Log to standard error from ``level`` on, as ``text`` or ``json``; ``auto`` is text on a terminal.

    Returns a function that returns the number of dropped records.
    """
    as_json = log_format == "json" or (log_format == "auto" and not os.isatty(STDERR))
    handler = _Handler(_Json() if as_json else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    return lambda: handler.dropped


def name_process(name: str) -> None:
    """Set the name of this process in its log lines."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Handler):
            handler.layout.process_name = name
            handler.reopen()


def become_worker(count_dropped: Callable[[int], None]) -> None:
    """Write what this process prints and logs to the supervisor's pipe, its descriptors 1 and 2.

    ``count_dropped`` is called with the number of dropped writes.
    """
    writer = _NonBlockingWriter(STDERR, count_dropped)
    # A buffer in between would delay lines, and split them when it is full.
    raw: Any = _Raw(writer)
    output = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
    sys.stdout = sys.stderr = output
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_WorkerHandler(writer))


class _NonBlockingWriter:
    """Writes as much as there is room for, and drops and counts the rest."""

    def __init__(self, fd: int, count_dropped: Callable[[int], None]) -> None:
        self._is_terminal = os.isatty(fd)
        fd = self.fd = _reopened_terminal(fd) if self._is_terminal else fd
        self._count_dropped = count_dropped
        self._is_torn = False  # whether the last line was cut off
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        mode = os.fstat(fd).st_mode
        can_be_full = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
        self._piece = select.PIPE_BUF if can_be_full else 1 << 30

    def write(self, data: bytes) -> bool:
        """Return whether all of it was written."""
        written = 0
        try:
            if self._is_torn:
                data = b"\n" + data
            with _sigttou_blocked() if self._is_terminal else contextlib.nullcontext():
                while written < len(data) and self._has_room():
                    written += os.write(self.fd, data[written : written + self._piece])
        except OSError:  # a full terminal, a closed pipe, or a full disk
            pass
        if written == len(data):
            self._is_torn = False
            return True
        self._is_torn = self._is_torn or written > 0
        self._count_dropped(1)
        return False

    def _has_room(self) -> bool:
        return any(events & select.POLLOUT for _, events in self._poll.poll(0))


@contextlib.contextmanager
def _sigttou_blocked() -> Iterator[None]:
    """After ``stty tostop``, the terminal sends SIGTTOU to background processes that write, except those that
    block or ignore it (termios(3)). The supervisor would handle it as "one peer fewer"."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reopened_terminal(fd: int) -> int:
    """The terminal, opened again so that only this process has it in non-blocking mode: poll() reports it as
    writable even if it has room for less than a line."""
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    except OSError:  # after su, the terminal belongs to another user
        return fd


class _Raw(io.RawIOBase):
    def __init__(self, writer: _NonBlockingWriter) -> None:
        self._writer = writer

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._writer.fd

    def write(self, data: Any) -> int:
        self._writer.write(bytes(data))
        return len(data)


class _WorkerHandler(logging.Handler):
    def __init__(self, writer: _NonBlockingWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(record_line(record))
        except Exception:  # the arguments do not fit the message
            self.handleError(record)


class _Handler(logging.Handler):
    def __init__(self, layout: _Text | _Json) -> None:
        super().__init__()
        self.layout = layout
        self.dropped = 0
        self._unreported = 0
        self.reopen()

    def reopen(self) -> None:
        """After a fork, because a forked child closes the descriptor of the writer."""
        self._writer = _NonBlockingWriter(STDERR, self._count)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            lines = [record]
            if unreported := self._unreported:
                message = "%d log records were dropped here, because the log was not read"
                notice = (__name__, logging.WARNING, "", 0, message, (unreported,), None)
                lines.insert(0, logging.LogRecord(*notice))
            text = "".join(f"{self.layout.format(line)}\n" for line in lines)
            if self._writer.write(text.encode("utf-8", "backslashreplace")):
                self._unreported -= unreported
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Count a record that cannot be formatted. The base class would write a traceback and could block."""
        self._count(1)

    def _count(self, number: int) -> None:
        self.dropped += number
        self._unreported += number


class _Text(logging.Formatter):
    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("{asctime} {levelname:<8} {who}: {message}", style="{")
        self.process_name = "supervisor"

    def format(self, record: logging.LogRecord) -> str:
        fields = vars(record)
        if "peer" in fields:
            record.who = (
                f"peer={fields['peer']} port={fields['port']} pid={fields['pid']} "
                f"gen={fields['generation']}"
            )
        else:
            record.who = f"{self.process_name}[{os.getpid()}]"
        return super().format(record)


class _Json(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self.process_name = "supervisor"

    def format(self, record: logging.LogRecord) -> str:
        import orjson  # not at the top: the start of the first peers would wait for it

        fields = vars(record)
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        if "peer" in fields:
            line |= {name: fields[name] for name in ("peer", "port", "pid", "generation")}
        else:
            line |= {"process": self.process_name, "pid": os.getpid()}
        line["logger"] = record.name
        line["message"] = record.getMessage()
        exception = record.exc_text
        if exception is None and record.exc_info:
            exception = self.formatException(record.exc_info)
        if exception:
            line["exception"] = exception
        escaped = {
            name: without_surrogates(value) if isinstance(value, str) else value
            for name, value in line.items()
        }
        return orjson.dumps(escaped).decode()
