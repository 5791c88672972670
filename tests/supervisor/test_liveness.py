"""Real processes in each state that a worker can be in, and what is said of them.

What ``judge`` is told of the time is made up: it is asked as if every half second, or after an hour.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.eventually import eventually
from peerd._loop import DatagramLoop
from peerd._scoreboard import Scoreboard, Slot
from peerd.supervisor.cgroup import is_frozen
from peerd.supervisor.liveness import Liveness, Verdict

TIMEOUT_S = 5.0
LOOK_S = 0.5

SLEEP = ["sleep", "1000"]
SPIN = ["sh", "-c", "while :; do :; done"]


@contextmanager
def process(command: list[str]) -> Iterator[Slot]:
    """As the worker of a slot that has not turned since."""
    with subprocess.Popen(command) as child:
        try:
            slot = Scoreboard(1).slots[0]
            slot.pid = child.pid
            eventually(lambda: state(slot) == ("S" if command is SLEEP else "R"))
            yield slot
        finally:
            child.kill()


def state(slot: Slot) -> str:
    return Path(f"/proc/{slot.pid}/stat").read_text().rpartition(")")[2].split()[0]


def verdicts(slot: Slot, count: int, liveness: Liveness | None = None) -> list[Verdict]:
    liveness = liveness or Liveness(TIMEOUT_S)
    return [liveness.judge(slot, number * LOOK_S) for number in range(count)]


def test_one_that_sleeps_is_stuck_after_the_timeout_and_not_before() -> None:
    with process(SLEEP) as slot:
        said = verdicts(slot, 13)
    assert said[:10] == [Verdict.GETS_ON] * 10
    assert said[11:] == [Verdict.STUCK] * 2


def test_one_that_turns_gets_on() -> None:
    liveness = Liveness(TIMEOUT_S)
    with process(SLEEP) as slot, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        loop = DatagramLoop(sock.fileno(), {}, {}, slot, lambda *_: None)
        for number in range(100):
            if number % 8 == 0:
                loop.turn()
            assert liveness.judge(slot, number * LOOK_S) is Verdict.GETS_ON
        del loop


def test_one_that_is_stopped_is_not_stuck_however_long() -> None:
    with process(SLEEP) as slot:
        os.kill(slot.pid, signal.SIGSTOP)
        eventually(lambda: state(slot) == "T")
        assert set(verdicts(slot, 100)[1:]) == {Verdict.STOPPED}


def test_one_that_runs_without_getting_a_cpu_is_starved() -> None:
    """By the made-up clock it has had milliseconds of minutes."""
    with process(SPIN) as slot:
        said = verdicts(slot, 100)
    assert set(said[:10]) == {Verdict.GETS_ON}
    assert set(said[12:]) == {Verdict.STARVED}


def test_the_time_in_which_nobody_looked_counts_as_one_look() -> None:
    """The supervisor and its worker were stopped together, for an hour; it is the first to go on."""
    liveness = Liveness(TIMEOUT_S)
    with process(SLEEP) as slot:
        assert set(verdicts(slot, 3, liveness)) == {Verdict.GETS_ON}
        assert liveness.judge(slot, 3600.0) is Verdict.GETS_ON
        assert liveness.own_s < TIMEOUT_S


def test_one_that_waits_for_the_machine_is_starved() -> None:
    """As for a disk or for memory that was swapped out; here for its child, by vfork(2)."""
    code = "import ctypes, time; ctypes.CDLL(None).vfork(); time.sleep(1000)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, process_group=0) as child:
        try:
            slot = Scoreboard(1).slots[0]
            slot.pid = child.pid
            eventually(lambda: state(slot) == "D")
            said = verdicts(slot, 100)
        finally:
            os.killpg(child.pid, signal.SIGKILL)
    assert set(said[:10]) == {Verdict.GETS_ON}
    assert set(said[12:]) == {Verdict.STARVED}


def test_one_that_ends_is_not_called_stuck_at_once() -> None:
    liveness = Liveness(TIMEOUT_S)
    with process(SLEEP) as slot:
        verdicts(slot, 3, liveness)
    assert liveness.judge(slot, 2.0) is Verdict.GETS_ON


@pytest.mark.parametrize("kind", ["cgroup2", "freezer"])
def test_one_whose_control_group_is_frozen_is_stopped(kind: str) -> None:
    """Version 2 lets it look asleep, version 1 as if it waited for a disk."""
    liveness = Liveness(TIMEOUT_S)
    with process(SLEEP) as slot, freezable_group(kind, slot.pid) as freeze:
        freeze(True)
        eventually(lambda: is_frozen(slot.pid))
        assert set(verdicts(slot, 100, liveness)[1:]) == {Verdict.STOPPED}
        freeze(False)
        eventually(lambda: not is_frozen(slot.pid))
        assert liveness.judge(slot, 50.0) is Verdict.GETS_ON


GROUPS = {"cgroup2": ("cgroup.freeze", "1", "0"), "freezer": ("freezer.state", "FROZEN", "THAWED")}
"""The file, what freezes, and what thaws."""


@contextmanager
def freezable_group(kind: str, pid: int) -> Iterator[Callable[[bool], int]]:
    name, frozen, thawed = GROUPS[kind]
    mount_point = mount_point_of(kind)
    if mount_point is None:
        pytest.skip(f"no {kind} is mounted here")
    directory = mount_point / f"peerd-test-{os.getpid()}"
    try:
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        (directory / "cgroup.procs").write_text(str(pid))
        yield lambda yes: (directory / name).write_text(frozen if yes else thawed)
    finally:
        (directory / name).write_text(thawed)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: is_removed(directory))


def mount_point_of(kind: str) -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where, _, what = line.partition(" - ")
        found, _, options = what.split(" ", 2)
        if kind in (found, *(options.split(",") if found == "cgroup" else ())):
            return Path(where.split(" ")[4])
    return None


def is_removed(directory: Path) -> bool:
    directory.rmdir()
    return True
