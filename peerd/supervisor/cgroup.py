"""Control groups: kills by the OOM killer, CPU quotas, frozen processes.

A machine can have version 2 (the kernel's admin-guide/cgroup-v2.rst) and version 1 mounted, with each
controller in one of them; version 2 is read first. /proc/pid/cgroup has the path of a process's group, and
mountinfo says where the tree is mounted. A mount shows the tree below its own root, which in a container is
not "/"; a group outside that root is not visible.

Missing or malformed files never raise an error: they mean no kills and no quota.

The kernel does not report which process ran out of memory. But a group counts a kill before the process gets
its SIGKILL (mm/oom_kill.c), so the count has grown by the time the supervisor sees a worker's death.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OWN_PROC = Path("/proc/self")

CLAIMABLE_S = 5.0
"""How long after it was counted a kill can explain a death. A killed process takes time to end because its
memory is unmapped first."""


class OomKills:
    """Kills in the group that this process is in at the start; with version 2 also in groups below it."""

    def __init__(self, proc: Path = OWN_PROC) -> None:
        groups = list(_groups(proc, "memory"))
        self._files = [
            group.directory / ("memory.events" if group.is_v2 else "memory.oom_control")
            for group in groups
        ]
        self._last = self._total()
        self._unclaimed: list[float] = []  # Monotonic time at which each was counted

    def new(self) -> int:
        """Number of kills since the last call; 0 when the count cannot be read."""
        last, now = self._last, self._total()
        if now is None:
            return 0
        self._last = now
        return 0 if last is None else max(now - last, 0)

    def update(self) -> None:
        """Collect new kills and forget old ones. Call it about twice per second."""
        now_s = time.monotonic()
        self._unclaimed = [at_s for at_s in self._unclaimed if now_s - at_s < CLAIMABLE_S]
        self._unclaimed += [now_s] * self.new()

    def claim(self) -> bool:
        """Whether a process that just ended by SIGKILL may be one of them. Each kill explains one death."""
        self.update()
        if not self._unclaimed:
            return False
        del self._unclaimed[0]
        return True

    def _total(self) -> int | None:
        for file in self._files:
            for line in _read(file).splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill" and (count := _parse_uint(value)) is not None:
                    return count
        return None


def cpu_quota(proc: Path = OWN_PROC) -> float | None:
    """CPU time that the group may use, in CPUs: the minimum of all visible levels. None: no limit."""
    quotas = []
    for group in _groups(proc, "cpu"):
        for level in group.levels():
            if group.is_v2:
                quota, _, period = _read(level / "cpu.max").strip().partition(" ")
            else:
                quota = _read(level / "cpu.cfs_quota_us")
                period = _read(level / "cpu.cfs_period_us")
            quota_us, period_us = _parse_uint(quota), _parse_uint(period)
            # "max" in version 2 and -1 in version 1: no limit at this level.
            if quota_us and period_us:
                quotas.append(quota_us / period_us)
    return min(quotas, default=None)


def is_frozen(pid: int) -> bool:
    """Whether a process's group, or one above it, is frozen, as by ``docker pause``.

    The process state in /proc does not show it: version 2 shows a sleeping process, version 1 one that
    waits for a device.
    """
    for group in _groups(Path(f"/proc/{pid}"), "freezer"):
        if group.is_v2:
            if "frozen 1" in _read(group.directory / "cgroup.events").splitlines():
                return True
        elif _read(group.directory / "freezer.state").strip() == "FROZEN":
            return True
    return False


class _Group(NamedTuple):
    is_v2: bool
    directory: Path
    mount_point: Path

    def levels(self) -> Iterator[Path]:
        for level in (self.directory, *self.directory.parents):
            yield level
            if level == self.mount_point:
                return


def _groups(proc: Path, controller: str) -> Iterator[_Group]:
    """Directories that may hold this controller's files of the group, version 2 first."""
    v1_path = v2_path = None
    for line in _read(proc / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            v2_path = path
        elif controller in controllers.split(","):
            v1_path = path
    found = []
    for line in _read(proc / "mountinfo").splitlines():
        where, _, what = line.partition(" - ")
        _, _, _, root, point, *_ = (*where.split(" "), *[""] * 5)
        kind, _, options, *_ = (*what.split(" "), *[""] * 3)
        is_v2 = kind == "cgroup2"
        if not is_v2 and (kind != "cgroup" or controller not in options.split(",")):
            continue
        own_path = v2_path if is_v2 else v1_path
        if own_path is not None and point:
            below = _below(own_path, _unescape(root))
            if below is not None:
                mount_point = Path(_unescape(point))
                found.append(_Group(is_v2, mount_point / below, mount_point))
    yield from sorted(found, key=lambda group: not group.is_v2)


def _below(path: str, root: str) -> Path | None:
    """The group's path within the mount; None if it is not visible there ("/.." starts a path outside the
    cgroup namespace)."""
    group = Path(path)
    if ".." in group.parts or not group.is_relative_to(root):
        return None
    return group.relative_to(root)


def _read(file: Path) -> str:
    with contextlib.suppress(OSError, ValueError):  # a NUL in a path is a ValueError
        return os.fsdecode(file.read_bytes())
    return ""


def _parse_uint(text: str) -> int | None:
    """None for anything but a number that is not negative."""
    text = text.strip()
    return int(text) if re.fullmatch("[0-9]{1,20}", text) else None


def _unescape(text: str) -> str:
    r"""proc(5): a space in a path is written \040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
