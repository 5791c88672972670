"""Control groups as files: of a machine, of a container, and malformed ones."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.supervisor.cgroup import OomKills, cpu_quota


class Machine:
    """A /proc/self and cgroup mounts in a folder."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.proc.mkdir()
        self.mounts = folder / "mounts"
        self._lines = ["22 27 0:21 / /proc rw,relatime - proc proc rw", "garbage", ""]
        self.group("")

    def group(self, text: str) -> None:
        (self.proc / "cgroup").write_text(text)

    def mount(self, name: str, kind: str, options: str = "rw", root: str = "/") -> Path:
        """Its mount point."""
        point = self.mounts / name
        point.mkdir(parents=True)
        shown = str(point).replace(" ", "\\040")
        self._lines.append(
            f"41 31 0:38 {root} {shown} rw,relatime shared:7 master:1 - {kind} {kind} {options}"
        )
        (self.proc / "mountinfo").write_text("\n".join(self._lines))
        return point


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def events(kills: int) -> str:
    return f"low 0\nhigh 3\nmax 812\noom 9\noom_kill {kills}\noom_group_kill 0\n"


@pytest.mark.parametrize(
    ("groups", "mount", "file"),
    [
        ("0::/system.slice/peerd.service", ["cgroup2"], "system.slice/peerd.service/memory.events"),
        (
            "9:name=systemd:/\n4:memory:/jobs/7\n1:cpu,cpuacct:/",
            ["cgroup", "rw,memory"],
            "jobs/7/memory.oom_control",
        ),
        # Both versions, with the controller in the first, such as systemd's hybrid set-up.
        ("4:memory:/a\n0::/a", ["cgroup", "rw,memory"], "a/memory.oom_control"),
        # A container sees its group at the root of the mount.
        ("4:memory:/docker/abc\n0::/docker/abc", ["cgroup2", "rw", "/docker/abc"], "memory.events"),
    ],
    ids=["version 2", "version 1", "hybrid", "container"],
)
def test_kills_since_the_last_call_are_counted(
    machine: Machine, groups: str, mount: list[str], file: str
) -> None:
    machine.group(f"{groups}\n")
    path = machine.mount("fs cgroup", *mount) / file
    if groups.endswith("0::/a"):
        write(machine.mount("unified", "cgroup2") / "a/cgroup.procs", "1\n")
    write(path, events(5))
    kills = OomKills(machine.proc)
    assert kills.new() == 0
    write(path, events(7))
    assert (kills.new(), kills.new()) == (2, 0)


@pytest.mark.parametrize("path", ["/../other", "/", "/dock", "/docker/ab", "relative"])
def test_a_group_outside_the_mount_is_unknown(machine: Machine, path: str) -> None:
    machine.group(f"0::{path}\n")
    point = machine.mount("unified", "cgroup2", root="/docker/abc")
    for file in (point / "memory.events", point.parent / "other/memory.events"):
        write(file, events(0))
    kills = OomKills(machine.proc)
    for file in (point / "memory.events", point.parent / "other/memory.events"):
        write(file, events(1))
    assert kills.new() == 0


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    kills = OomKills(tmp_path)
    assert (kills.new(), kills.claim(), cpu_quota(tmp_path)) == (0, False, None)


def test_a_count_that_cannot_be_read_for_a_while_or_goes_back(machine: Machine) -> None:
    machine.group("0::/a\n")
    file = machine.mount("unified", "cgroup2") / "a/memory.events"
    write(file, events(3))
    kills = OomKills(machine.proc)
    file.unlink()
    assert kills.new() == 0
    write(file, events(5))
    assert kills.new() == 2
    write(file, events(1))
    assert kills.new() == 0
    write(file, events(2))
    assert kills.new() == 1


def test_each_kill_explains_one_death(machine: Machine) -> None:
    machine.group("0::/a\n")
    file = machine.mount("unified", "cgroup2") / "a/memory.events"
    write(file, events(0))
    kills = OomKills(machine.proc)
    assert not kills.claim()
    write(file, events(2))
    kills.update()
    assert [kills.claim() for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("levels", "quota"),
    [
        ({"": None, "a": "max 100000", "a/b": "max 100000"}, None),
        ({"": None, "a": "max 100000", "a/b": "150000 100000\n"}, 1.5),
        ({"": None, "a": "50000 100000", "a/b": "400000 100000"}, 0.5),
        ({"": "200000 100000", "a": "max", "a/b": None}, 2.0),
        ({"": None, "a": None, "a/b": "5000 0"}, None),
        ({"": None, "a": "100000 50000", "a/b": "-7 x y z"}, 2.0),
        ({"": "", "a": "\0", "a/b": "9" * 5000 + " 1"}, None),
    ],
)
def test_the_least_quota_of_all_levels(
    machine: Machine, levels: dict[str, str | None], quota: float | None
) -> None:
    machine.group("0::/a/b\n")
    point = machine.mount("unified", "cgroup2")
    write(machine.mounts / "cpu.max", "1000 100000")  # above the mount, so not one of our levels
    for level, text in levels.items():
        if text is not None:
            write(point / level / "cpu.max", text)
    assert cpu_quota(machine.proc) == quota


@pytest.mark.parametrize(("quota_us", "quota"), [("-1\n", None), ("250000\n", 2.5), ("", None)])
def test_the_quota_of_version_1(machine: Machine, quota_us: str, quota: float | None) -> None:
    machine.group("3:cpu,cpuacct:/a\n2:cpuset:/\n")
    point = machine.mount("cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
    write(point / "cpu.cfs_quota_us", "-1\n")
    write(point / "cpu.cfs_period_us", "100000\n")
    write(point / "a/cpu.cfs_quota_us", quota_us)
    write(point / "a/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(machine.proc) == quota


@given(group=st.binary(max_size=200), mounts=st.binary(max_size=200), counts=st.binary(max_size=80))
def test_no_content_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, group: bytes, mounts: bytes, counts: bytes
) -> None:
    folder = tmp_path_factory.mktemp("machine")
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_bytes(group + b"\n0::/\n1:memory,cpu:/\n")
    known = (
        f"1 1 0:1 / {folder} rw - cgroup2 none rw\n1 1 0:1 / {folder} rw - cgroup c rw,memory,cpu\n"
    )
    (proc / "mountinfo").write_bytes(mounts + b"\n" + known.encode())
    for name in ("memory.events", "memory.oom_control", "cpu.max", "cpu.cfs_quota_us"):
        (folder / name).write_bytes(counts)
    assert OomKills(proc).new() == 0
    quota = cpu_quota(proc)
    assert quota is None or quota > 0


def test_this_machine_has_a_quota_or_none() -> None:
    quota = cpu_quota()
    assert quota is None or quota > 0
    assert OomKills().new() == 0
