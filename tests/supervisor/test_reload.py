"""Workers that are replaced while they serve: nothing is lost, doubled or reordered."""

import contextlib
import signal
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from harness import raw_client
from harness.command import command, peerd, started
from harness.eventually import eventually
from harness.supervised import Running, Supervised, send_signal
from harness.supervisor_requests import Asked, assert_nothing_is_lost, death_of, events, pids
from peerd import decode, encode
from peerd.errors import ControlError
from peerd.registry import Joined, Registry
from peerd_chaos.load import Load

PLAIN = """
import time, peerd
app = peerd.App()
VERSION = 1

@app.handler("SEQ")
def answer(message):
    time.sleep(0.0002)  # a backlog, most of the time
    return message.body

@app.handler("VERSION")
def version(message):
    return b"%d" % VERSION
"""

COROUTINE = PLAIN.replace("import time", "import asyncio, time").replace(
    "def answer(message):\n    time.sleep(0.0002)",
    "async def answer(message):\n    await asyncio.sleep(0.001)",
)


BROKEN = "import peerd\nraise ValueError('broken today')\n"


def version_of(running: Running, slot: int) -> bytes:
    return raw_client.request(running.ports[slot], b"VERSION", b"", 30)[2]


def start(supervised: Supervised, source: str, *args: str, peers: int = 2) -> Running:
    return supervised.start(*args, peers=peers, app=source).wait_registered()


@pytest.mark.parametrize("source", [PLAIN, COROUTINE], ids=["plain", "coroutine"])
def test_reloads_under_load_lose_nothing(supervised: Supervised, source: str) -> None:
    running = start(supervised, source, "--recv-buffer=67108864")  # the time that a command takes
    seen = [pids(running)]
    with (
        Registry(running.etcd, running.prefix) as registry,
        registry.watch() as watch,
        Load(running.ports, rate=6000) as load,
    ):
        assert [type(next(watch)) for _ in range(2)] == [Joined, Joined]
        for number in range(2, 7):
            new = source.replace("VERSION = 1", f"VERSION = {number}")
            supervised.write_app(new)
            done = peerd("reload", "--json", f"--control={running.control}")
            assert done.returncode == 0, done.stderr
            replaced = orjson.loads(done.stdout)["replaced"]
            assert [row["old_pid"] for row in replaced] == seen[-1]
            seen.append([row["pid"] for row in replaced])
            assert seen[-1] == pids(running)
        marker = registry.register(next(iter(registry.nodes())).__class__("marker", 1))
        assert next(watch).record == marker.record, "no record has changed meanwhile"
        report = load.finish()
    assert_nothing_is_lost(report, running, in_order=source is PLAIN)
    assert version_of(running, 0) == version_of(running, 1) == b"6"


def test_a_successor_that_cannot_start_leaves_the_worker_serving(supervised: Supervised) -> None:
    """Without a worker, the peer is parked until the app is repaired."""
    running = start(supervised, PLAIN)
    before = pids(running)
    supervised.write_app(BROKEN)
    for words in (["reload"], ["restart", "1"]):
        done = peerd(*words, f"--control={running.control}")
        assert done.returncode == 1
        assert "ValueError: broken today" in done.stderr
        assert done.stderr.count("Traceback") == 1
        assert pids(running) == before
    assert version_of(running, 0) == version_of(running, 1) == b"1"
    assert all(peer["restarts"] == 0 for peer in running.status()["peers"])
    send_signal(before[0], signal.SIGKILL)
    eventually(lambda: running.peer(0)["state"] == "crashloop")
    supervised.write_app(PLAIN)
    assert peerd("restart", "0", f"--control={running.control}").returncode == 0
    assert running.peer(0)["state"] == "ready"


def test_a_broken_app_loses_nothing_under_load(supervised: Supervised) -> None:
    """Both SIGHUP and the command try one successor, and its traceback is logged once."""
    running = start(supervised, PLAIN, peers=8)
    before = pids(running)
    with Load(running.ports, rate=4_000.0) as load:
        eventually(lambda: load.report().sent > 1_000)
        supervised.write_app(BROKEN)
        running.signal(signal.SIGHUP)
        eventually(lambda: "ValueError: broken today" in running.err)
        done = peerd("reload", f"--control={running.control}")
        assert done.returncode == 1
        assert done.stderr.count("Traceback") == 1
        assert "ValueError: broken today" in done.stderr
        sent = load.report().sent
        eventually(lambda: load.report().sent > sent + 1_000)
        report = load.finish()
    assert_nothing_is_lost(report, running)
    assert pids(running) == before
    assert running.err.count("Traceback") == 2
    assert len(events(running, "not replaced")) == 2
    assert running.status()["supervisor"]["state"] == "ready"


def test_a_restart_of_one_slot_leaves_the_other_one_alone(supervised: Supervised) -> None:
    running = start(supervised, PLAIN)
    first, second = pids(running)
    done = peerd("restart", "1", f"--control={running.control}")
    assert (done.returncode, str(second) in done.stdout) == (0, True)
    assert pids(running)[0] == first
    assert pids(running)[1] != second
    done = peerd("restart", "2", f"--control={running.control}")
    assert (done.returncode, "there are 0 to 1" in done.stderr) == (1, True)


def test_commands_wait_for_each_other(supervised: Supervised) -> None:
    running = start(supervised, f"import time\ntime.sleep(0.3)\n{PLAIN}")
    with contextlib.ExitStack() as stack:
        commands = [
            stack.enter_context(
                started(command(*words, f"--control={running.control}"), stdout=subprocess.DEVNULL)
            )
            for words in (["reload"], ["restart", "0"], ["restart", "1"], ["reload"])
        ]
        assert [each.wait(60) for each in commands] == [0, 0, 0, 0]
    running.wait_ready()


def test_a_coroutine_that_blocks_a_replacement_is_cut_off_once_stuck(
    supervised: Supervised,
) -> None:
    """The datagrams that it had in hand are counted as lost, its queue is served by the successor."""
    running = start(supervised, WAITS, "--stuck-timeout=1.5")
    before = pids(running)
    with held_up(running) as (client, restart):
        client.send(encode("SEQ", "1", b"in the queue"))
        assert decode(client.recv(2048)).body == b"in the queue"
    (replaced,) = restart.answer()["replaced"]
    died = death_of(running, before[0])
    assert (died["cause"], died["lost_in_flight"]) == ("stuck", 1)
    peer = running.peer(0)
    assert (replaced["old_pid"], replaced["pid"]) == (before[0], peer["pid"])
    assert (peer["lost_in_flight"], peer["rx_messages"]) == (1, 2)
    assert pids(running)[1] == before[1]


def test_a_hand_over_to_a_successor_that_died_is_no_death(supervised: Supervised) -> None:
    """Nor is it a failure that delays the next restart."""
    running = start(supervised, WAITS.replace("600", "3"))
    before, registrar = pids(running), running.registrar().pid
    with held_up(running) as (client, restart):
        known = {running.pid, registrar, *before}
        (successor,) = set(running.tree_pids()) - known
        send_signal(successor, signal.SIGKILL)
        with pytest.raises(ControlError, match="killed by SIGKILL"):
            restart.answer()
        client.send(encode("SEQ", "1", b"in the queue"))
        assert decode(client.recv(2048)).body == b"in the queue"
    peer = running.peer(0)
    assert peer["pid"] not in (before[0], successor)
    assert (peer["restarts"], peer["last_exit"], peer["lost_in_flight"]) == (1, None, 0)
    assert not events(running, "died")


WAITS = """
import asyncio, peerd
app = peerd.App()

@app.handler("WAIT")
async def wait(message):
    await asyncio.sleep(600)

@app.handler("SEQ")
async def answer(message):
    return message.body
"""


@contextlib.contextmanager
def held_up(running: Running) -> Iterator[tuple[socket.socket, Asked]]:
    """A client, and the replacement of its peer, whose worker got HAND_OVER and waits for a handler."""
    (pid, *_) = pids(running)
    with raw_client.connected(running.ports[0]) as client:
        client.send(encode("WAIT", "1"))
        eventually(lambda: running.peer(0)["rx_messages"] == 1)
        restart = Asked(running, "restart", slot=0)
        eventually(lambda: waits_to_leave(running.peer(0), pid))
        yield client, restart


def waits_to_leave(peer: dict[str, Any], pid: int) -> bool:
    """Its loop has stopped."""
    return bool(peer["pid"] == pid and peer["heartbeat_age_s"] > 0.6)
