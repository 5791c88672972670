"""How log lines look and where they go: standard error, one line a write, and never waiting for a reader.

A reader that stops reading fills the pipe, and a write would then stop the supervisor, so what finds
no room is dropped and counted. A pipe that poll() calls writable takes PIPE_BUF bytes at once (pipe(7)),
so lines go in pieces of that size; O_NONBLOCK would do as well, but is shared with everyone else who
has the terminal open.

A worker's standard output and error are a pipe to its supervisor (supervisor/output.py): what handlers
print and log goes there by the same rule, so that neither waits for anybody.
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

from peerd.supervisor.output import record_line

STDERR = 2


def configure(level: str, log_format: str = "auto") -> Callable[[], int]:
    """Log to standard error from ``level`` on: ``text``, ``json``, or, with ``auto``, text to a terminal.

    Returns what tells how many records were dropped.
    """
    as_json = log_format == "json" or (log_format == "auto" and not os.isatty(STDERR))
    handler = _Handler(_Json() if as_json else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    return lambda: handler.dropped


def name_process(name: str) -> None:
    """What this process calls itself in its log lines from now on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Handler):
            handler.layout.process_name = name
            handler.reopen()


def become_worker(count_dropped: Callable[[int], None]) -> None:
    """What this process prints and logs goes to the supervisor's pipe, on its descriptors 1 and 2.

    ``count_dropped`` is called with how many writes have found no room.
    """
    writer = _PatientWriter(STDERR, count_dropped)
    # A buffer of its own would hold back lines, and tear them where it is full.
    raw: Any = _Raw(writer)
    output = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
    sys.stdout = sys.stderr = output
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_WorkerHandler(writer))


class _PatientWriter:
    """Writes what there is room for, and drops and counts the rest. Never blocks."""

    def __init__(self, fd: int, count_dropped: Callable[[int], None]) -> None:
        self._is_terminal = os.isatty(fd)
        fd = self.fd = _terminal_of_its_own(fd) if self._is_terminal else fd
        self._count_dropped = count_dropped
        self._is_torn = False  # a line was begun and found no room for its end
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        mode = os.fstat(fd).st_mode
        can_be_full = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
        self._piece = select.PIPE_BUF if can_be_full else 1 << 30

    def write(self, data: bytes) -> bool:
        """Whether all of it was written."""
        written = 0
        try:
            if self._is_torn:
                data = b"\n" + data
            with _in_the_background() if self._is_terminal else contextlib.nullcontext():
                while written < len(data) and self._has_room():
                    written += os.write(self.fd, data[written : written + self._piece])
        except OSError:  # a terminal that is full, nobody who reads it any more, or a full disk
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
def _in_the_background() -> Iterator[None]:
    """Where the terminal stops whoever writes from there (stty tostop), only a process that blocks or ignores
    SIGTTOU is let (termios(3)); and the supervisor would take the signal for "one peer fewer"."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _terminal_of_its_own(fd: int) -> int:
    """A description of the terminal that does not block, and is nobody else's: poll() calls one writable that
    has room for less than a line."""
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    except OSError:  # another user's, after su
        return fd


class _Raw(io.RawIOBase):
    def __init__(self, writer: _PatientWriter) -> None:
        self._writer = writer

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._writer.fd

    def write(self, data: Any) -> int:
        self._writer.write(bytes(data))
        return len(data)


class _WorkerHandler(logging.Handler):
    def __init__(self, writer: _PatientWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(record_line(record))
        except (
            Exception
        ):  # its arguments do not fit its message: sys.stderr, which does not wait either
            self.handleError(record)


class _Handler(logging.Handler):
    def __init__(self, layout: _Text | _Json) -> None:
        super().__init__()
        self.layout = layout
        self.dropped = 0
        self._untold = 0
        self.reopen()

    def reopen(self) -> None:
        """After a fork, which has closed the writer's own descriptor."""
        self._writer = _PatientWriter(STDERR, self._count)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            lines = [record]
            if untold := self._untold:
                lines.insert(0, _unread(untold))
            text = "".join(f"{self.layout.format(line)}\n" for line in lines)
            if self._writer.write(text.encode("utf-8", "backslashreplace")):
                self._untold -= untold
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A record that cannot be written down. logging would write a traceback, and wait for a reader."""
        self._count(1)

    def _count(self, number: int) -> None:
        self.dropped += number
        self._untold += number


def _unread(count: int) -> logging.LogRecord:
    message = "%d records of this log were dropped here: nobody read them"
    return logging.LogRecord(__name__, logging.WARNING, "", 0, message, (count,), None)


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
        import orjson  # not at the top, as the first peers would wait for it

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
        with contextlib.suppress(TypeError):
            return orjson.dumps(line).decode()
        # A half of a surrogate pair, as in a file name that is no UTF-8.
        escaped = {
            name: value.encode("utf-8", "backslashreplace").decode()
            if isinstance(value, str)
            else value
            for name, value in line.items()
        }
        return orjson.dumps(escaped).decode()
