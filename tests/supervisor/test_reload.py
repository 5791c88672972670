"""Workers that are replaced while they serve: nothing is lost, doubled or reordered."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from harness.command import command, peerd, started
from harness.eventually import eventually
from harness.supervised import Running, Supervised, is_gone, send_signal
from harness.supervisor_requests import Asked, death_of, events, pids
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


def version_of(running: Running, slot: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(30)
        client.connect(("127.0.0.1", running.ports[slot]))
        client.send(encode("VERSION", "1"))
        return decode(client.recv(2048)).body


def start(supervised: Supervised, source: str, *args: str, peers: int = 2) -> Running:
    (supervised.folder / "reloaded.py").write_text(source)
    running = supervised.start("--app=reloaded:app", *args, peers=peers)
    running.wait_registered()
    return running


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
            (supervised.folder / "reloaded.py").write_text(new)
            done = peerd("reload", "--json", f"--control={running.control}")
            assert done.returncode == 0, done.stderr
            replaced = orjson.loads(done.stdout)["replaced"]
            assert [row["old_pid"] for row in replaced] == seen[-1]
            seen.append([row["pid"] for row in replaced])
            assert seen[-1] == pids(running)
        marker = registry.register(next(iter(registry.nodes())).__class__("marker", 1))
        assert next(watch).record == marker.record, "no record has changed meanwhile"
        report = load.finish()
    assert (report.missing, report.doubled, report.finished) == (0, 0, True)
    if source is PLAIN:
        assert report.out_of_order == 0
    assert version_of(running, 0) == version_of(running, 1) == b"6"
    for peer in running.status()["peers"]:
        assert (peer["restarts"], peer["lost_in_flight"], peer["rx_dropped"]) == (0, 0, 0)


def test_a_successor_that_cannot_start_leaves_the_worker_serving(supervised: Supervised) -> None:
    running = start(supervised, PLAIN)
    before = pids(running)
    (supervised.folder / "reloaded.py").write_text(
        "import peerd\nraise ValueError('broken today')\n"
    )
    for words in (["reload"], ["restart", "1"]):
        done = peerd(*words, f"--control={running.control}")
        assert done.returncode == 1
        assert "ValueError: broken today" in done.stderr
        assert done.stderr.count("Traceback") == 1
        assert pids(running) == before
    assert version_of(running, 0) == version_of(running, 1) == b"1"
    assert all(peer["restarts"] == 0 for peer in running.status()["peers"])


def test_a_broken_app_loses_nothing_under_load(supervised: Supervised) -> None:
    """Both SIGHUP and the command try one successor, and its traceback is logged once."""
    running = start(supervised, PLAIN, peers=8)
    before = pids(running)
    with Load(running.ports, rate=4_000.0) as load:
        eventually(lambda: load.report().sent > 1_000)
        (supervised.folder / "reloaded.py").write_text(
            "import peerd\nraise ValueError('broken today')\n"
        )
        running.signal(signal.SIGHUP)
        eventually(lambda: "ValueError: broken today" in running.err)
        done = peerd("reload", f"--control={running.control}")
        assert done.returncode == 1
        assert done.stderr.count("Traceback") == 1
        assert "ValueError: broken today" in done.stderr
        sent = load.report().sent
        eventually(lambda: load.report().sent > sent + 1_000)
        report = load.finish()
    assert report.finished
    assert (report.dropped, report.foreign) == (0, 0)
    assert (report.missing, report.doubled, report.out_of_order) == (0, 0, 0)
    assert pids(running) == before
    assert running.err.count("Traceback") == 2
    for peer in running.status()["peers"]:
        assert (peer["restarts"], peer["lost_in_flight"], peer["rx_dropped"]) == (0, 0, 0)
    assert len(events(running, "not replaced")) == 2
    assert running.status()["supervisor"]["state"] == "ready"


def test_sighup_reloads(supervised: Supervised) -> None:
    running = start(supervised, PLAIN)
    before = pids(running)
    running.signal(signal.SIGHUP)
    eventually(lambda: not set(pids(running)) & set(before))
    running.wait_ready()


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


def test_a_worker_that_dies_while_its_successor_loads(supervised: Supervised) -> None:
    running = start(supervised, PLAIN)
    (supervised.folder / "reloaded.py").write_text(f"import time\ntime.sleep(1)\n{PLAIN}")
    old = pids(running)[0]
    with started(
        command("restart", "0", f"--control={running.control}"), stdout=subprocess.PIPE
    ) as restart:
        eventually(lambda: len(running.tree()) == 5)  # and the registrar
        send_signal(old, signal.SIGKILL)
        out, _ = restart.communicate(timeout=60)
    assert restart.returncode == 0
    assert str(pids(running)[0]) in out.decode()
    assert version_of(running, 0) == b"1"
    assert running.peer(0)["restarts"] == 1


def test_a_parked_worker_can_be_restarted(supervised: Supervised) -> None:
    running = start(supervised, PLAIN)
    (supervised.folder / "reloaded.py").write_text("raise ValueError('broken')\n")
    send_signal(pids(running)[0], signal.SIGKILL)
    eventually(lambda: running.peer(0)["state"] == "crashloop")
    (supervised.folder / "reloaded.py").write_text(PLAIN)
    assert peerd("restart", "0", f"--control={running.control}").returncode == 0
    assert running.peer(0)["state"] == "ready"


def test_a_stop_interrupts_a_reload(supervised: Supervised) -> None:
    running = start(supervised, PLAIN)
    (supervised.folder / "reloaded.py").write_text(f"import time\ntime.sleep(60)\n{PLAIN}")
    with started(
        command("reload", f"--control={running.control}"), stderr=subprocess.PIPE, text=True
    ) as reload:
        eventually(lambda: len(running.tree()) == 5)
        tree = [process.pid for process in running.tree()]
        done = peerd("stop", f"--control={running.control}")
        assert (done.returncode, done.stdout) == (0, f"supervisor pid {running.pid} has stopped\n")
        assert running.wait() == 0
        _, said = reload.communicate(timeout=60)
    assert reload.returncode == 1
    assert "stopping" in said or "ended before it was ready" in said
    eventually(lambda: all(is_gone(pid) for pid in tree))


STUCK = """
import time, peerd
app = peerd.App()

@app.handler("SPIN")
def spin(message):
    while True: pass  # here

@app.handler("SLEEP")
def sleep(message):
    time.sleep(600)  # here

@app.handler("SEQ")
def answer(message):
    return message.body
"""


@pytest.mark.parametrize("magic", ["SPIN", "SLEEP"])
def test_a_stuck_worker_is_killed_and_its_stack_is_in_the_log(
    supervised: Supervised, magic: str
) -> None:
    running = start(supervised, STUCK, "--stuck-timeout=1.5")
    stuck, well = pids(running)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", running.ports[0]))
        client.send(encode(magic, "1"))
        eventually(lambda: running.peer(0)["pid"] not in (stuck, None))
    running.wait_ready()
    assert pids(running)[1] == well
    assert "is stuck" in running.err
    line = 1 + STUCK.splitlines().index(
        "    while True: pass  # here" if magic == "SPIN" else "    time.sleep(600)  # here"
    )
    assert f'reloaded.py", line {line} in {magic.lower()}' in running.err
    assert running.peer(0)["lost_in_flight"] == 1


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
        (successor,) = [process.pid for process in running.tree() if process.pid not in known]
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
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(30)
        client.connect(("127.0.0.1", running.ports[0]))
        client.send(encode("WAIT", "1"))
        eventually(lambda: running.peer(0)["rx_messages"] == 1)
        restart = Asked(running, "restart", slot=0)
        eventually(lambda: waits_to_leave(running.peer(0), pid))
        yield client, restart


def waits_to_leave(peer: dict[str, Any], pid: int) -> bool:
    """Its loop has stopped."""
    return bool(peer["pid"] == pid and peer["heartbeat_age_s"] > 0.6)


def test_events_show_what_has_happened(supervised: Supervised) -> None:
    running = start(supervised, PLAIN)
    first, second = pids(running)
    assert peerd("restart", "1", f"--control={running.control}").returncode == 0
    send_signal(first, signal.SIGKILL)
    eventually(lambda: running.peer(0)["pid"] not in (first, None))
    running.wait_ready()
    shown = peerd("events", "--json", f"--control={running.control}")
    told = [orjson.loads(line) for line in shown.stdout.splitlines()]
    assert [event["number"] for event in told] == list(range(1, len(told) + 1))
    replaced = next(event for event in told if event["event"] == "replaced")
    assert (replaced["old_pid"], replaced["pid"]) == (second, pids(running)[1])
    died = next(event for event in told if event["event"] == "died")
    assert (died["pid"], died["how"], died["lost_in_flight"]) == (first, "killed by SIGKILL", 0)
    assert died["ready_for_s"] > 0
    text = peerd("events", f"--control={running.control}").stdout
    assert (
        f"died          localhost:{running.ports[0]}  pid={first}  generation=1  how='killed by SIGKILL'"
        in text
    )


def test_a_stopped_worker_is_not_killed(supervised: Supervised) -> None:
    running = start(supervised, STUCK, "--stuck-timeout=1")
    before = pids(running)
    send_signal(before[0], signal.SIGSTOP)
    eventually(lambda: running.peer(0)["heartbeat_age_s"] > 4.0)
    send_signal(before[0], signal.SIGCONT)
    eventually(lambda: running.peer(0)["heartbeat_age_s"] < 1.0)
    assert pids(running) == before
