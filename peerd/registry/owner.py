"""The process on whose behalf a record was put, so that a successor need not wait for the lease of a
predecessor that died.

The record names that process in a member that other readers skip:

    "Owner": "db7 2f9c77f1-... 4026531836 4711 123456 2026-11-23T14:05:09+00:00"

A pid alone identifies nothing: pids are reused, differ between containers, and do not outlive a boot. With
the boot id, the pid namespace and the start time of the process (proc(5)), a process on the same machine
knows for certain whether the owner is alive; on another machine it cannot know, and the lease decides.
"""

from __future__ import annotations

import os
import socket
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import orjson

from peerd.procfs import read_stat

_MEMBER = "Owner"
_MAX_TEXT_LENGTH = 255


@dataclass(frozen=True)
class Owner:
    """A process, identified across pid reuse, containers and boots."""

    host: str
    boot_id: str
    pid_namespace: int
    pid: int
    started_ticks: int
    since: str  # when the record was first put by this owner: ISO 8601, by its own clock

    @classmethod
    def of_process(cls, pid: int) -> Owner:
        """Raises ProcessLookupError if there is no such process."""
        started_ticks = _started_ticks(pid)
        if started_ticks is None:
            raise ProcessLookupError(pid)
        return cls(
            host=socket.gethostname(),
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            pid=pid,
            started_ticks=started_ticks,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @classmethod
    def in_value(cls, value: bytes) -> Owner | None:
        """The owner that a stored record names; None if it names none. The value may be anything."""
        try:
            host, boot_id, *numbers, since = orjson.loads(value)[_MEMBER].split(" ")
            pid_namespace, pid, started_ticks = map(int, numbers)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None
        if not all(text.isprintable() and len(text) <= _MAX_TEXT_LENGTH for text in (host, since)):
            return None
        return cls(host, boot_id, pid_namespace, pid, started_ticks, since)

    def put_into(self, value: bytes) -> bytes:
        """A record's value with this owner added."""
        # One string: a JSON object with six members would take longer to parse than the record itself.
        owner = " ".join(map(str, astuple(self)))
        return value.removesuffix(b"}") + b"," + orjson.dumps({_MEMBER: owner}).removeprefix(b"{")

    def is_same_process(self, other: Owner) -> bool:
        return replace(self, since=other.since) == other

    def has_died(self) -> bool:
        """False if this machine, or this container, cannot know."""
        return (
            (self.boot_id, self.pid_namespace) == (_boot_id(), _pid_namespace())
            and self.pid > 0
            and _started_ticks(self.pid) != self.started_ticks
        )


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _started_ticks(pid: int) -> int | None:
    """None for a process that is gone or a zombie."""
    stat = read_stat(pid)
    return None if stat is None or stat.state in "ZX" else stat.started_ticks
