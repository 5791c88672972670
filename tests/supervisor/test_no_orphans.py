"""No worker, and no process that a handler has started, outlives a supervisor that is killed at any moment.

The supervisor runs in its own session, so all its descendants are found in /proc by their session, including
those that the test could not count before the kill.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from harness import raw_client
from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Supervised, is_gone, send_signal
from peerd import control
from peerd.linux import SOL_UDP, UDP_SEGMENT

LONG = os.environ.get("PEERD_LONG_TESTS") == "1"
ATTEMPTS = 50 if LONG else 20
PEERS = 4
POLL_S = 0.002

APP = """
import os, subprocess, time, peerd
app = peerd.App()
subprocess.Popen(["sleep", "1000"])

@app.handler("PING")
def ping(message):
    return message.body

@app.handler("SPIN")
def spin(message):
    while True: pass

@app.handler("EXIT")
def leave(message):
    os._exit(3)

@app.handler("START")
def start(message):
    subprocess.Popen(["sleep", "1000"])
    subprocess.Popen("sleep 1000 & sleep 1000", shell=True)
    if os.fork() == 0:
        time.sleep(1000)

@app.handler("DAEMON")
def daemon(message):
    return b"%d" % subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
"""

STARTED = 5
"""Processes that START makes; three of them are the shell and its two children."""


class Family:
    """A supervisor and all its descendants."""

    def __init__(self, folder: Path, etcd: str, number: int, base_port: int) -> None:
        self.ports = range(base_port, base_port + PEERS)
        self.control = folder / f"control-{number}"
        command = [sys.executable, "-m", "peerd", "supervise", f"--peers={PEERS}"]
        command += [f"--base-port={base_port}", "--app=family:app", f"--control={self.control}"]
        command += [f"--etcd={etcd}", f"--prefix=family-{number}-{os.getpid()}"]
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        self.begun_s = time.monotonic()

    def members(self) -> list[int]:
        """The processes that have not ended."""
        found = []
        for name in os.listdir("/proc"):
            with suppress(ProcessLookupError):
                if name.isdigit() and os.getsid(int(name)) == self.process.pid:
                    found.append(int(name))
        return [pid for pid in found if not is_gone(pid)]

    def workers(self) -> list[int]:
        return [pid for pid in self.members() if "peerd: peer" in title(pid)]

    def is_ready(self) -> bool:
        peers = control.request(self.control, "status")["peers"]
        return all(peer["state"] == "ready" for peer in peers)

    def counts(self, members: int) -> bool:
        return len(self.members()) == members

    def kill(self) -> float:
        """Kill the supervisor; returns how many seconds passed until no process was left."""
        self.process.kill()
        killed_s = time.monotonic()
        while self.members():
            assert time.monotonic() < killed_s + 5, [title(pid) for pid in self.members()]
            time.sleep(POLL_S)
        gone_s = time.monotonic() - killed_s
        self.process.wait()
        return gone_s


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "family.py").write_text(APP)
    return tmp_path


@contextmanager
def family(folder: Path, etcd: str, number: int, base_port: int) -> Iterator[Family]:
    """None of its processes is left at the end, whatever happens."""
    it = Family(folder, etcd, number, base_port)
    try:
        yield it
    finally:
        while left := it.members():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)
        it.process.wait()


def title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


@contextmanager
def flood(ports: Sequence[int]) -> Iterator[None]:
    """Send more than the workers can answer, 60 datagrams per call."""
    stop = threading.Event()
    datagram = raw_client.pack(b"PING", b"1", bytes(80))

    def run() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setsockopt(SOL_UDP, UDP_SEGMENT, len(datagram))
            while not stop.is_set():
                for port in ports:
                    client.sendto(datagram * 60, ("127.0.0.1", port))
                time.sleep(0.0005)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def wait_until(moment_s: float) -> None:
    """This does not wait for a fact on purpose: the kill comes at any moment."""
    time.sleep(max(0.0, moment_s - time.monotonic()))


@pytest.mark.timeout(3600 if LONG else 300)
def test_no_process_outlives_a_killed_supervisor(folder: Path, etcd: str) -> None:
    chance = random.Random(5)
    base_port = free_ports(PEERS)
    took_s = []
    for number in range(ATTEMPTS):
        busy = ("flood", "spin", "stop")[number % 3]
        # Half of them while Python, the supervisor and the workers start, and half of these when the first
        # child is there; the rest at work.
        at_work, at_first_child = number % 4 > 1, number % 4 == 1
        after_s = chance.uniform(0, 0.05 if number % 8 == 0 else 0.5)
        with family(folder, etcd, number, base_port) as it, ExitStack() as stack:
            begun_s = it.begun_s
            if at_work:
                eventually(it.is_ready)
                expected = len(it.members()) + PEERS * STARTED
                for port in it.ports:
                    raw_client.send(port, b"START")
                eventually(partial(it.counts, expected))
                begun_s = time.monotonic()
            if busy == "flood":
                stack.enter_context(flood(it.ports))
            elif busy == "spin":
                for port in it.ports:
                    raw_client.send(port, b"SPIN")
            if at_first_child:
                while len(it.members()) < 2:
                    assert it.process.poll() is None
            else:
                wait_until(begun_s + after_s)
            if busy == "stop":
                for pid in it.workers():
                    send_signal(pid, signal.SIGSTOP)
            took_s.append(it.kill())
            for port in it.ports:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.bind(("127.0.0.1", port))
    assert max(took_s) <= 10.0, took_s


@pytest.mark.parametrize("end", ["kill", "exit", "reload"])
def test_processes_that_a_handler_has_started_end_with_its_worker(
    folder: Path, etcd: str, end: str
) -> None:
    with family(folder, etcd, 0, free_ports(PEERS)) as it:
        eventually(it.is_ready)
        before = set(it.members())
        raw_client.send(it.ports[0], b"START")
        eventually(lambda: len(set(it.members()) - before) == STARTED)
        started = set(it.members()) - before
        pid = control.request(it.control, "status")["peers"][0]["pid"]
        if end == "kill":
            send_signal(pid, signal.SIGKILL)
        elif end == "exit":
            raw_client.send(it.ports[0], b"EXIT")
        else:
            control.request(it.control, "restart", {"slot": 0}, timeout_s=20)
        eventually(lambda: not started & set(it.members()))
        eventually(it.is_ready)
        # The other processes are as before: each worker, and the child that it started at its import.
        eventually(lambda: len(it.members()) == len(before))
        assert len(before - set(it.members())) == 2
        it.kill()


def test_a_process_in_its_own_session_stays(folder: Path, etcd: str) -> None:
    with family(folder, etcd, 0, free_ports(PEERS)) as it:
        eventually(it.is_ready)
        daemon = int(raw_client.request(it.ports[0], b"DAEMON", b"")[2])
        try:
            it.kill()
            assert not is_gone(daemon)
        finally:
            os.kill(daemon, signal.SIGKILL)


def test_an_orderly_stop_ends_all_processes(supervised: Supervised, folder: Path) -> None:
    running = supervised.start("--app=family:app", peers=2)
    running.wait_registered()
    before = len(running.tree())
    for port in running.ports:
        raw_client.send(port, b"START")
    eventually(lambda: len(running.tree()) == before + 2 * STARTED)
    pids = [process.pid for process in running.tree()]
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    eventually(partial(all_are_gone, pids))


def all_are_gone(pids: list[int]) -> bool:
    return all(is_gone(pid) for pid in pids)
