"""Stopping a supervisor at bad moments: repeated signals, during a start or a reload, on a terminal."""

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from harness import raw_client
from harness.command import peerd
from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Running, Supervised, alive, send_signal
from harness.supervisor_requests import Asked, ask, pids
from peerd.errors import ControlError
from peerd.registry import Registry
from peerd.registry.embedded_etcd import EmbeddedEtcd

HANGS = """
import time
import peerd
from peerd.serving.app import builtin_app
app = builtin_app()

@app.handler("SECOND")
def second(message):
    time.sleep(1)

@app.handler("HANG")
def hang(message):
    while True: pass
"""

NEVER_LOADED = f"import time\ntime.sleep(60)\n{HANGS}"
PACKAGE = str(Path(__file__).parents[2] / "peerd")
QUICK_S = 15.0
"""On any machine sooner than the kill of workers at the end of a stop with LATE."""

LATE = "--stop-timeout=20"


def start(supervised: Supervised, *args: str, peers: int = 2, etcd: str | None = None) -> Running:
    return supervised.start(LATE, *args, peers=peers, etcd=etcd, app=HANGS).wait_registered()


def hang(running: Running, slot: int) -> None:
    raw_client.send(running.ports[slot], b"HANG")
    eventually(lambda: running.peer(slot)["rx_messages"] == 1)


def assert_records_go(running: Running) -> None:
    """On a busy machine, a hurried stop may leave them until their leases run out."""
    eventually(lambda: not has_records(running))


def has_records(running: Running) -> bool:
    with Registry(running.etcd, running.prefix) as registry:
        return bool(registry.nodes())


@contextmanager
def ending(running: Running, code: int = 0) -> Iterator[None]:
    """The block has the supervisor stop; soon afterwards, no process is left."""
    tree, begun_s = running.tree_pids(), time.monotonic()
    yield
    assert running.wait() == code
    assert time.monotonic() - begun_s < QUICK_S
    assert not alive(tree)
    assert not running.control.exists()
    assert "Traceback" not in running.err


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    send_signal(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            send_signal(pid, signal.SIGCONT)


@pytest.mark.parametrize("signals", [2, 3])
def test_repeated_signals_end_it_without_etcd(supervised: Supervised, signals: int) -> None:
    """The second stops without serving the queues, the third kills all processes that are left."""
    with EmbeddedEtcd() as etcd:
        running = start(supervised, "--ttl=2", etcd=etcd.endpoint)
        hang(running, 0)
        with stopped(etcd.pid), ending(running):
            running.signal(signal.SIGTERM)
            eventually(lambda: "SIGTERM: stopping" in running.err)
            running.signal(signal.SIGINT)
            if signals == 3:
                eventually(lambda: "second signal: stopping at once" in running.err)
                running.signal(signal.SIGTERM)
    assert ("signal 3: SIGKILL for all that is left" in running.err) is (signals == 3)


@pytest.mark.parametrize("pause", ["a moment", "until the first is logged"])
def test_a_second_signal_stops_quickly(supervised: Supervised, pause: str) -> None:
    running = start(supervised, *([] if pause == "a moment" else ["--ttl=60"]))
    hang(running, 1)
    with ending(running):
        running.signal(signal.SIGTERM)
        if pause == "a moment":
            time.sleep(0.005)  # two pending signals are merged (signal(7))
        else:
            eventually(lambda: "SIGTERM" in running.err)
        running.signal(signal.SIGTERM)
    assert_records_go(running)


def test_ten_signals_at_the_same_time(supervised: Supervised) -> None:
    running = start(supervised)
    tree = running.tree_pids()
    hang(running, 1)
    begun_s = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTTIN) * 3:
            running.signal(number)
            time.sleep(0.002)
    assert running.wait() in (0, 130)
    assert time.monotonic() - begun_s < QUICK_S
    assert not alive(tree)
    assert "Traceback" not in running.err


def test_the_log_names_the_workers_that_a_stop_waits_for(supervised: Supervised) -> None:
    running = start(supervised, "--stop-timeout=3.5", peers=3)
    first, second, third = running.ports
    stopped_pid = pids(running)[1]
    hang(running, 0)
    send_signal(stopped_pid, signal.SIGSTOP)
    raw_client.send(second, b"PING", bytes(1000), 10)
    with ending(running):
        running.signal(signal.SIGTERM)
    # Every second, until the workers are killed after 2.5 s.
    first_notice, last_notice, *_ = (
        line for line in running.err.splitlines() if "waiting for: " in line
    )
    for line in (first_notice, last_notice):
        assert re.search(r"stopping for [12] s; waiting for: ", line)
        for port in (first, second):
            who = f"worker of localhost:{port}"
            assert re.search(rf"{who} \(its loop is blocked for \d+ s\)", line) or (
                line == first_notice and who in line
            )
    assert f"worker of localhost:{third}" not in last_notice
    for port in (first, second):
        assert f"the worker of localhost:{port} has not stopped in time: SIGKILL" in running.err
    assert f"the worker of localhost:{third}" not in running.err
    assert "registrar has not stopped" not in running.err
    # Unread datagrams are lost, and logged.
    assert "datagrams in the queue when its port was closed: 10" in running.err
    assert not has_records(running)


def test_the_log_names_the_registrar_that_a_stop_waits_for(supervised: Supervised) -> None:
    running = start(supervised, "--stop-timeout=3.5")
    running.registrar().suspend()
    begun_s = time.monotonic()
    with ending(running):
        running.signal(signal.SIGTERM)
    assert time.monotonic() - begun_s > 3
    assert "the registrar has not stopped in time: SIGKILL" in running.err
    assert "waiting for: registrar" in running.err


def test_a_signal_while_workers_load(supervised: Supervised) -> None:
    running = supervised.start(LATE, peers=3, app=NEVER_LOADED)
    eventually(lambda: len(running.tree()) == 5)
    eventually(running.status)
    with ending(running):
        running.signal(signal.SIGTERM)
    assert "ERROR" not in running.err


def test_a_signal_at_any_moment_of_the_start(supervised: Supervised) -> None:
    generator = random.Random(6)
    base_port = free_ports(4)
    for attempt in range(12):
        running = supervised.start(peers=4, base_port=base_port, app=HANGS)
        # This does not wait for a fact on purpose: the signal comes at any moment.
        time.sleep(0.5 * generator.random())
        tree = running.tree_pids()
        running.signal(signal.SIGINT if attempt % 2 else signal.SIGTERM)
        # Before the supervisor has set its handlers, a signal has its default effect. Python itself exits
        # with 1 if it receives a SIGINT while it starts.
        code = running.wait()
        python_starts = (
            code == 1 and "KeyboardInterrupt" in running.err and PACKAGE not in running.err
        )
        expected = (130, -signal.SIGINT) if attempt % 2 else (0, -signal.SIGTERM)
        assert code in expected or python_starts, running.err
        assert not alive(tree)
        assert not has_records(running)


def test_a_stop_while_a_successor_loads(supervised: Supervised) -> None:
    running = start(supervised)
    supervised.write_app(NEVER_LOADED)
    reload = Asked(running, "reload")
    eventually(lambda: len(running.tree()) == 5)
    with ending(running):
        done = peerd("stop", f"--control={running.control}")
        assert (done.returncode, done.stdout) == (0, f"supervisor pid {running.pid} has stopped\n")
        with pytest.raises(ControlError, match="stopping"):
            reload.answer()


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_signal_while_a_socket_is_handed_over(supervised: Supervised, goes_on: bool) -> None:
    """The successor serves the queue; or the predecessor does not leave the socket, and both are killed."""
    running = start(supervised, "--stop-timeout=3", peers=1)
    with raw_client.connected(running.ports[0]) as client:
        client.send(raw_client.pack(b"SECOND" if goes_on else b"HANG", b"1.0", b""))
        eventually(lambda: running.peer(0)["rx_messages"] == 1)
        for number in range(20):
            client.send(raw_client.pack(b"PING", b"1.0", b"%d" % number))
        before = running.tree_pids()
        reload = Asked(running, "reload")
        (successor,) = eventually(lambda: set(running.tree_pids()) - set(before))
        eventually(lambda: waits_for_permission(successor))
        running.signal(signal.SIGTERM)
        if goes_on:
            bodies = {raw_client.unpack(client.recv(1 << 16))[2] for _ in range(20)}
            assert len(bodies) == 20
        assert running.wait() == 0
    with contextlib.suppress(ControlError):  # the supervisor was stopping already
        reload.answer()
    assert not alive([successor, *before])
    assert_records_go(running)


def waits_for_permission(pid: int) -> bool:
    """It has loaded the app, and waits for the permission to serve."""
    where = Path(f"/proc/{pid}/wchan").read_text()
    if where not in ("", "0"):
        return "pipe_read" in where
    # Not readable for every user. A successor waits this long for nothing else.
    worker = psutil.Process(pid)
    before = worker.cpu_times()
    time.sleep(0.2)
    return worker.status() == psutil.STATUS_SLEEPING and worker.cpu_times() == before


def test_a_stopped_worker_does_not_block_a_reload(supervised: Supervised) -> None:
    running = start(supervised)
    first, second = pids(running)
    with stopped(first), pytest.raises(ControlError, match=r"is stopped .*: continue it first"):
        ask(running, "reload")
    assert pids(running) == [first, second]
    assert ask(running, "reload")["replaced"][0]["old_pid"] == first


def test_a_parked_peer_does_not_delay_a_stop(supervised: Supervised) -> None:
    running = start(supervised, peers=2)
    supervised.write_app("import os\nos._exit(3)\n")
    send_signal(pids(running)[0], signal.SIGKILL)
    eventually(lambda: running.peer(0)["state"] == "crashloop")
    with ending(running):
        running.signal(signal.SIGTERM)


LATE_REPLY = """
import asyncio
from peerd import App, Message

app = App()
print("loaded")

@app.handler("LATE")
async def late(message: Message) -> bytes:
    await asyncio.sleep(1)
    return b"too late"
"""


def test_an_icmp_error_is_no_queue(supervised: Supervised) -> None:
    """The ICMP error about the last reply takes room in the queue, but no worker is started for it."""
    running = supervised.start(peers=1, app=LATE_REPLY).wait_registered()
    raw_client.send(running.ports[0], b"LATE")
    eventually(lambda: running.peer(0)["rx_messages"] == 1)
    assert running.stop() == 0
    assert running.err.count("loaded") == 1
    assert "when its port was closed" not in running.err


@pytest.fixture
def in_terminal(supervised: Supervised) -> Running:
    running = supervised.start(LATE, peers=2, app=HANGS, on_terminal=True)
    eventually(lambda: "all 2 peers are registered" in running.err)
    assert len(running.tree()) == 4
    return running


def press_ctrl_c(running: Running) -> None:
    assert running.terminal
    running.terminal.type(b"\x03")


def test_ctrl_c_stops_cleanly(in_terminal: Running) -> None:
    with ending(in_terminal, code=130):
        press_ctrl_c(in_terminal)
    assert "SIGINT: stopping" in in_terminal.err
    assert "ERROR" not in in_terminal.err
    assert "KeyboardInterrupt" not in in_terminal.err


def test_ctrl_c_twice_stops_quickly(in_terminal: Running) -> None:
    hang(in_terminal, 0)
    with ending(in_terminal, code=130):
        press_ctrl_c(in_terminal)
        eventually(lambda: "SIGINT: stopping" in in_terminal.err)
        press_ctrl_c(in_terminal)


def test_a_closed_terminal_is_no_ctrl_c(in_terminal: Running) -> None:
    """SIGHUP is a reload; writing to the closed terminal afterwards harms nothing."""
    before = pids(in_terminal)
    os.kill(in_terminal.pid, signal.SIGHUP)
    eventually(lambda: "has taken over" in in_terminal.err)
    eventually(lambda: not set(pids(in_terminal)) & set(before))
    in_terminal.wait_ready()
    assert raw_client.request(in_terminal.ports[0], b"PING", b"x")[2] == b"x"
