"""Reloads and scalings lose nothing, and the loss by a kill is counted exactly.

PEERD_LONG_TESTS=1 runs them at full size: 20,000 datagrams/s over 8 peers.
"""

import os
import random
import signal
import subprocess
import time

import pytest

from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Running, Supervised, send_signal
from harness.supervisor_requests import ask, assert_nothing_is_lost, http_get, serving
from peerd_chaos.chaos_apps import HANDLER_VARIABLE
from peerd_chaos.load import Load

LONG = os.environ.get("PEERD_LONG_TESTS") == "1"
PEERS = 8
RATE = 20_000.0 if LONG else 6_000.0
RELOADS = 50 if LONG else 5
SCALINGS = 20 if LONG else 4
KILLS = 100 if LONG else 12
UNREAD_S = 30.0 if LONG else 4.0
# A share of the interval between datagrams to the same peer; a sleep has overhead, so nearly all of it.
HANDLER_S = 0.75 * PEERS / RATE
RECV_BUFFER = "--recv-buffer=134217728"  # room for the backlog on a busy machine

pytestmark = [pytest.mark.alone, pytest.mark.timeout(3600 if LONG else 300)]

CHATTERING = """
import sys, peerd
app = peerd.App()

@app.handler("SEQ")
def echo(message):
    print("a line from a handler, without a reader", file=sys.stdout, flush=True)
    print("and another one", file=sys.stderr, flush=True)
    return message.body
"""


@pytest.fixture(autouse=True)
def slow_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HANDLER_VARIABLE, str(HANDLER_S))


def start(supervised: Supervised, *args: str) -> Running:
    return supervised.start(
        "--app=peerd_chaos.chaos_apps:app", RECV_BUFFER, *args, peers=PEERS
    ).wait_registered()


def assert_the_rate_was_kept(load: Load, begun_s: float) -> None:
    """On a busy machine, the load itself may have too little CPU time."""
    if LONG:
        assert load.report().sent >= 0.8 * RATE * (time.monotonic() - begun_s)


def test_reloads_and_changes_of_size_lose_nothing(supervised: Supervised) -> None:
    chance = random.Random(9)
    # With fewer peers, each gets more than it can answer, and has to answer it before it ends.
    running = start(supervised, "--stop-timeout=60")
    commands = ["reload"] * RELOADS + ["scale"] * SCALINGS
    chance.shuffle(commands)
    backlogs = []
    begun_s = time.monotonic()
    with Load(running.ports, rate=RATE) as load:
        peers = PEERS
        for command in commands:
            backlogs.append(sum(peer["rx_queued_bytes"] for peer in running.status()["peers"]))
            if command == "reload":
                replaced = ask(running, "reload", timeout_s=100)["replaced"]
                assert len(replaced) == peers
                continue
            wanted = chance.choice([size for size in range(PEERS - 4, PEERS + 1) if size != peers])
            # A worker that leaves still answers its queue.
            load.remove(running.ports[wanted:peers])
            ask(running, "scale", timeout_s=100, peers=wanted)
            load.add(running.ports[peers:wanted])
            peers = wanted
        assert_the_rate_was_kept(load, begun_s)
        report = load.finish(timeout_s=60)
    assert_nothing_is_lost(report, running)
    assert sum(backlog > 0 for backlog in backlogs) > len(backlogs) / 2, backlogs


def test_the_counted_losses_of_kills_are_the_missing_replies(supervised: Supervised) -> None:
    chance = random.Random(3)
    metrics = free_ports()
    running = start(supervised, f"--metrics=localhost:{metrics}")
    begun_s = time.monotonic()
    with Load(running.ports, rate=RATE) as load:
        killed: set[int] = set()
        while len(killed) < KILLS:
            pid = serving(running, chance.randrange(PEERS), killed)
            send_signal(pid, signal.SIGKILL)
            killed.add(pid)
            # The moments of death are random on purpose.
            time.sleep(chance.uniform(0.0, 0.05))
        for slot in range(PEERS):
            serving(running, slot, killed)
        assert_the_rate_was_kept(load, begun_s)
        report = load.finish(timeout_s=120.0)
    assert report.finished
    assert (report.dropped, report.foreign) == (0, 0)
    assert (report.doubled, report.out_of_order) == (0, 0)
    peers = running.status()["peers"]
    assert sum(peer["restarts"] for peer in peers) >= KILLS
    assert [peer["rx_dropped"] for peer in peers] == [0] * PEERS
    missing = {peer["port"]: report.of(peer["port"]).missing for peer in peers}
    assert missing == {peer["port"]: peer["lost_in_flight"] for peer in peers}
    lines = http_get(metrics, "/metrics")[1].splitlines()
    lost = [line for line in lines if line.startswith("peerd_lost_in_flight_total{")]
    assert len(lost) == PEERS
    assert sum(float(line.rpartition(" ")[2]) for line in lost) == report.missing


def test_output_without_a_reader_loses_no_datagrams(supervised: Supervised) -> None:
    """Handlers print all the time, and the pipe is full after a moment."""
    pipe = subprocess.PIPE
    running = supervised.start(peers=PEERS, app=CHATTERING, stdout=pipe, stderr=pipe).wait_ready()
    begun_s = time.monotonic()
    with Load(running.ports, rate=RATE) as load:
        eventually(lambda: load.report().sent >= RATE * UNREAD_S, within_s=3 * UNREAD_S + 10)
        assert_the_rate_was_kept(load, begun_s)
        report = load.finish()
    assert_nothing_is_lost(report, running)
    assert running.stop() == 0
