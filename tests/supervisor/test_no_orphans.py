"""No worker, and no process that a handler has started, outlives a supervisor that is killed at any moment.

The supervisor runs in its own session, so all its descendants are found in /proc by their session, including
those that the test could not count before the kill.
"""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from harness import raw_client
from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Running, Supervised, alive, all_gone, is_gone, send_signal
from harness.supervisor_requests import ask
from peerd.linux import SOL_UDP, UDP_SEGMENT
from peerd.registry import Registry

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

    def __init__(self, running: Running) -> None:
        self.running = running
        self.ports = running.ports
        self.process = running.process
        self.begun_s = time.monotonic()

    def members(self) -> list[int]:
        """The processes that have not ended."""
        found = []
        for name in os.listdir("/proc"):
            with suppress(ProcessLookupError):
                if name.isdigit() and os.getsid(int(name)) == self.process.pid:
                    found.append(int(name))
        return alive(found)

    def workers(self) -> list[int]:
        return [pid for pid in self.members() if "peerd: peer" in title(pid)]

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


@contextmanager
def family(supervised: Supervised, base_port: int | None = None) -> Iterator[Family]:
    """None of its processes is left at the end, whatever happens."""
    it = Family(
        supervised.start(
            "--ttl=60", peers=PEERS, base_port=base_port, app=APP, start_new_session=True
        )
    )
    try:
        yield it
    finally:
        while left := it.members():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)


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

    with ThreadPoolExecutor() as threads:
        threads.submit(run)
        try:
            yield
        finally:
            stop.set()


def wait_until(moment_s: float) -> None:
    """This does not wait for a fact on purpose: the kill comes at any moment."""
    time.sleep(max(0.0, moment_s - time.monotonic()))


@pytest.mark.timeout(3600 if LONG else 300)
def test_no_process_or_record_outlives_a_killed_supervisor(supervised: Supervised) -> None:
    chance = random.Random(5)
    base_port = free_ports(PEERS)
    took_s = []
    for number in range(ATTEMPTS):
        busy = ("flood", "spin", "stop")[number % 3]
        # Half of them while Python, the supervisor and the workers start, and half of these when the first
        # child is there; the rest at work.
        at_work, at_first_child = number % 4 > 1, number % 4 == 1
        after_s = chance.uniform(0, 0.05 if number % 8 == 0 else 0.5)
        with family(supervised, base_port) as it, ExitStack() as stack:
            begun_s = it.begun_s
            if at_work:
                it.running.wait_registered()
                assert not has_no_records(it.running)
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
            # Sooner than a lease runs out.
            eventually(partial(has_no_records, it.running), within_s=20)
            for port in it.ports:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.bind(("127.0.0.1", port))
    assert max(took_s) <= 10.0, took_s


def has_no_records(running: Running) -> bool:
    with Registry(running.etcd, running.prefix) as registry:
        return not registry.nodes()


@pytest.mark.parametrize("end", ["kill", "exit", "reload"])
def test_processes_that_a_handler_has_started_end_with_its_worker(
    supervised: Supervised, end: str
) -> None:
    with family(supervised) as it:
        it.running.wait_ready()
        before = set(it.members())
        raw_client.send(it.ports[0], b"START")
        eventually(lambda: len(set(it.members()) - before) == STARTED)
        started = set(it.members()) - before
        pid = it.running.peer(0)["pid"]
        if end == "kill":
            send_signal(pid, signal.SIGKILL)
        elif end == "exit":
            raw_client.send(it.ports[0], b"EXIT")
        else:
            ask(it.running, "restart", slot=0)
        eventually(lambda: not started & set(it.members()))
        it.running.wait_ready()
        # The other processes are as before: each worker, and the child that it started at its import.
        eventually(lambda: len(it.members()) == len(before))
        assert len(before - set(it.members())) == 2
        it.kill()


def test_a_process_in_its_own_session_stays(supervised: Supervised) -> None:
    with family(supervised) as it:
        it.running.wait_ready()
        daemon = int(raw_client.request(it.ports[0], b"DAEMON", b"")[2])
        try:
            it.kill()
            assert not is_gone(daemon)
        finally:
            os.kill(daemon, signal.SIGKILL)


def test_an_orderly_stop_ends_all_processes(supervised: Supervised) -> None:
    running = supervised.start(peers=2, app=APP).wait_registered()
    before = len(running.tree())
    for port in running.ports:
        raw_client.send(port, b"START")
    eventually(lambda: len(running.tree()) == before + 2 * STARTED)
    pids = running.tree_pids()
    assert running.stop() == 0
    eventually(lambda: all_gone(pids))
