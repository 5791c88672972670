"""Figures about a process from /proc (proc(5)).

Not psutil: its Process reads more files to guard against reused pids, and these are read for every worker
up to twice per second. Here a pid belongs to a child that has not been reaped, or its start time is checked.
"""

from __future__ import annotations

import os
from typing import NamedTuple

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ProcessStat(NamedTuple):
    state: str
    """The letter in proc(5)."""

    cpu_s: float
    started_ticks: int
    """Clock ticks after the boot; together with the pid it identifies a process."""


def read_stat(pid: int) -> ProcessStat | None:
    """None for a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, which is the second field, may hold spaces and brackets.
            fields = file.read().rpartition(b")")[2].split()
        cpu_ticks = int(fields[11]) + int(fields[12])
        return ProcessStat(fields[0].decode(), cpu_ticks / TICKS_PER_S, int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None


def rss_bytes(pid: int) -> int:
    """Resident memory; 0 if the process is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
