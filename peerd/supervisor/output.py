"""The standard output and error of workers, line by line, and the newest lines about each peer.

Each worker has one pipe for both streams, whose other end the supervisor reads, so that each line is
attributed to its worker and the last lines of a dead worker are known. On the pipe, a log record is a line
of JSON behind a record separator (the framing of RFC 7464), because its text may have many lines. Any other
line was printed; it may be forged, because handlers print what clients send.

No process waits for another one here. When its pipe is full, the worker drops the line and counts it. The
supervisor reads a bounded part of each pipe per iteration of its loop, and passes it to a logging handler
that drops and counts lines when its own reader is too slow.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import chain
from typing import NamedTuple

from peerd._scoreboard import Slot

SEPARATOR = b"\x1e"

MAX_LINE_BYTES = 32 * 1024  # Longer lines are cut
CHUNK_BYTES = 8 * 1024  # Of one read
MAX_TIME_S = 253_402_300_799.0  # The end of the year 9999: a later time was forged
MAX_LINES_PER_ITERATION = 100  # Of one worker: they take some milliseconds
MAX_LAST_LINE_CHARS = 500
"""Of each line in a death certificate: the history keeps a thousand of them."""

MAX_KEPT_LINES = 200
MAX_KEPT_BYTES = 256 * 1024  # Per peer
PRINTED = "output"  # Name of the logger for printed lines
_exceptions = logging.Formatter()


def record_line(record: logging.LogRecord) -> bytes:
    """A worker's line for a log record. Raises TypeError if the message's arguments do not fit."""
    import orjson  # not at the top: the first peers would wait for it

    exception = None
    if record.exc_info and record.exc_info[0] is not None:
        exception = _exceptions.formatException(record.exc_info)
    message = without_surrogates(record.getMessage())
    fields = (record.created, record.levelno, record.name, message, exception)
    line = orjson.dumps(fields)
    if len(line) >= MAX_LINE_BYTES - 2:
        most = MAX_LINE_BYTES // 16  # an escaped character of JSON takes 6 bytes
        cut = (*fields[:3], fields[3][:most], exception and exception[-most:])
        line = orjson.dumps(cut)
    return SEPARATOR + line + b"\n"


def without_surrogates(text: str) -> str:
    """Escape lone surrogates, such as of a file name that is not UTF-8: JSON cannot represent them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _read_record(line: bytes) -> logging.LogRecord:
    """The record that ``record_line`` wrote, or a record for a printed line."""
    if line.startswith(SEPARATOR):
        import orjson

        try:
            created, level, name, message, exception = orjson.loads(line[1:])
            if (
                type(created) is float
                and 0 <= created <= MAX_TIME_S
                and type(level) is int
                and 0 < level <= logging.CRITICAL
                and type(name) is type(message) is str
                and type(exception) in (str, type(None))
            ):
                record = logging.LogRecord(name, level, "", 0, message, None, None)
                record.created, record.exc_text = created, exception
                record.msecs = created % 1 * 1000
                return record
        except (ValueError, TypeError):
            pass
    text = line.decode("utf-8", "backslashreplace")
    return logging.LogRecord(PRINTED, logging.INFO, "", 0, text, None, None)


class WorkerOutput:
    """The supervisor's end of a worker's output pipe."""

    def __init__(self, fd: int, take: Callable[[logging.LogRecord], None]) -> None:
        os.set_blocking(fd, False)
        self.fd: int | None = fd
        self._take = take
        self._lines: deque[bytes] = deque()
        self._unfinished = b""
        self._is_cut = False

    @property
    def has_more(self) -> bool:
        """Whether lines that were read wait for another iteration."""
        return bool(self._lines)

    def read(self) -> bool:
        """Take in a bounded part. False at the end of file: every process has closed the pipe."""
        is_open = bool(self._lines) or self._fetch() is not False
        for _ in range(min(len(self._lines), MAX_LINES_PER_ITERATION)):
            self._take(_read_record(self._lines.popleft()))
        if not is_open:
            self._end_line()
        return is_open

    def finish(self) -> int:
        """The worker is dead: take in the last lines of the pipe, and close it. Returns the number of lines
        before them that were dropped."""
        # More than a pipe can hold. A process that the worker has left behind may go on writing.
        for _ in range(1024 * 1024 // CHUNK_BYTES):
            if not self._fetch():
                break
        dropped = max(0, len(self._lines) - MAX_KEPT_LINES)
        for line in list(self._lines)[dropped:]:
            self._take(_read_record(line))
        self._lines.clear()
        self._end_line()
        self.close()
        return dropped

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
        self.fd = None

    def _fetch(self) -> bool | None:
        """Whether there was something to read; None if the pipe is empty."""
        if self.fd is None:
            return False
        try:
            chunk = os.read(self.fd, CHUNK_BYTES)
        except BlockingIOError:
            return None
        *lines, self._unfinished = (self._unfinished + chunk).split(b"\n")
        for line in lines:
            # An empty line costs as much as any other and is worth nothing.
            if line and not self._is_cut:
                self._lines.append(line)
            self._is_cut = False
        if len(self._unfinished) > MAX_LINE_BYTES:
            if not self._is_cut:
                self._lines.append(self._unfinished[:MAX_LINE_BYTES] + b" ...")
            self._unfinished, self._is_cut = b"", True
        return bool(chunk)

    def _end_line(self) -> None:
        """Take in a last line without a line break."""
        if self._unfinished and not self._is_cut:
            self._take(_read_record(self._unfinished))
        self._unfinished = b""


class KeptLine(NamedTuple):
    slot: int
    peer_id: str
    port: int
    pid: int
    generation: int
    level: str
    message: str


class RecentLines:
    """The newest lines about each peer, including those of dead workers: ``peerd logs``."""

    def __init__(self) -> None:
        self._last = 0
        self._kept: dict[int, deque[tuple[int, float, KeptLine]]] = {}
        """By slot: number, monotonic time, line."""

        self._bytes: dict[int, int] = {}

    def keep(self, line: KeptLine) -> None:
        self._last += 1
        slot = line.slot
        kept = self._kept.setdefault(slot, deque())
        kept.append((self._last, time.monotonic(), line))
        self._bytes[slot] = self._bytes.get(slot, 0) + len(line.message)
        while len(kept) > MAX_KEPT_LINES or self._bytes[slot] > MAX_KEPT_BYTES:
            self._bytes[slot] -= len(kept.popleft()[2].message)

    def has(self, slot: object) -> bool:
        return type(slot) is int and slot in self._kept

    def last_of(self, slot: int, generation: int, count: int) -> list[str]:
        """The texts of the last lines of one worker, oldest first."""
        kept = [line for *_, line in self._kept.get(slot, ()) if line.generation == generation]
        return [line.message[-MAX_LAST_LINE_CHARS:] for line in kept[-count:]]

    def since(self, arguments: Mapping[str, object]) -> list[dict[str, object]]:
        """Lines of ``slot`` (None: all) with a number above ``after``, oldest first, with their ``age_s``."""
        after, slot = arguments.get("after", 0), arguments.get("slot")
        if type(after) is not int:
            after = 0
        now_s = time.monotonic()
        return [
            {"number": number, "age_s": round(now_s - at_s, 3), **line._asdict()}
            for number, at_s, line in sorted(chain.from_iterable(self._kept.values()))
            if number > after and slot in (None, line.slot)
        ]


class PeerLog:
    """All that is logged about one peer, by its workers and by the supervisor."""

    def __init__(self, slot: Slot, peer_id: str, port: int, recent: RecentLines) -> None:
        self._slot = slot
        self._peer_id = peer_id
        self._port = port
        self._recent = recent

    def log(
        self, level: int, message: str, *args: object, pid: int = 0, generation: int = 0
    ) -> None:
        """A line of the supervisor about a worker: the current one, unless another one is given."""
        if not logging.getLogger(__name__).isEnabledFor(level):
            return
        record = logging.LogRecord("peerd.supervisor", level, "", 0, message, args, None)
        self.take(record, pid or self._slot.pid, generation or self._slot.generation)

    def take(self, record: logging.LogRecord, pid: int, generation: int) -> None:
        record.peer, record.port = self._peer_id, self._port
        record.pid, record.generation = pid, generation
        text = record.getMessage()
        if record.exc_text:
            text = f"{text}\n{record.exc_text}"
        level, slot = record.levelname.lower(), self._slot.index
        line = KeptLine(slot, self._peer_id, self._port, pid, generation, level, text)
        self._recent.keep(line)
        root = logging.getLogger()
        # Printed lines have no level. A forged record may have a level below the configured one.
        if record.name == PRINTED or root.isEnabledFor(record.levelno):
            root.handle(record)

    def last_of(self, generation: int, count: int) -> list[str]:
        return self._recent.last_of(self._slot.index, generation, count)
