"""Workers that die repeatedly: how often they are started, and whether the other peers are affected."""

import os
import time
from functools import partial
from pathlib import Path

import pytest

from harness import raw_client
from harness.eventually import eventually
from harness.supervised import NO_ETCD, Running, Supervised
from harness.supervisor_requests import ask, assert_nothing_is_lost, death_of, events, pids
from peerd_chaos.load import Load

LONG = os.environ.get("PEERD_LONG_TESTS") == "1"
POISONED_S = 120.0 if LONG else 20.0
PEERS = 8
POISONED = 3

MORTAL = """
import os, threading, peerd
with open(f"{__name__}.starts", "a") as file:
    file.write("started\\n")
print("a start of", __name__, flush=True)
timer = threading.Timer(%s, os._exit, (3,))
timer.daemon = True
timer.start()
app = peerd.App()
"""

pytestmark = pytest.mark.timeout(3600 if LONG else 300)


def starts(folder: Path, running: Running, app: str) -> dict[str, int]:
    """The number of starts by the app's count, by the scoreboard, and by the lines in the log."""
    return {
        "app": len((folder / f"{app}.starts").read_text().splitlines()),
        "scoreboard": running.peer(0)["generation"],
        "log": running.err.count(f"a start of {app}") + running.out.count(f"a start of {app}"),
    }


def agreed(folder: Path, running: Running, app: str) -> dict[str, int] | None:
    """The three counts, once they agree: they change one after the other."""
    counts = starts(folder, running, app)
    died = events(running, "died")
    is_between = running.peer(0)["restarts"] != len(died)
    return None if is_between or len(set(counts.values())) > 1 else counts


def test_a_worker_that_always_dies_is_started_at_most_ten_times_in_30_s(
    supervised: Supervised,
) -> None:
    """It dies 10 ms, 1.2 s and 5 s after its start, in three supervisors. Two of them outlive the second
    after which other supervisors take a start for a good one."""
    lives_s = {"dies_at_10_ms": 0.01, "dies_at_1200_ms": 1.2, "dies_at_5_s": 5.0}
    running = {}
    for app, life_s in lives_s.items():
        (supervised.folder / f"{app}.py").write_text(MORTAL % life_s)
        running[app] = supervised.start(f"--app={app}:app", peers=1, etcd=NO_ETCD)
    # The test is about this time.
    time.sleep(30)
    for app, each in running.items():
        assert all(2 <= count <= 10 for count in starts(supervised.folder, each, app).values()), app
    for app, each in running.items():
        counts = eventually(partial(agreed, supervised.folder, each, app))
        assert {event["how"] for event in events(each, "died")} == {"exit code 3"}
        if app != "dies_at_5_s":  # whose limit is reached after 34 s
            peer = each.peer(0)
            assert peer["state"] == "crashloop"
            assert counts == {"app": 6, "scoreboard": 6, "log": 6}
            assert 0 < peer["next_start_in_s"] <= 60
    assert [each.stop() for each in running.values()] == [0, 0, 0]


def test_one_poisoned_peer_of_eight_does_not_affect_the_others(supervised: Supervised) -> None:
    """Once parked, it is started by hand and dies again."""
    running = supervised.start("--app=peerd_chaos.chaos_apps:app", peers=PEERS).wait_registered()
    before = pids(running)
    poisoned = running.ports[POISONED]
    well = [port for port in running.ports if port != poisoned]
    parked = 0
    with Load(well, rate=2_000.0) as load:
        end_s = time.monotonic() + POISONED_S
        while time.monotonic() < end_s:
            peer = running.peer(POISONED)
            if peer["state"] == "ready":
                raw_client.send(poisoned, b"DIE")
                death_of(running, peer["pid"])
            elif peer["state"] == "crashloop":
                parked += 1
                ask(running, "restart", slot=POISONED)
            time.sleep(0.02)
        report = load.finish()
    assert_nothing_is_lost(report, running, but_not=[POISONED])
    after = running.status()["peers"]
    assert parked > 2
    for slot, peer in enumerate(after):
        if slot != POISONED:
            assert peer["pid"] == before[slot]
            assert (peer["last_exit"], peer["registered"]) == (None, True)
    assert "exit code 9" in running.err
    assert "parked" in running.err
    # Each poisonous message was in hand when it killed the worker.
    assert after[POISONED]["lost_in_flight"] == after[POISONED]["restarts"] > 5
