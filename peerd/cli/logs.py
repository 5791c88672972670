"""How log lines look and where they go: standard error, one line a write, and never waiting for a reader.

A reader that stops reading fills the pipe, and a write would then stop the supervisor, so what finds
no room is dropped and counted. A pipe that poll() calls writable takes PIPE_BUF bytes at once (pipe(7)),
so records go in pieces of that size; O_NONBLOCK would do as well, but is shared with everyone else who
has the terminal open.
"""

from __future__ import annotations

import logging
import os
import select


def configure(level: str) -> None:
    """Log to standard error from ``level`` on."""
    handler = _PatientHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def name_process(name: str) -> None:
    """What this process calls itself in its log lines from now on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _Formatter):
            handler.formatter.process_name = name


class _PatientHandler(logging.Handler):
    FD = 2

    def __init__(self) -> None:
        super().__init__()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if self._dropped:
                text = f"({self._dropped} log lines were dropped: nobody read them)\n{text}"
            if self._write(f"{text}\n".encode("utf-8", "backslashreplace")):
                self._dropped = 0
            else:
                self._dropped += 1
        except OSError:
            self._dropped += 1  # closed, or a full disk: there is nowhere to say so
        except Exception:
            self.handleError(record)

    def _write(self, data: bytes) -> bool:
        poll = select.poll()
        poll.register(self.FD, select.POLLOUT)
        for start in range(0, len(data), select.PIPE_BUF):
            if not any(events & select.POLLOUT for _, events in poll.poll(0)):
                return False
            os.write(self.FD, data[start : start + select.PIPE_BUF])
        return True


class _Formatter(logging.Formatter):
    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("{asctime} {levelname:<8} {who}: {message}", style="{")
        self.process_name = "supervisor"

    def format(self, record: logging.LogRecord) -> str:
        record.who = f"{self.process_name}[{os.getpid()}]"
        return super().format(record)
