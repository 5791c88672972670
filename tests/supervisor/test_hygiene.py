"""Descriptors and processes: what is held, and what happens when none is left; hostile clients."""

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import orjson
import psutil
import pytest

from harness import raw_client
from harness.command import command, started
from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Running, Supervised, send_signal, udp_socket
from harness.supervisor_requests import (
    Asked,
    ask,
    assert_nothing_is_lost,
    events,
    is_replaced,
    pids,
)
from peerd.errors import ControlError
from peerd.supervisor.control_server import MAX_REQUEST_BYTES
from peerd_chaos.load import Load

RATE = 1000.0
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
    return supervised.start(*args, peers=peers, app=NUMBERS).wait_registered()


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

    return eventually(twice)


def test_a_process_holds_its_own_resources_only(supervised: Supervised) -> None:
    metrics = free_ports()
    running = start(supervised, f"--metrics=127.0.0.1:{metrics}", peers=3)
    ask(running, "restart", slot=1)
    old = pids(running)[2]
    with socket.create_connection(("127.0.0.1", metrics)):
        send_signal(old, signal.SIGKILL)  # a worker is forked while the connection is open
        eventually(partial(is_replaced, running, 2, old))
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
        assert others.pop() == udp_socket(port)
        first, second = others  # both ends of the pipe that wakes its loop
        assert first == second
        assert first.startswith("pipe:")
        assert first != output
    assert len(outputs) == 3
    registrar = running.registrar()
    kept = set(descriptors(registrar.pid).values())
    assert not kept & {udp_socket(port) for port in running.ports}
    workers = {link for pid in pids(running) for link in descriptors(pid).values()}
    assert {link for link in kept & workers if not link.startswith("/dev/null")} == set()
    assert metrics not in {found.laddr.port for found in registrar.net_connections() if found.laddr}


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
            for slot, pid in enumerate(old):
                eventually(partial(is_replaced, running, slot, pid))
            running.wait_ready()
    assert sum(peer["restarts"] for peer in running.status()["peers"]) >= 12
    eventually(lambda: kinds(descriptors(running.pid)) == before)
    children = supervisor.children(recursive=True)
    assert len(children) == 5
    assert psutil.STATUS_ZOMBIE not in [child.status() for child in children]
    assert supervisor.memory_info().rss - rss < 4 * 1024 * 1024


def kinds(held: dict[int, str]) -> list[str]:
    return sorted(link.partition(":[")[0] for link in held.values())


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
    with connection(running) as client:
        client.sendall(STATUS)
        begun_s, begun_cpu_s = time.monotonic(), cpu_s(running.pid)
        while time.monotonic() < begun_s + 1.5:
            assert raw_client.request(running.ports[0], b"SEQ", b"x")[2] == b"x"
            time.sleep(0.05)
        assert cpu_s(running.pid) - begun_cpu_s < 0.5
        raise_limit(running.pid, resource.RLIMIT_NOFILE)
        assert client.recv(1 << 16).startswith(b'{"v":1,"ok":true')


UNPRIVILEGED_UID = 65534


@pytest.mark.skipif(os.getuid() != 0, reason="runs a supervisor as another user: needs root")
def test_without_processes_a_worker_is_started_later(etcd: str) -> None:
    """RLIMIT_NPROC does not apply to root, so another user runs it."""
    user = ["setpriv", f"--reuid={UNPRIVILEGED_UID}", f"--regid={UNPRIVILEGED_UID}"]
    user += ["--clear-groups"]
    # Other users can enter it, unlike tmp_path.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="peerd-test-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        imports = [*user, sys.executable, "-c", "import peerd.cli"]
        if subprocess.run(imports, cwd=folder, capture_output=True).returncode:
            pytest.skip(f"user {UNPRIVILEGED_UID} cannot read this tree")
        path = folder / "control"
        running = Supervised(folder, etcd).start(f"--control={path}", peers=2, through=user)
        running.control = path
        try:
            running.wait_registered()
            first, second = pids(running)
            # Under that user, because root may lack CAP_SYS_RESOURCE in a container.
            limit = [*user, "prlimit", f"--pid={running.pid}"]
            _, hard = resource.getrlimit(resource.RLIMIT_NPROC)  # inherited
            subprocess.run([*limit, "--nproc=1:"], check=True)
            send_signal(first, signal.SIGKILL)
            eventually(
                lambda: [
                    each
                    for each in events(running, "cannot fork")
                    if "Resource temporarily unavailable" in each["why"]
                ][1:]
            )
            assert raw_client.request(running.ports[1], b"PING", b"x")[2] == b"x"
            most = "unlimited" if hard == resource.RLIM_INFINITY else hard
            subprocess.run([*limit, f"--nproc={most}:"], check=True)
            running.wait_ready()
            assert pids(running)[1] == second
            assert raw_client.request(running.ports[0], b"PING", b"x")[2] == b"x"
        finally:
            assert running.stop() == 0


def test_old_workers_are_replaced_and_nothing_is_lost(supervised: Supervised) -> None:
    running = start(supervised, "--max-age=1.5")
    before = pids(running)
    with Load(running.ports, rate=RATE) as load:
        eventually(lambda: len(events(running, "replaced")) >= 4)
        eventually(lambda: not set(pids(running)) & set(before))
        report = load.finish()
    assert_nothing_is_lost(report, running)
    assert events(running, "died") == []
    assert re.search(r"having been ready for [23] s \(--max-age\)", running.err)


def test_recycling_pauses_when_the_app_is_broken(supervised: Supervised) -> None:
    running = start(supervised, "--max-age=1")
    before = pids(running)
    supervised.write_app("raise ValueError('broken today')\n")
    eventually(lambda: "not replaced, and tried again in 60 s" in running.err)
    assert "ValueError: broken today" in running.err
    assert pids(running) == before
    assert len(events(running, "not replaced")) == 1
    assert raw_client.request(running.ports[0], b"SEQ", b"x")[2] == b"x"


def test_large_workers_are_replaced_and_nothing_is_lost(supervised: Supervised) -> None:
    running = start(supervised, "--max-rss=100000000")
    before = pids(running)
    with Load(running.ports, rate=RATE) as load:
        for _ in range(10):
            raw_client.request(running.ports[0], b"GROW", b"")
        eventually(partial(is_replaced, running, 0, before[0]))
        report = load.finish()
    running.wait_ready()
    assert_nothing_is_lost(report, running)
    assert pids(running)[1] == before[1], "it is not large"
    assert "bytes of memory (--max-rss)" in running.err
    assert running.peer(0)["rss_bytes"] < 100_000_000
    assert events(running, "died") == []


def test_hostile_clients_cost_little_and_harm_nothing(supervised: Supervised) -> None:
    """A gigabyte in one request; answers that are not read; idle connections; garbage."""
    running = start(supervised)
    before, supervisor = pids(running), psutil.Process(running.pid)
    rss = supervisor.memory_info().rss
    sent = 0
    with connection(running) as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while sent < 1 << 30:
            sent += client.send(bytes(1 << 20))
    assert sent < 1 << 22
    assert supervisor.memory_info().rss - rss < 1 << 22
    assert running.status()["supervisor"]["state"] == "ready"
    with connection(running) as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while True:
                client.send(STATUS * 100)
        assert running.status()["supervisor"]["state"] == "ready"
        assert supervisor.memory_info().rss - rss < 1 << 22
    with contextlib.ExitStack() as idle:
        for _ in range(200):
            idle.enter_context(connection(running))
        assert running.status()["supervisor"]["state"] == "ready"
    for garbage in GARBAGE:
        answer = b""
        refusals = contextlib.suppress(BrokenPipeError, ConnectionResetError)
        with connection(running) as client, refusals:
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            while chunk := client.recv(1 << 16):
                answer += chunk
        assert answer or not garbage.endswith(b"\n")
        for line in answer.splitlines():
            assert orjson.loads(line)["ok"] is (b'"events"' in garbage)
    assert pids(running) == before
    assert "Traceback" not in running.err


def test_a_greedy_client_does_not_delay_another(supervised: Supervised) -> None:
    running = start(supervised)
    asked, answered = MAX_REQUEST_BYTES // len(STATUS), 0
    with connection(running) as greedy, connection(running) as modest:

        def read_all() -> None:
            nonlocal answered
            while answered < asked:
                answered += greedy.recv(1 << 20).count(b"\n")

        reader = threading.Thread(target=read_all)
        reader.start()
        greedy.sendall(STATUS * asked)
        modest.sendall(STATUS)
        assert modest.recv(1 << 16).endswith(b"}\n")
        in_between = answered
        reader.join(60)
    assert in_between < asked / 2
    assert answered == asked


@contextlib.contextmanager
def connection(running: Running) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(running.control))
        client.settimeout(30)
        yield client


STATUS = b'{"v": 1, "command": "status"}\n'
GARBAGE = [
    b"",
    b"\n",
    b"garbage\n",
    b"[]\n",
    b'{"v": 2, "command": "status"}\n',
    b"x" * 10**6,
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


def test_commands_outlive_their_clients(supervised: Supervised) -> None:
    running = start(supervised)
    before = pids(running)
    supervised.write_app(f"import time\ntime.sleep(0.5)\n{NUMBERS}")
    with started(command("reload", f"--control={running.control}")):
        eventually(lambda: len(running.tree()) == 5)
    eventually(lambda: not set(pids(running)) & set(before))
    running.wait_ready()
    assert len(events(running, "replaced")) == 2
    assert len(ask(running, "reload")["replaced"]) == 2


def test_fifty_clients_at_the_same_time(supervised: Supervised) -> None:
    running = start(supervised)

    def ask_often(number: int) -> None:
        if number % 10 == 0:
            ask(running, "restart", slot=0)
            return
        for _ in range(10):
            assert len(pids(running)) == 2

    with ThreadPoolExecutor(50) as clients:
        list(clients.map(ask_often, range(50)))
    # Requests for the same that wait are answered by one reload.
    assert 1 <= len(events(running, "replaced")) <= 5
    assert events(running, "died") == []


@pytest.mark.skipif(os.getuid() != 0, reason="a PID namespace needs root")
def test_as_pid_1_it_reaps_orphans(supervised: Supervised) -> None:
    """A process that a handler has detached becomes a child of PID 1 when its parent has ended."""
    through = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    running = supervised.start(peers=1, app=LEAVES, through=through)
    eventually(lambda: pids(running)[0])
    (supervisor,) = eventually(lambda: psutil.Process(running.pid).children())
    for _ in range(3):
        answer = raw_client.request(running.base_port, b"LEAVE", b"")
        (worker, left) = (int(part) for part in answer[2].split())
        assert worker == pids(running)[0]
        assert left != worker
    ask(running, "restart", slot=0)
    eventually(lambda: len(supervisor.children()) == 2)
    supervisor.terminate()
    running.wait()


LEAVES = """
import os, subprocess
from peerd.serving.app import builtin_app
app = builtin_app()

@app.handler("LEAVE")
def leave(message):
    process = subprocess.Popen(["sleep", "0.2"], start_new_session=True)
    return b"%d %d" % (os.getpid(), process.pid)
"""
