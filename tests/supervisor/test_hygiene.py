"""Descriptors and processes: what is held, and what happens when none is left; hostile clients."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import orjson
import psutil
import pytest

from harness import raw_client
from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Running, Supervised, send_signal
from harness.supervisor_requests import Asked, ask, events, pids
from peerd import control
from peerd.errors import ControlError

LONG = os.environ.get("PEERD_LONG_TESTS") == "1"

pytestmark = pytest.mark.timeout(3600 if LONG else 300)

NUMBERS = """
import time, peerd
app = peerd.App()
kept = []

@app.handler("SEQ")
def answer(message):
    return message.body

@app.handler("GROW")
def grow(message):
    kept.append(bytearray(b"x") * 10_000_000)
    return message.body
"""


def start(supervised: Supervised, *args: str, peers: int = 2) -> Running:
    (supervised.folder / "numbers.py").write_text(NUMBERS)
    running = supervised.start("--app=numbers:app", *args, peers=peers)
    running.wait_registered()
    return running


def descriptors(pid: int) -> dict[int, str]:
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = os.readlink(entry)
    return found


def settled(running: Running) -> dict[int, str]:
    """The supervisor's descriptors, once it has closed the connections of former clients."""

    def twice() -> dict[int, str] | None:
        first = descriptors(running.pid)
        time.sleep(0.02)
        return first if first == descriptors(running.pid) else None

    found = eventually(twice)
    assert found is not None
    return found


def udp_inode(port: int) -> str:
    for line in Path("/proc/net/udp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].partition(":")[2], 16) == port:
            return f"socket:[{fields[9]}]"
    raise AssertionError(f"no socket is bound to UDP port {port}")


def test_a_worker_holds_its_own_resources_only(supervised: Supervised) -> None:
    running = start(supervised, f"--metrics=127.0.0.1:{free_ports()}", peers=3)
    ask(running, "restart", slot=1)
    old = pids(running)[2]
    send_signal(old, signal.SIGKILL)
    eventually(lambda: running.peer(2)["pid"] not in (old, None))
    running.wait_ready()
    outputs = set()
    for port, pid in zip(running.ports, pids(running), strict=True):
        held = descriptors(pid)
        assert held.pop(0) == "/dev/null"
        output = held.pop(1)
        assert output.startswith("pipe:")
        assert held.pop(2) == output
        outputs.add(output)
        others = sorted(held.values())
        assert others.pop() == udp_inode(port)
        first, second = others  # both ends of the pipe that wakes its loop
        assert first == second
        assert first.startswith("pipe:")
        assert first != output
    assert len(outputs) == 3


def test_the_registrar_holds_no_peers_socket(supervised: Supervised) -> None:
    running = start(supervised, peers=3)
    held = set(descriptors(running.registrar().pid).values())
    assert not held & {udp_inode(port) for port in running.ports}
    workers = {link for pid in pids(running) for link in descriptors(pid).values()}
    assert {link for link in held & workers if not link.startswith("/dev/null")} == set()


def test_descriptors_and_processes_do_not_accumulate(supervised: Supervised) -> None:
    """100 replacements, with PEERD_LONG_TESTS=1 a thousand, with kills in between."""
    running = start(supervised, peers=4)
    ask(running, "restart", slot=0)
    supervisor = psutil.Process(running.pid)
    before = kinds(settled(running))
    rss = supervisor.memory_info().rss
    rounds = 250 if LONG else 25
    for number in range(rounds):
        restarts = [Asked(running, "restart", slot=slot) for slot in range(4)]
        for restart in restarts:
            restart.answer()
        if number % (rounds // 3) == 0:  # more than five times per minute is a crash loop
            old = pids(running)
            for pid in old:
                send_signal(pid, signal.SIGKILL)
            eventually(partial(are_all_new, running, old))
    assert sum(peer["restarts"] for peer in running.status()["peers"]) >= 12
    eventually(lambda: kinds(descriptors(running.pid)) == before)
    children = supervisor.children(recursive=True)
    assert len(children) == 5
    assert psutil.STATUS_ZOMBIE not in [child.status() for child in children]
    assert supervisor.memory_info().rss - rss < 4 * 1024 * 1024


def kinds(held: dict[int, str]) -> list[str]:
    return sorted(link.partition(":[")[0] for link in held.values())


def are_all_new(running: Running, old: list[int]) -> bool:
    peers = running.status()["peers"]
    return all(peer["state"] == "ready" and peer["pid"] not in old for peer in peers)


def limit_to(running: Running, unused: int) -> None:
    """Limit the number of descriptors that the supervisor can still open."""
    used, limit = set(settled(running)), 0
    while len(set(range(limit)) - used) <= unused:
        limit += 1
    _, hard = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (limit - 1, hard))


def raise_limit(pid: int, which: int) -> None:
    _, hard = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (hard, hard))


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def test_without_descriptors_a_worker_is_started_later(supervised: Supervised) -> None:
    running = start(supervised)
    first, second = pids(running)
    limit_to(running, 3)
    # A replacement is refused, and the worker serves on.
    with pytest.raises(ControlError, match=r"cannot fork a successor: .*Too many open files"):
        ask(running, "restart", slot=0)
    assert pids(running) == [first, second]
    send_signal(first, signal.SIGKILL)
    failed = eventually(lambda: events(running, "cannot fork")[1:])
    assert failed[0]["peer_id"] == f"localhost:{running.ports[0]}"
    assert "Too many open files" in failed[0]["why"]
    assert running.peer(0)["state"] in ("starting", "backoff")
    assert raw_client.request(running.ports[1], b"SEQ", b"x")[2] == b"x"
    assert "cannot fork a worker: [Errno 24] Too many open files; next try in" in running.err
    raise_limit(running.pid, resource.RLIMIT_NOFILE)
    running.wait_ready()
    assert pids(running)[1] == second
    assert raw_client.request(running.ports[0], b"SEQ", b"x")[2] == b"x"


@pytest.mark.alone
def test_without_descriptors_for_clients_it_does_not_spin(supervised: Supervised) -> None:
    running = start(supervised)
    limit_to(running, 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(running.control))
        client.sendall(b'{"v": 1, "command": "status"}\n')
        begun_s, begun_cpu_s = time.monotonic(), cpu_s(running.pid)
        while time.monotonic() < begun_s + 1.5:
            assert raw_client.request(running.ports[0], b"SEQ", b"x")[2] == b"x"
            time.sleep(0.05)
        assert cpu_s(running.pid) - begun_cpu_s < 0.5
        raise_limit(running.pid, resource.RLIMIT_NOFILE)
        client.settimeout(30)
        assert client.recv(1 << 16).startswith(b'{"v":1,"ok":true')


@pytest.fixture
def everybodys_folder() -> Iterator[Path]:
    """A directory that other users can enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="peerd-test-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


UNPRIVILEGED_UID = 65534


@pytest.mark.skipif(os.getuid() != 0, reason="runs a supervisor as another user: needs root")
def test_without_processes_a_worker_is_started_later(everybodys_folder: Path, etcd: str) -> None:
    """RLIMIT_NPROC does not apply to root, so another user runs it."""
    folder = everybodys_folder
    as_other_user = [
        "setpriv",
        f"--reuid={UNPRIVILEGED_UID}",
        f"--regid={UNPRIVILEGED_UID}",
        "--clear-groups",
    ]
    seen = subprocess.run(
        [*as_other_user, sys.executable, "-c", "import peerd.cli"], cwd=folder, capture_output=True
    )
    if seen.returncode:
        pytest.skip(f"user {UNPRIVILEGED_UID} cannot read this tree")
    base_port, path = free_ports(2), folder / "control"
    command = [*as_other_user, sys.executable, "-m", "peerd", "supervise", "--peers=2"]
    command += [f"--base-port={base_port}", f"--etcd={etcd}", "--prefix=unprivileged"]
    command += [f"--control={path}", "--log-format=text"]
    with (
        (folder / "err").open("wb") as err,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=err, stderr=err, cwd=folder
        ) as process,
    ):
        try:

            def peers() -> list[dict[str, object]]:
                found = control.request(path, "status")["peers"]
                assert isinstance(found, list)
                return found

            eventually(lambda: all(peer["registered"] for peer in peers()))
            first, second = (peer["pid"] for peer in peers())
            assert isinstance(first, int)
            # Under that user, because root may lack CAP_SYS_RESOURCE in a container.
            limit = [*as_other_user, "prlimit", f"--pid={process.pid}"]
            _, hard = resource.getrlimit(resource.RLIMIT_NPROC)  # inherited
            subprocess.run([*limit, "--nproc=1:"], check=True)
            send_signal(first, signal.SIGKILL)
            eventually(
                lambda: [
                    each
                    for each in control.request(path, "events")
                    if each["event"] == "cannot fork"
                    and "Resource temporarily unavailable" in each["why"]
                ][1:]
            )
            assert raw_client.request(base_port + 1, b"PING", b"x")[2] == b"x"
            most = "unlimited" if hard == resource.RLIM_INFINITY else hard
            subprocess.run([*limit, f"--nproc={most}:"], check=True)
            eventually(lambda: all(peer["state"] == "ready" for peer in peers()))
            assert peers()[1]["pid"] == second
            assert raw_client.request(base_port, b"PING", b"x")[2] == b"x"
        finally:
            process.terminate()
            assert process.wait(60) == 0


class Sequence:
    """Sends consecutive numbers to a port, and records which come back."""

    def __init__(self, port: int) -> None:
        self.sent = 0
        self.received: list[int] = []
        self._port = port

    @contextmanager
    def going(self) -> Iterator[None]:
        ended = threading.Event()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("127.0.0.1", self._port))

            def send() -> None:
                while not ended.is_set():
                    body = struct.pack(">Q", self.sent)
                    sock.send(raw_client.pack(b"SEQ", b"1", body))
                    self.sent += 1
                    time.sleep(0.001)

            def receive() -> None:
                while data := sock.recv(2048):
                    self.received.append(struct.unpack(">Q", raw_client.unpack(data)[2])[0])

            threads = [threading.Thread(target=send), threading.Thread(target=receive)]
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                ended.set()
                threads[0].join()
                with contextlib.suppress(AssertionError):
                    eventually(lambda: len(self.received) >= self.sent)
                sock.shutdown(socket.SHUT_RDWR)
                threads[1].join()


def test_old_workers_are_replaced_and_nothing_is_lost(supervised: Supervised) -> None:
    running = start(supervised, "--max-age=1.5")
    before = pids(running)
    numbers = Sequence(running.ports[0])
    with numbers.going():
        eventually(lambda: len(events(running, "replaced")) >= 4)
        eventually(lambda: not set(pids(running)) & set(before))
    assert numbers.received == list(range(numbers.sent))
    assert events(running, "died") == []
    assert "having been ready for 2 s (--max-age)" in running.err or (
        "having been ready for 3 s (--max-age)" in running.err
    )
    assert [peer["restarts"] for peer in running.status()["peers"]] == [0, 0]


def test_recycling_pauses_when_the_app_is_broken(supervised: Supervised) -> None:
    running = start(supervised, "--max-age=1")
    before = pids(running)
    (supervised.folder / "numbers.py").write_text("raise ValueError('broken today')\n")
    eventually(lambda: "not replaced, and tried again in 60 s" in running.err)
    assert "ValueError: broken today" in running.err
    assert pids(running) == before
    assert len(events(running, "not replaced")) == 1
    assert raw_client.request(running.ports[0], b"SEQ", b"x")[2] == b"x"


def test_large_workers_are_replaced_and_nothing_is_lost(supervised: Supervised) -> None:
    running = start(supervised, "--max-rss=100000000")
    before = pids(running)
    numbers = Sequence(running.ports[0])
    with numbers.going():
        for _ in range(10):
            raw_client.request(running.ports[0], b"GROW", b"")
        eventually(lambda: running.peer(0)["pid"] not in (before[0], None))
    running.wait_ready()
    assert numbers.received == list(range(numbers.sent))
    assert pids(running)[1] == before[1], "it is not large"
    assert "bytes of memory (--max-rss)" in running.err
    assert running.peer(0)["rss_bytes"] < 100_000_000
    assert events(running, "died") == []


def test_a_gigabyte_request_is_refused(supervised: Supervised) -> None:
    running = start(supervised)
    supervisor = psutil.Process(running.pid)
    before = supervisor.memory_info().rss
    sent = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(running.control))
        client.settimeout(30)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 1 << 30:
                sent += client.send(bytes(1 << 20))
    assert sent < 1 << 22
    assert supervisor.memory_info().rss - before < 1 << 22
    assert running.status()["supervisor"]["state"] == "ready"


def test_a_client_that_reads_nothing_costs_one_answer(supervised: Supervised) -> None:
    running = start(supervised)
    supervisor = psutil.Process(running.pid)
    before = supervisor.memory_info().rss
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(running.control))
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while True:
                client.send(b'{"v": 1, "command": "status"}\n' * 100)
        assert running.status()["supervisor"]["state"] == "ready"
        assert supervisor.memory_info().rss - before < 1 << 22


def test_commands_outlive_their_clients(supervised: Supervised) -> None:
    running = start(supervised)
    before = pids(running)
    (supervised.folder / "numbers.py").write_text(f"import time\ntime.sleep(0.5)\n{NUMBERS}")
    with subprocess.Popen(
        [sys.executable, "-m", "peerd", "reload", f"--control={running.control}"]
    ) as client:
        eventually(lambda: len(running.tree()) == 5)
        client.kill()
    eventually(lambda: not set(pids(running)) & set(before))
    running.wait_ready()
    assert len(events(running, "replaced")) == 2
    assert len(ask(running, "reload")["replaced"]) == 2


def test_fifty_clients_at_the_same_time(supervised: Supervised) -> None:
    running = start(supervised)
    failures: list[Exception] = []

    def ask_often(number: int) -> None:
        try:
            for _ in range(10):
                if number % 10 == 0:
                    ask(running, "restart", slot=0)
                    return
                assert len(ask(running, "status")["peers"]) == 2
        except Exception as error:
            failures.append(error)

    clients = [threading.Thread(target=ask_often, args=(number,)) for number in range(50)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert failures == []
    # Requests for the same that wait are answered by one reload.
    assert 1 <= len(events(running, "replaced")) <= 5
    assert events(running, "died") == []


GARBAGE = [
    b"\x00" * 1000,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b'{"v": 1}\n',
    b'{"v": 1, "command": null}\n',
    b'{"v": 1, "command": ["status"]}\n',
    b'{"v": 1, "command": "status", "arguments": []}\n',
    b'{"v": 1, "command": "restart", "arguments": {"slot": "0"}}\n',
    b'{"v": 1, "command": "restart", "arguments": {"slot": true}}\n',
    b'{"v": 1, "command": "restart", "arguments": {"slot": -1}}\n',
    b'{"v": 1, "command": "restart", "arguments": {"slot": 18446744073709551615}}\n',
    b'{"v": 1, "command": "scale", "arguments": {"peers": {}}}\n',
    b'{"v": 1, "command": "events", "arguments": {"after": "x"}}\n',
    b'{"v": 1, "command": "logs", "arguments": {"slot": []}}\n',
    b'{"v": 1, "command": "logs", "arguments": {"slot": {}, "after": []}}\n',
    b'{"v": 1, "command": "logs", "arguments": {"slot": 1.5}}\n',
    b"[" * 60_000 + b"\n",
    b'{"v": 1, "command": "\xff"}\n',
    b'{"v": 1, "command": "stop"',
]


def test_garbage_gets_an_error_or_nothing(supervised: Supervised) -> None:
    running = start(supervised)
    before = pids(running)
    for garbage in GARBAGE:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(running.control))
            client.settimeout(30)
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while chunk := client.recv(1 << 16):
                    answer += chunk
            assert answer or not garbage.endswith(b"\n")
            for line in answer.splitlines():
                assert orjson.loads(line)["ok"] is (b'"events"' in garbage)
    assert pids(running) == before
    assert running.process.poll() is None
    assert "Traceback" not in running.err


def test_as_pid_1_it_reaps_orphans(supervised: Supervised, tmp_path: Path) -> None:
    """A process that a handler has detached becomes a child of PID 1 when its parent has ended."""
    if os.geteuid() != 0:
        pytest.skip("a PID namespace takes root")
    (tmp_path / "leaves.py").write_text(LEAVES)
    control_path = tmp_path / "control.sock"
    base_port = free_ports()
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-m"]
    command += ["peerd", "supervise", "--app=leaves:app", f"--base-port={base_port}"]
    command += [f"--control={control_path}", f"--etcd={supervised.etcd}", "--prefix=pid-1"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as outside:
        try:
            eventually(lambda: control.request(control_path, "status")["peers"][0]["pid"])
            (supervisor,) = eventually(lambda: psutil.Process(outside.pid).children())
            for _ in range(3):
                answer = raw_client.request(base_port, b"LEAVE", b"")
                (_, worker, left) = (int(part) for part in answer[2].split())
                assert worker == control.request(control_path, "status")["peers"][0]["pid"]
                assert left != worker
            control.request(control_path, "restart", {"slot": 0}, timeout_s=30)
            eventually(lambda: len(supervisor.children()) == 2)
        finally:
            outside.send_signal(signal.SIGTERM)
            for process in psutil.Process(outside.pid).children():
                process.terminate()
            outside.wait(60)


LEAVES = """
import os, subprocess
from peerd.serving.app import builtin_app
app = builtin_app()

@app.handler("LEAVE")
def leave(message):
    process = subprocess.Popen(["sleep", "0.2"], start_new_session=True)
    return b"0 %d %d" % (os.getpid(), process.pid)
"""
