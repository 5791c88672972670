"""A control group with little memory, if this machine allows one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from harness.eventually import eventually


class MemoryGroup:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def enter(self) -> list[str]:
        """The beginning of a command line that runs the rest of the line in the group."""
        return ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(self._directory / "cgroup.procs")]

    def pids(self) -> set[int]:
        return {int(pid) for pid in (self._directory / "cgroup.procs").read_text().split()}

    def remove(self) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(self._is_removed)

    def _is_removed(self) -> bool:
        self._directory.rmdir()
        return True


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Kills its processes at the end. Skips the test if this machine allows no group."""
    reasons = []
    for mount_point, is_v2 in _mounts():
        directory = mount_point / f"peerd-test-{os.getpid()}"
        try:
            if is_v2:
                (mount_point / "cgroup.subtree_control").write_text("+memory")
            directory.mkdir()
        except OSError as error:
            reasons.append(str(error))
            continue
        group = MemoryGroup(directory)
        try:
            file = directory / ("memory.max" if is_v2 else "memory.limit_in_bytes")
            file.write_text(str(limit_bytes))
            yield group
            return
        finally:
            group.remove()
    pytest.skip(
        f"no memory control group can be made here: {'; '.join(reasons) or 'none is mounted'}"
    )


def _mounts() -> list[tuple[Path, bool]]:
    """The mount points of memory controllers, and whether each is of version 2."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where, _, what = line.partition(" - ")
        kind, _, options = what.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            found.append((Path(where.split(" ")[4]), kind == "cgroup2"))
    return found
