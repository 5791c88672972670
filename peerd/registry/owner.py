"""Who put a record, so that a successor need not wait for the lease of a predecessor that died.

A record in etcd names the process on whose behalf it stands, in a member that other readers skip:

    "Owner": "db7 2f9c77f1-... 4026531836 4711 123456 2026-11-23T14:05:09+00:00"

A pid alone says nothing: it is used again, means another process in another container, and does not
outlive a boot. With the boot id, the pid namespace and the start time of the process (proc(5)), a
process on the same machine can tell for sure whether the owner still lives; on another one nobody can,
and the lease decides.
"""

from __future__ import annotations

import os
import socket
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import orjson

_MEMBER = "Owner"
_LONGEST = 255


@dataclass(frozen=True)
class Owner:
    host: str
    boot_id: str
    pid_namespace: int
    pid: int
    started_ticks: int
    since: str
    """When the record was first put by this owner: ISO 8601, by its own clock."""

    @classmethod
    def of_process(cls, pid: int) -> Owner:
        """Raises ProcessLookupError when there is none."""
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
        """Of a stored record; None where it names none. Others may have written anything."""
        try:
            host, boot_id, *numbers, since = orjson.loads(value)[_MEMBER].split(" ")
            pid_namespace, pid, started_ticks = map(int, numbers)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None
        if not all(text.isprintable() and len(text) <= _LONGEST for text in (host, since)):
            return None
        return cls(host, boot_id, pid_namespace, pid, started_ticks, since)

    def put_into(self, value: bytes) -> bytes:
        """The value of a record with this owner in it."""
        # One string: a JSON object of six members would take longer to read than the record.
        owner = " ".join(map(str, astuple(self)))
        return value.removesuffix(b"}") + b"," + orjson.dumps({_MEMBER: owner}).removeprefix(b"{")

    def is_same_process(self, other: Owner) -> bool:
        return replace(self, since=other.since) == other

    def has_died(self) -> bool:
        """False where this machine, or this container, cannot know."""
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
    """Field 22 of /proc/pid/stat; the name in field 2 may hold spaces and brackets. A zombie is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
