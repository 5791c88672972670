"""Verdicts on workers without progress; only those in a handler that does not return are killed."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from harness import raw_client
from harness.command import started
from harness.eventually import eventually
from harness.supervised import NO_ETCD, Running, Supervised, send_signal
from harness.supervisor_requests import assert_nothing_is_lost, events, is_replaced, pids
from peerd_chaos.load import Load

LONG = os.environ.get("PEERD_LONG_TESTS") == "1"
BURN_S = 600.0 if LONG else 10.0
BURNERS = max(32, 16 * (os.cpu_count() or 1))
STUCK_S = 1.5

APP = """
import time, peerd
app = peerd.App()

@app.handler("SPIN")
def spin(message):
    while True: pass  # SPIN

@app.handler("SLEEP")
def sleep(message):
    time.sleep(60)  # SLEEP

@app.handler("SEQ")
def answer(message):
    return message.body
"""

pytestmark = [pytest.mark.alone, pytest.mark.timeout(3600 if LONG else 300)]


def start(supervised: Supervised, peers: int) -> Running:
    return supervised.start(
        f"--stuck-timeout={STUCK_S}", peers=peers, etcd=NO_ETCD, app=APP
    ).wait_ready()


def health(running: Running) -> list[str | None]:
    return [peer["health"] for peer in running.status()["peers"]]


def line_of(mark: str) -> int:
    return 1 + APP.partition(f"# {mark}")[0].count("\n")


def test_the_verdicts_on_four_workers_side_by_side(supervised: Supervised) -> None:
    """One spins in its handler, one sleeps there, one is stopped, one is healthy."""
    running = start(supervised, peers=4)
    before = pids(running)
    eventually(lambda: health(running) == ["idle"] * 4)
    send_signal(before[2], signal.SIGSTOP)
    for slot, magic in enumerate(["SPIN", "SLEEP"]):
        raw_client.send(running.ports[slot], magic.encode())
    seen: list[set[str]] = [set(), set(), set(), set()]

    def all_judged() -> bool:
        for slot, verdict in enumerate(health(running)):
            if verdict is not None and pids(running)[slot] == before[slot]:
                seen[slot].add(verdict)
        return {"stuck"} <= seen[0] & seen[1] and "stopped" in seen[2]

    eventually(all_judged)
    for slot in (0, 1):
        eventually(partial(is_replaced, running, slot, before[slot]))
    running.wait_ready()
    # Longer than the stuck workers were given.
    eventually(lambda: running.peer(2)["heartbeat_age_s"] > 3 * STUCK_S)
    assert seen[3] <= {"ok", "idle"}
    assert health(running)[2] == "stopped"
    send_signal(before[2], signal.SIGCONT)
    eventually(lambda: health(running) == ["idle"] * 4)
    assert pids(running)[2:] == before[2:]
    for slot, magic in enumerate(["SPIN", "SLEEP"]):
        assert f'supervised_app.py", line {line_of(magic)} in {magic.lower()}' in running.err
        (died,) = [each for each in events(running, "died") if each["pid"] == before[slot]]
        assert (died["cause"], died["lost_in_flight"]) == ("stuck", 1)
        assert any(f"line {line_of(magic)} in" in line for line in died["last_lines"])
    assert {each["pid"] for each in events(running, "stuck")} == set(before[:2])
    assert "is stuck" in running.err
    assert [peer["lost_in_flight"] for peer in running.status()["peers"]] == [1, 1, 0, 0]


def test_a_worker_without_a_cpu_is_starved(supervised: Supervised) -> None:
    """It runs only when the burners leave the CPU idle (SCHED_IDLE)."""
    running = start(supervised, peers=2)
    before = pids(running)
    cpu = min(os.sched_getaffinity(0))
    os.sched_setaffinity(before[0], {cpu})
    os.sched_setscheduler(before[0], os.SCHED_IDLE, os.sched_param(0))
    with burners(16, cpu):
        # A handler that spins: an idle loop would need so little CPU that it could still make progress.
        raw_client.send(running.ports[0], b"SPIN")
        eventually(lambda: health(running)[0] == "starved")
        assert health(running)[1] in ("ok", "idle")
        assert pids(running) == before
        assert not events(running, "stuck")


def test_no_worker_is_killed_beside_burners(supervised: Supervised) -> None:
    """Sixteen times as many as there are CPUs."""
    running = start(supervised, peers=8)
    eventually(lambda: None not in health(running))
    before = pids(running)
    verdicts: set[str | None] = set()
    with Load(running.ports, rate=200.0) as load, burners(BURNERS):
        end_s = time.monotonic() + BURN_S
        while time.monotonic() < end_s:
            verdicts |= set(health(running))
            time.sleep(0.2)
        report = load.finish(timeout_s=60)
    assert_nothing_is_lost(report, running)
    assert verdicts <= {"ok", "idle", "starved"}
    assert pids(running) == before
    assert not events(running, "stuck")


@contextmanager
def burners(count: int, cpu: int | None = None) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            child = stack.enter_context(started(["sh", "-c", "while :; do :; done"]))
            os.sched_setaffinity(child.pid, os.sched_getaffinity(0) if cpu is None else {cpu})
        yield
