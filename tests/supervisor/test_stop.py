"""Stopping a supervisor at bad moments: repeated signals, during a start or a reload, on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from harness import raw_client
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

TTL_S = 10
"""The default."""

NEVER_LOADED = f"import time\ntime.sleep(60)\n{HANGS}"


def start(supervised: Supervised, *args: str, peers: int = 2, etcd: str | None = None) -> Running:
    write_app(supervised, HANGS)
    running = supervised.start("--app=stopped:app", LATE, *args, peers=peers, etcd=etcd)
    running.wait_registered()
    return running


def write_app(supervised: Supervised, source: str) -> None:
    (supervised.folder / "stopped.py").write_text(source)


def hang(running: Running, slot: int) -> None:
    raw_client.send(running.ports[slot], b"HANG")
    eventually(lambda: running.peer(slot)["rx_messages"] == 1)


PACKAGE = str(Path(__file__).parents[2] / "peerd")
QUICK_S = 15.0
"""On any machine sooner than the kill of workers at the end of a stop with LATE."""

LATE = "--stop-timeout=20"


def tree_of(running: Running) -> list[int]:
    return [process.pid for process in running.tree()]


def assert_records_go(running: Running) -> None:
    """On a busy machine, a hurried stop may leave them until their leases run out."""
    eventually(lambda: not has_records(running))


def has_records(running: Running) -> bool:
    with Registry(running.etcd, running.prefix) as registry:
        return bool(registry.nodes())


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    send_signal(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            send_signal(pid, signal.SIGCONT)


def test_a_third_signal_kills_all_processes_that_are_left(supervised: Supervised) -> None:
    with EmbeddedEtcd() as etcd:
        running = start(supervised, "--ttl=2", etcd=etcd.endpoint)
        tree = tree_of(running)
        hang(running, 0)
        with stopped(etcd.pid):
            running.signal(signal.SIGTERM)
            eventually(lambda: "SIGTERM: stopping" in running.err)
            running.signal(signal.SIGINT)
            eventually(lambda: "second signal: stopping at once" in running.err)
            begun_s = time.monotonic()
            running.signal(signal.SIGTERM)
            assert running.wait(60) == 0
            assert time.monotonic() - begun_s < QUICK_S
        assert "signal 3: SIGKILL for all that is left" in running.err
        assert not alive(tree)
        assert not running.control.exists()
        assert "Traceback" not in running.err


def test_a_second_signal_ends_it_without_etcd(supervised: Supervised) -> None:
    with EmbeddedEtcd() as etcd:
        running = start(supervised, "--ttl=2", etcd=etcd.endpoint)
        tree = tree_of(running)
        hang(running, 0)
        with stopped(etcd.pid):
            running.signal(signal.SIGTERM)
            eventually(lambda: "SIGTERM: stopping" in running.err)
            begun_s = time.monotonic()
            running.signal(signal.SIGTERM)
            assert running.wait(60) == 0
            assert time.monotonic() - begun_s < QUICK_S
        assert not alive(tree)


def test_two_signals_within_ten_milliseconds(supervised: Supervised) -> None:
    running = start(supervised)
    tree = tree_of(running)
    hang(running, 1)
    begun_s = time.monotonic()
    running.signal(signal.SIGTERM)
    time.sleep(0.005)  # two pending signals are merged (signal(7))
    running.signal(signal.SIGTERM)
    assert running.wait(60) == 0
    assert time.monotonic() - begun_s < QUICK_S
    assert not alive(tree)
    assert_records_go(running)


def test_ten_signals_at_the_same_time(supervised: Supervised) -> None:
    running = start(supervised)
    tree = tree_of(running)
    hang(running, 1)
    begun_s = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTTIN) * 3:
            running.signal(number)
            time.sleep(0.002)
    assert running.wait(60) in (0, 130)
    assert time.monotonic() - begun_s < QUICK_S
    assert not alive(tree)
    assert "Traceback" not in running.err


def test_the_log_names_the_workers_that_a_stop_waits_for(supervised: Supervised) -> None:
    running = start(supervised, "--stop-timeout=3.5", peers=3)
    first, second, third = running.ports
    tree = tree_of(running)
    stopped_pid = pids(running)[1]
    hang(running, 0)
    send_signal(stopped_pid, signal.SIGSTOP)
    for _ in range(10):
        raw_client.send(second, b"PING", bytes(1000))
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    assert not alive(tree)
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
    # Unread datagrams are lost, and logged.
    assert "datagrams in the queue when its port was closed: 10" in running.err
    assert_records_go(running)


def test_the_log_names_the_registrar_that_a_stop_waits_for(supervised: Supervised) -> None:
    running = start(supervised, "--stop-timeout=3.5")
    registrar = running.registrar()
    tree = tree_of(running)
    registrar.suspend()
    begun_s = time.monotonic()
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    assert 3 < time.monotonic() - begun_s < QUICK_S
    assert not alive(tree)
    assert "the registrar has not stopped in time: SIGKILL" in running.err
    assert "waiting for: registrar" in running.err


def test_a_signal_while_workers_load(supervised: Supervised) -> None:
    write_app(supervised, NEVER_LOADED)
    running = supervised.start("--app=stopped:app", LATE, peers=3)
    eventually(lambda: len(running.tree()) == 5)
    eventually(running.status)
    tree = tree_of(running)
    begun_s = time.monotonic()
    running.signal(signal.SIGTERM)
    assert running.wait(60) == 0
    assert time.monotonic() - begun_s < QUICK_S
    assert not alive(tree)
    assert "ERROR" not in running.err
    assert "Traceback" not in running.err


def test_a_signal_at_any_moment_of_the_start(supervised: Supervised) -> None:
    generator = random.Random(6)
    base_port = free_ports(4)
    write_app(supervised, HANGS)
    for attempt in range(12):
        running = supervised.start("--app=stopped:app", peers=4, base_port=base_port)
        # This does not wait for a fact on purpose: the signal comes at any moment.
        time.sleep(0.5 * generator.random())
        tree = tree_of(running)
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


def test_a_signal_while_a_successor_loads(supervised: Supervised) -> None:
    running = start(supervised)
    write_app(supervised, NEVER_LOADED)
    reload = Asked(running, "reload")
    eventually(lambda: len(running.tree()) == 5)
    tree = tree_of(running)
    begun_s = time.monotonic()
    running.signal(signal.SIGTERM)
    with pytest.raises(ControlError, match="stopping"):
        reload.answer()
    assert running.wait(60) == 0
    assert time.monotonic() - begun_s < QUICK_S
    assert not alive(tree)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_signal_while_a_socket_is_handed_over(supervised: Supervised, goes_on: bool) -> None:
    """The successor serves the queue; or the predecessor does not leave the socket, and both are killed."""
    running = start(supervised, "--stop-timeout=3", peers=1)
    (pid,) = pids(running)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(30)
        client.connect(("127.0.0.1", running.ports[0]))
        client.send(raw_client.pack(b"SECOND" if goes_on else b"HANG", b"1.0", b""))
        eventually(lambda: running.peer(0)["rx_messages"] == 1)
        for number in range(20):
            client.send(raw_client.pack(b"PING", b"1.0", b"%d" % number))
        before = tree_of(running)
        reload = Asked(running, "reload")
        (successor,) = eventually(lambda: set(tree_of(running)) - set(before))
        eventually(lambda: waits_for_permission(successor))
        running.signal(signal.SIGTERM)
        if goes_on:
            bodies = {raw_client.unpack(client.recv(1 << 16))[2] for _ in range(20)}
            assert len(bodies) == 20
        assert running.wait() == 0
    with contextlib.suppress(ControlError):  # the supervisor was stopping already
        reload.answer()
    assert not alive([pid, successor, *before])
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


def test_a_stopped_worker_is_killed_in_the_end(supervised: Supervised) -> None:
    running = start(supervised, "--stop-timeout=1")
    tree = tree_of(running)
    send_signal(pids(running)[1], signal.SIGSTOP)
    begun_s = time.monotonic()
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    assert 0.4 < time.monotonic() - begun_s < QUICK_S
    assert not alive(tree)
    assert_records_go(running)


def test_a_parked_peer_does_not_delay_a_stop(supervised: Supervised) -> None:
    running = start(supervised, peers=2)
    write_app(supervised, "import os\nos._exit(3)\n")
    send_signal(pids(running)[0], signal.SIGKILL)
    eventually(lambda: running.peer(0)["state"] == "crashloop")
    begun_s = time.monotonic()
    running.signal(signal.SIGTERM)
    assert running.wait(60) == 0
    assert time.monotonic() - begun_s < QUICK_S


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
    (supervised.folder / "late.py").write_text(LATE_REPLY)
    running = supervised.start("--app=late:app", peers=1)
    running.wait_registered()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(raw_client.pack(b"LATE", b"1", b""), ("127.0.0.1", running.ports[0]))
    eventually(lambda: running.peer(0)["rx_messages"] == 1)
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    assert running.err.count("loaded") == 1
    assert "when its port was closed" not in running.err


class Terminal:
    """``peerd supervise`` in the foreground of a terminal."""

    def __init__(self, supervised: Supervised) -> None:
        write_app(supervised, HANGS)
        self.port = free_ports(2)
        self.control = supervised.folder / "control"
        self._ours, theirs = pty.openpty()
        # setsid makes it the session of the terminal, as a shell does, so ^C becomes a signal.
        command = ["setsid", "--ctty", sys.executable, "-m", "peerd", "supervise", "--peers=2"]
        command += [f"--base-port={self.port}", f"--etcd={supervised.etcd}", "--prefix=typed"]
        command += ["--app=stopped:app", f"--control={self.control}", LATE]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=supervised.folder
        )
        os.close(theirs)
        self._seen = b""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    @property
    def screen(self) -> str:
        with contextlib.suppress(OSError):  # EIO: no process has it open any more
            while select.select([self._ours], [], [], 0)[0]:
                self._seen += os.read(self._ours, 1 << 16)
        return self._seen.decode()

    def tree(self) -> list[int]:
        supervisor = psutil.Process(self.process.pid)
        return [child.pid for child in (supervisor, *supervisor.children(recursive=True))]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(supervised: Supervised) -> Iterator[Terminal]:
    terminal = Terminal(supervised)
    try:
        eventually(lambda: "all 2 peers are registered" in terminal.screen)
        yield terminal
    finally:
        terminal.close()


def test_ctrl_c_stops_cleanly(terminal: Terminal) -> None:
    tree = terminal.tree()
    assert len(tree) == 4
    terminal.type("\x03")
    assert terminal.process.wait(60) == 130
    assert not alive(tree)
    assert "SIGINT: stopping" in terminal.screen
    assert "Traceback" not in terminal.screen
    assert "ERROR" not in terminal.screen
    assert "KeyboardInterrupt" not in terminal.screen


def test_ctrl_c_twice_stops_quickly(terminal: Terminal) -> None:
    tree = terminal.tree()
    raw_client.send(terminal.port, b"HANG")
    with pytest.raises(TimeoutError):
        raw_client.request(terminal.port, b"PING", b"", 0.2)
    terminal.type("\x03")
    eventually(lambda: "SIGINT: stopping" in terminal.screen)
    begun_s = time.monotonic()
    terminal.type("\x03")
    assert terminal.process.wait(60) == 130
    assert time.monotonic() - begun_s < QUICK_S
    assert not alive(tree)
    assert "Traceback" not in terminal.screen


def test_a_closed_terminal_is_no_ctrl_c(terminal: Terminal) -> None:
    """SIGHUP is a reload; writing to the closed terminal afterwards harms nothing."""
    before = terminal.tree()
    os.kill(terminal.process.pid, signal.SIGHUP)
    eventually(lambda: "has taken over" in terminal.screen)
    assert terminal.tree()[0] == before[0]
    assert raw_client.request(terminal.port, b"PING", b"x")[2] == b"x"
