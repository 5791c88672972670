"""Control groups for tests, if this machine allows them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from harness.eventually import eventually


class ControlGroup:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def enter(self) -> list[str]:
        """The beginning of a command line that runs the rest of the line in the group."""
        return ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(self.directory / "cgroup.procs")]

    def pids(self) -> set[int]:
        return {int(pid) for pid in (self.directory / "cgroup.procs").read_text().split()}

    def is_removed(self) -> bool:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.directory.rmdir()
        return True


@contextmanager
def control_group(*kinds: str, controllers: str = "") -> Iterator[ControlGroup]:
    """Kills its processes at the end. Skips the test if this machine allows no group.

    A kind is "cgroup2", which passes on ``controllers``, or a controller of version 1.
    """
    reasons = []
    for mount_point, kind in _mounts(*kinds):
        group = ControlGroup(mount_point / f"peerd-test-{os.getpid()}")
        try:
            if kind == "cgroup2" and controllers:
                (mount_point / "cgroup.subtree_control").write_text(controllers)
            group.directory.mkdir()
        except OSError as error:
            reasons.append(str(error))
            continue
        try:
            yield group
            return
        finally:
            eventually(group.is_removed)
    why = "; ".join(reasons) or f"no {' or '.join(kinds)} is mounted"
    pytest.skip(f"no control group can be made here: {why}")


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[ControlGroup]:
    with control_group("cgroup2", "memory", controllers="+memory") as group:
        files = [group.directory / name for name in ("memory.max", "memory.limit_in_bytes")]
        next(file for file in files if file.exists()).write_text(str(limit_bytes))
        yield group


def _mounts(*kinds: str) -> Iterator[tuple[Path, str]]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where, _, what = line.partition(" - ")
        found, _, options = what.split(" ", 2)
        for kind in {found, *(options.split(",") if found == "cgroup" else ())}.intersection(kinds):
            yield Path(where.split(" ")[4]), kind
