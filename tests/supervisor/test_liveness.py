"""Real processes in each state that a worker can be in, and the verdict on them.

The time passed to ``judge`` is made up: two calls are half a second apart, or an hour.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.control_groups import control_group
from harness.eventually import eventually
from peerd._loop import DatagramLoop
from peerd._scoreboard import Scoreboard, Slot
from peerd.health import Health
from peerd.supervisor.cgroup import is_frozen
from peerd.supervisor.liveness import Liveness

TIMEOUT_S = 5.0
INTERVAL_S = 0.5

SLEEP = ["sleep", "1000"]
SPIN = ["sh", "-c", "while :; do :; done"]


@contextmanager
def process(command: list[str]) -> Iterator[Slot]:
    """A process in the place of a worker, which makes no progress."""
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


def verdicts(slot: Slot, count: int, liveness: Liveness | None = None) -> list[Health | None]:
    liveness = liveness or Liveness(TIMEOUT_S)
    return [liveness.judge(slot, number * INTERVAL_S) for number in range(count)]


def test_a_sleeping_worker_is_stuck_after_the_timeout_and_not_before() -> None:
    with process(SLEEP) as slot:
        said = verdicts(slot, 13)
    assert said[:10] == [None] * 10
    assert said[11:] == [Health.STUCK] * 2


def test_a_worker_that_makes_progress_is_healthy() -> None:
    liveness = Liveness(TIMEOUT_S)
    with process(SLEEP) as slot, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        loop = DatagramLoop(sock.fileno(), {}, {}, slot, lambda *_: None)
        for number in range(100):
            if number % 8 == 0:
                loop.turn()
            assert liveness.judge(slot, number * INTERVAL_S) is None
        del loop


def test_a_stopped_worker_is_never_stuck() -> None:
    with process(SLEEP) as slot:
        os.kill(slot.pid, signal.SIGSTOP)
        eventually(lambda: state(slot) == "T")
        assert set(verdicts(slot, 100)[1:]) == {Health.STOPPED}


def test_a_runnable_worker_without_a_cpu_is_starved() -> None:
    """By the made-up clock it ran for milliseconds of minutes."""
    with process(SPIN) as slot:
        said = verdicts(slot, 100)
    assert set(said[:10]) == {None}
    assert set(said[12:]) == {Health.STARVED}


def test_time_without_checks_counts_as_one_interval() -> None:
    """Supervisor and worker were stopped together for an hour; the supervisor is continued first."""
    liveness = Liveness(TIMEOUT_S)
    with process(SLEEP) as slot:
        assert set(verdicts(slot, 3, liveness)) == {None}
        assert liveness.judge(slot, 3600.0) is None
        assert liveness.usable_s < TIMEOUT_S


def test_a_worker_that_waits_for_a_device_is_starved() -> None:
    """Such as a disk, or memory that was swapped out; here it waits for its child, by vfork(2)."""
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
    assert set(said[:10]) == {None}
    assert set(said[12:]) == {Health.STARVED}


def test_a_worker_that_has_ended_is_not_stuck() -> None:
    liveness = Liveness(TIMEOUT_S)
    with process(SLEEP) as slot:
        verdicts(slot, 3, liveness)
    assert liveness.judge(slot, 2.0) is None


@pytest.mark.parametrize("kind", ["cgroup2", "freezer"])
def test_a_worker_in_a_frozen_control_group_is_stopped(kind: str) -> None:
    """With version 2 it seems to sleep, with version 1 to wait for a device."""
    liveness = Liveness(TIMEOUT_S)
    name, frozen, thawed = FREEZERS[kind]
    with process(SLEEP) as slot, control_group(kind) as group:
        (group.directory / "cgroup.procs").write_text(str(slot.pid))
        (group.directory / name).write_text(frozen)
        try:
            eventually(lambda: is_frozen(slot.pid))
            assert set(verdicts(slot, 100, liveness)[1:]) == {Health.STOPPED}
        finally:
            (group.directory / name).write_text(thawed)
        eventually(lambda: not is_frozen(slot.pid))
        assert liveness.judge(slot, 50.0) is None


FREEZERS = {
    "cgroup2": ("cgroup.freeze", "1", "0"),
    "freezer": ("freezer.state", "FROZEN", "THAWED"),
}
"""The file, what freezes, and what thaws."""
