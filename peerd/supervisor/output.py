"""What workers write to standard output and error, line by line, and the last of it for each peer.

A worker has one pipe for both, and the supervisor its other end, so that a line can be told apart from
those of other workers, and the last words of a dead one are known. On the pipe, a log record is a line of
JSON behind a record separator (the framing of RFC 7464), as its text may have many lines; whatever else
comes is a line that somebody has printed, and may be forged, since handlers print what clients send.

Nobody waits for anybody here. The worker drops, and counts, what finds no room in its pipe; the
supervisor reads a bounded part of each pipe a turn, and hands it to a logging handler that drops, and
counts, what its own reader has no room for.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from peerd._scoreboard import Slot

SEPARATOR = b"\x1e"

MAX_LINE_BYTES = 32 * 1024
"""What is longer is cut."""

READ_BYTES = 8 * 1024
"""At once."""

MAX_TIME_S = 253_402_300_799.0
"""The end of the year 9999: what no calendar has a name for was forged."""

TURN_LINES = 100
"""Of one worker in one turn: some milliseconds."""

LAST_CHARS = 500
"""Of each of a dead worker's last lines: the history keeps a thousand deaths."""

KEPT_LINES = 200
KEPT_BYTES = 256 * 1024
"""Of each peer."""

PRINTED = "output"
"""The logger of lines that were printed."""

_exceptions = logging.Formatter()


def record_line(record: logging.LogRecord) -> bytes:
    """What a worker writes for a log record. Raises TypeError where the message's arguments do not fit."""
    import orjson  # not at the top, as the first peers would wait for it

    exception = None
    if record.exc_info and record.exc_info[0] is not None:
        exception = _exceptions.formatException(record.exc_info)
    fields = (record.created, record.levelno, record.name, _plain(record.getMessage()), exception)
    line = orjson.dumps(fields)
    if len(line) >= MAX_LINE_BYTES - 2:
        most = MAX_LINE_BYTES // 16  # a character takes 6 bytes at most, as an escape of JSON
        cut = (*fields[:3], fields[3][:most], exception and exception[-most:])
        line = orjson.dumps(cut)
    return SEPARATOR + line + b"\n"


def _plain(text: str) -> str:
    """Without halves of surrogate pairs, which JSON cannot have."""
    return text.encode("utf-8", "backslashreplace").decode()


def _read_record(line: bytes) -> logging.LogRecord:
    """Of what ``record_line`` made; anything else is a printed line."""
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
    """The supervisor's end of the pipe, closed by ``close``."""

    def __init__(self, fd: int, take: Callable[[logging.LogRecord], None]) -> None:
        os.set_blocking(fd, False)
        self.fd: int | None = fd
        self._take = take
        self._lines: deque[bytes] = deque()
        self._unfinished = b""
        self._is_cut = False

    @property
    def has_more(self) -> bool:
        """Lines that were read, and wait for another turn."""
        return bool(self._lines)

    def read(self) -> bool:
        """Take in a bounded part of what is there. False at the end: it is closed by everybody."""
        is_open = bool(self._lines) or self._fetch() is not False
        for _ in range(min(len(self._lines), TURN_LINES)):
            self._take(_read_record(self._lines.popleft()))
        if not is_open:
            self._end_line()
        return is_open

    def finish(self) -> int:
        """The worker is dead: take in the last of what the pipe holds, and close it. How many lines
        before that were dropped."""
        # More than a pipe can hold, unless somebody goes on writing: a process that the worker left.
        for _ in range(1024 * 1024 // READ_BYTES):
            if not self._fetch():
                break
        dropped = max(0, len(self._lines) - KEPT_LINES)
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
        """Whether there was something to read; None: not now."""
        if self.fd is None:
            return False
        try:
            chunk = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return None
        *lines, self._unfinished = (self._unfinished + chunk).split(b"\n")
        for line in lines:
            # An empty one says nothing, and costs as much as any other.
            if line and not self._is_cut:
                self._lines.append(line)
            self._is_cut = False
        if len(self._unfinished) > MAX_LINE_BYTES:
            if not self._is_cut:
                self._lines.append(self._unfinished[:MAX_LINE_BYTES] + b" ...")
            self._unfinished, self._is_cut = b"", True
        return bool(chunk)

    def _end_line(self) -> None:
        """A last line without an end is one, too."""
        if self._unfinished and not self._is_cut:
            self._take(_read_record(self._unfinished))
        self._unfinished = b""


class _Kept(NamedTuple):
    number: int
    at_s: float
    level: str
    pid: int
    generation: int
    text: str


class RecentLines:
    """The last lines about each peer, those of dead workers included: ``peerd logs``."""

    def __init__(self) -> None:
        self._last = 0
        self._kept: dict[int, deque[_Kept]] = {}
        self._bytes: dict[int, int] = {}
        self._names: dict[int, tuple[str, int]] = {}

    def keep(
        self, slot: int, peer_id: str, port: int, pid: int, generation: int, level: str, text: str
    ) -> None:
        self._last += 1
        self._names[slot] = peer_id, port
        kept = self._kept.setdefault(slot, deque())
        kept.append(_Kept(self._last, time.monotonic(), level, pid, generation, text))
        self._bytes[slot] = self._bytes.get(slot, 0) + len(text)
        while len(kept) > KEPT_LINES or self._bytes[slot] > KEPT_BYTES:
            self._bytes[slot] -= len(kept.popleft().text)

    def has(self, slot: object) -> bool:
        return type(slot) is int and slot in self._kept

    def last_of(self, slot: int, generation: int, count: int) -> list[str]:
        """The last texts of one worker, oldest first."""
        kept = [each for each in self._kept.get(slot, ()) if each.generation == generation]
        return [each.text[-LAST_CHARS:] for each in kept[-count:]]

    def since(self, arguments: Mapping[str, object]) -> list[dict[str, object]]:
        """Those of ``slot`` (None: all) with a number above ``after``, oldest first, with their ``age_s``."""
        after, slot = arguments.get("after", 0), arguments.get("slot")
        if type(after) is not int:
            after = 0
        now_s = time.monotonic()
        found = [
            (each.number, index, each)
            for index, kept in self._kept.items()
            if slot in (None, index)
            for each in kept
            if each.number > after
        ]
        return [
            {
                "number": number,
                "age_s": round(now_s - each.at_s, 3),
                "slot": index,
                "peer_id": self._names[index][0],
                "port": self._names[index][1],
                "pid": each.pid,
                "generation": each.generation,
                "level": each.level,
                "message": each.text,
            }
            for number, index, each in sorted(found, key=lambda entry: entry[0])
        ]


class PeerLog:
    """Everything that is logged about one peer: by its workers, and of them."""

    def __init__(self, slot: Slot, peer_id: str, port: int, recent: RecentLines) -> None:
        self._slot = slot
        self._peer_id = peer_id
        self._port = port
        self._recent = recent

    def log(
        self, level: int, message: str, *args: object, pid: int = 0, generation: int = 0
    ) -> None:
        """A line of the supervisor about a worker; the one that serves, unless another is named."""
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
        self._recent.keep(
            self._slot.index,
            self._peer_id,
            self._port,
            pid,
            generation,
            record.levelname.lower(),
            text,
        )
        root = logging.getLogger()
        # What is printed has no level. A record that is forged may have one that a worker would not write.
        if record.name == PRINTED or root.isEnabledFor(record.levelno):
            root.handle(record)

    def last_of(self, generation: int, count: int) -> list[str]:
        return self._recent.last_of(self._slot.index, generation, count)
