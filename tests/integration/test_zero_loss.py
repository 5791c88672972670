"""Nothing is lost by what is meant to lose nothing, and what a kill costs is known exactly.

PEERD_LONG_TESTS=1 runs them at the size of a day: 20,000 datagrams a second over 8 peers.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from eventually import eventually
from peerd.chaos.app import HANDLER_VARIABLE
from peerd.chaos.load import Load, LoadReport
from peerd.supervisor import control
from supervised import Running, Supervised, free_ports, send_signal

LONG = os.environ.get("PEERD_LONG_TESTS") == "1"
PEERS = 8
RATE = 20_000.0 if LONG else 6_000.0
RELOADS = 50 if LONG else 5
SCALINGS = 20 if LONG else 4
KILLS = 100 if LONG else 12
UNREAD_S = 30.0 if LONG else 4.0
# Of the time between two datagrams of a peer; with what the kernel adds to a sleep, it is nearly all of it.
HANDLER_S = 0.75 * PEERS / RATE
RECV_BUFFER = "--recv-buffer=134217728"  # room for what a busy machine leaves undone

pytestmark = pytest.mark.timeout(600 if LONG else 120)

CHATTERING = """
import sys, peerd
app = peerd.App()

@app.handler("SEQ")
def echo(message):
    print("a line of what a handler says, which nobody reads", file=sys.stdout, flush=True)
    print("and another one", file=sys.stderr, flush=True)
    return message.body
"""


@pytest.fixture(autouse=True)
def slow_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HANDLER_VARIABLE, str(HANDLER_S))


def start(supervised: Supervised, *args: str) -> Running:
    running = supervised.start("--app=peerd.chaos.app:app", RECV_BUFFER, *args, peers=PEERS)
    running.wait_registered()
    return running


def assert_nothing_is_lost(report: LoadReport, running: Running) -> None:
    assert report.finished
    assert (report.dropped, report.foreign) == (0, 0)
    assert (report.missing, report.doubled, report.out_of_order) == (0, 0, 0)
    for peer in running.status()["peers"]:
        assert (peer["lost_in_flight"], peer["rx_dropped"], peer["restarts"]) == (0, 0, 0)


def test_reloads_and_changes_of_size_lose_nothing(supervised: Supervised) -> None:
    chance = random.Random(9)
    running = start(supervised)
    commands = ["reload"] * RELOADS + ["scale"] * SCALINGS
    chance.shuffle(commands)
    backlogs = []
    with Load(running.ports, rate=RATE) as load:
        peers = PEERS
        for command in commands:
            backlogs.append(sum(peer["rx_queued_bytes"] for peer in running.status()["peers"]))
            if command == "reload":
                replaced = control.request(running.control, "reload", timeout_s=60.0)["replaced"]
                assert len(replaced) == peers
                continue
            wanted = chance.choice([size for size in range(PEERS - 4, PEERS + 1) if size != peers])
            # Who leaves is still owed what is in its queue.
            load.remove(running.ports[wanted:peers])
            control.request(running.control, "scale", {"peers": wanted}, timeout_s=60.0)
            load.add(running.ports[peers:wanted])
            peers = wanted
        report = load.finish()
    assert_nothing_is_lost(report, running)
    assert sum(backlog > 0 for backlog in backlogs) > len(backlogs) / 2, backlogs


def test_what_kills_cost_is_what_is_missing(supervised: Supervised) -> None:
    chance = random.Random(3)
    metrics = f"localhost:{free_ports(1)}"
    running = start(supervised, f"--metrics={metrics}")
    with Load(running.ports, rate=RATE) as load:
        killed: set[int] = set()
        while len(killed) < KILLS:
            pid = serving(running, chance.randrange(PEERS), killed)
            send_signal(pid, signal.SIGKILL)
            killed.add(pid)
            # When the next one dies is the test's subject: not always in the same place.
            time.sleep(chance.uniform(0.0, 0.05))
        for slot in range(PEERS):
            serving(running, slot, killed)
        report = load.finish(timeout_s=120.0)
    assert report.finished
    assert (report.dropped, report.foreign) == (0, 0)
    assert (report.doubled, report.out_of_order) == (0, 0)
    peers = running.status()["peers"]
    assert sum(peer["restarts"] for peer in peers) >= KILLS
    assert [peer["rx_dropped"] for peer in peers] == [0] * PEERS
    missing = {peer["port"]: report.of(peer["port"]).missing for peer in peers}
    assert missing == {peer["port"]: peer["lost_in_flight"] for peer in peers}
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    lost = [line for line in lines if line.startswith("peerd_lost_in_flight_total{")]
    assert len(lost) == PEERS
    assert sum(float(line.rpartition(" ")[2]) for line in lost) == report.missing


def serving(running: Running, slot: int, killed: set[int]) -> int:
    """The pid of a slot's worker, once it has one that serves. One that is put off is started."""

    def pid() -> int | None:
        peer = running.peer(slot)
        if peer["state"] in ("backoff", "crashloop"):
            control.request(running.control, "restart", {"slot": slot}, timeout_s=30.0)
        # Of one that was killed just now, the supervisor may not know yet.
        return peer["pid"] if peer["state"] == "ready" and peer["pid"] not in killed else None

    found = eventually(pid, within_s=30)
    assert found is not None
    return found


def test_nobody_reads_what_it_says(supervised: Supervised, tmp_path: Path) -> None:
    """Handlers print all the time, and what takes it is full after a moment."""
    (tmp_path / "chattering.py").write_text(CHATTERING)
    path = tmp_path / "control.sock"
    base_port = free_ports(PEERS)
    command = [sys.executable, "-m", "peerd", "supervise", f"--peers={PEERS}"]
    command += [f"--base-port={base_port}", f"--etcd={supervised.etcd}", "--app=chattering:app"]
    with unread([*command, f"--control={path}", "--prefix=unread"], tmp_path):
        eventually(lambda: all_ready(path), within_s=15)
        with Load(range(base_port, base_port + PEERS), rate=RATE) as load:
            # The time is the test's subject.
            time.sleep(UNREAD_S)
            sent = load.report().sent
            report = load.finish()
        assert sent >= 0.8 * RATE * UNREAD_S
        assert report.finished
        assert (report.missing, report.doubled, report.out_of_order) == (0, 0, 0)
        peers = control.request(path, "status")["peers"]
        assert [peer["rx_dropped"] for peer in peers] == [0] * PEERS


@contextmanager
def unread(command: list[str], cwd: Path) -> Iterator[None]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd
    )
    try:
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.communicate()


def all_ready(path: Path) -> bool:
    return all(peer["state"] == "ready" for peer in control.request(path, "status")["peers"])
