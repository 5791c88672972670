"""sd_notify and the sockets that systemd passes, with a real notify socket and real descriptors."""

import logging
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness.eventually import eventually
from harness.fake_systemd import FakeSystemd
from harness.ports import free_ports
from peerd.errors import BindError, PortInUseError
from peerd.supervisor.notify import Notifier, socket_name
from peerd.supervisor.sockets import bind_all

QUEUE = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())


def udp(address: str = "127.0.0.1", port: int = 0, family: int = socket.AF_INET) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((address, port))
    return sock


@pytest.fixture
def notifier() -> Iterator[Notifier]:
    notifier = Notifier.from_environment()
    yield notifier
    notifier.close()


@pytest.fixture(params=["path", "abstract"])
def systemd(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeSystemd]:
    with FakeSystemd(tmp_path, kind=request.param) as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
        yield systemd


def test_messages_and_their_order(systemd: FakeSystemd, notifier: Notifier) -> None:
    before_us = time.monotonic_ns() // 1000
    notifier.status("7/8 ready")
    notifier.status("7/8 ready")
    notifier.ready("8/8 ready")
    notifier.ready("8/8 ready")
    notifier.ready("8/8 ready, 1 scaling")
    notifier.reloading()
    notifier.ready("8/8 ready\nREADY=1")
    notifier.watchdog()
    notifier.stopping("stopping")
    eventually(lambda: "STOPPING" in systemd.names())
    reloading = systemd.received[3].fields.pop("MONOTONIC_USEC")
    assert before_us <= int(reloading) <= time.monotonic_ns() // 1000
    assert [each.fields for each in systemd.received] == [
        {"STATUS": "7/8 ready"},
        {"READY": "1", "STATUS": "8/8 ready"},
        {"STATUS": "8/8 ready, 1 scaling"},
        {"RELOADING": "1"},
        {"READY": "1", "STATUS": "8/8 ready READY=1"},
        {"WATCHDOG": "1"},
        {"STOPPING": "1", "STATUS": "stopping"},
    ]


def test_a_stored_socket_is_the_same_socket(systemd: FakeSystemd, notifier: Notifier) -> None:
    sock = udp()
    address = sock.getsockname()
    name = socket_name(address[1])
    notifier.store(name, sock)
    notifier.store(name, sock)  # as the next start does
    eventually(lambda: len(systemd.values("FDSTORE")) == 2)
    assert systemd.received[0].fields == {"FDSTORE": "1", "FDNAME": name, "FDPOLL": "0"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"waits", address)
    sock.close()
    (kept,) = systemd.store[name]
    assert kept.recv(100) == b"waits"
    notifier.discard(name)
    eventually(lambda: not systemd.store)
    udp(port=address[1]).close()


def test_nothing_without_a_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier.from_environment()
    notify_everything(notifier)
    notifier.close()
    notify_everything(notifier)


def notify_everything(notifier: Notifier) -> None:
    with udp() as sock:
        notifier.ready("")
        notifier.reloading()
        notifier.status("x")
        notifier.watchdog()
        notifier.store("peer-1", sock)
        notifier.discard("peer-1")
        notifier.stopping("")


@pytest.mark.parametrize(
    "address", ["/no/such/socket", "@unbound", "vsock:2:1234", "/" + 200 * "x"]
)
def test_a_manager_that_is_gone(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notifier = Notifier.from_environment()
    for _ in range(3):
        notify_everything(notifier)
    notifier.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_manager_that_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing blocks. When it reads again, it gets the newest messages, in order."""
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    names = [f"peer-{number}" for number in range(2 * QUEUE)]
    with ExitStack() as stack:
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(path)
        manager.setblocking(False)
        notifier = Notifier.from_environment()
        stack.callback(notifier.close)
        for name in names:
            notifier.store(name, stack.enter_context(udp()))
        for number in range(1000):
            notifier.status(f"{number}")
            notifier.watchdog()
        notifier.reloading()
        notifier.ready("ready")
        assert not caplog.records

        def late() -> bool:
            notifier.status("ready")
            return bool(caplog.records)

        eventually(late)
        assert "does not read" in caplog.text

        got: list[str] = []

        def all_read() -> bool:
            notifier.status("ready")
            while True:
                try:
                    text, fds, _, _ = socket.recv_fds(manager, 4096, 1)
                except BlockingIOError:
                    return "READY=1\nSTATUS=ready" in got
                got.append(text.decode())
                for fd in fds:
                    os.close(fd)

        eventually(all_read)
        stored = [text.splitlines()[1] for text in got if text.startswith("FDSTORE=1")]
        assert stored == [f"FDNAME={name}" for name in names]
        status, reloading, ready = (text.partition("\n")[0] for text in got[len(names) :])
        assert (status, reloading, ready) == ("STATUS=999", "RELOADING=1", "READY=1")
        notifier.watchdog()
        assert manager.recv(100) == b"WATCHDOG=1"
    assert len(caplog.records) == 1


def test_a_socket_that_is_discarded_before_the_manager_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.setblocking(False)
        notifier = Notifier(path)
        for number in range(QUEUE + 1):  # unix(7): one more than max_dgram_qlen fits
            notifier.status(f"{number}")
        with udp() as sock:
            notifier.store("peer-1", sock)
            notifier.discard("peer-1")
        for _ in range(QUEUE + 1):
            manager.recv(100)
        notifier.stopping("")
        assert manager.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=peer-1"
        assert manager.recv(100) == b"STOPPING=1\nSTATUS="
        notifier.close()
    assert not caplog.records


@pytest.mark.parametrize(
    ("period_us", "pid", "interval_s"),
    [
        ("30000000", "own", 15.0),
        ("30000000", None, 15.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("soon", None, None),
        ("9" * 5000, None, None),
        (None, None, None),
    ],
)
def test_the_watchdogs_interval(
    period_us: str | None,
    pid: str | None,
    interval_s: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "NOTIFY_SOCKET": "@unbound",
        "WATCHDOG_USEC": period_us,
        "WATCHDOG_PID": str(os.getpid()) if pid == "own" else pid,
    }.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    notifier = Notifier.from_environment()
    assert notifier.watchdog_interval_s == interval_s
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
    notifier.close()


# Inherited descriptors start at 3, so this takes a process.

ADOPT = """
import logging, os, socket, sys
from peerd.supervisor.sockets import bind_all, inherited_sockets
logging.basicConfig(format="%(levelname)s %(message)s")
host, base_port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
inherited = inherited_sockets(host)
assert not [name for name in os.environ if name.startswith("LISTEN_")]
try:
    sockets = bind_all(host, base_port, count, 65536, inherited)
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(1)
for sock in sockets:
    assert not sock.get_inheritable() and sock.getblocking()
    assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    sock.settimeout(0)
    try:
        waiting = sock.recv(100).decode()
    except BlockingIOError:
        waiting = "-"
    print(sock.getsockname()[0], waiting)
print("left", *sorted(inherited))
"""


class Start:
    """A start of a service that systemd passes sockets to."""

    def __init__(self, folder: Path) -> None:
        self.out: list[str] = []
        self._systemd = FakeSystemd(folder)

    def passing(self, name: str, sock: socket.socket) -> socket.socket:
        self._systemd.sockets[name] = sock
        return sock

    def adopt(self, host: str, base_port: int, count: int, code: int = 0) -> None:
        with self._systemd as systemd:
            process = systemd.start(sys.executable, "-c", ADOPT, host, str(base_port), str(count))
            assert process.wait(60) == code
            self.out = (systemd.folder / "out").read_text().splitlines()
            self.err = systemd.err


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path)


def test_passed_sockets_are_used_and_others_bound(start: Start) -> None:
    base = free_ports(3)
    sock = start.passing("whatever", udp(port=base + 1))
    sock.setblocking(False)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"waited", sock.getsockname())
    start.passing("of-another-run", udp(port=(other := free_ports())))
    start.adopt("127.0.0.1", base, 3)
    assert start.out == ["127.0.0.1 -", "127.0.0.1 waited", "127.0.0.1 -", f"left {other}"]
    assert not start.err


def test_other_descriptors_are_closed_and_named(start: Start, tmp_path: Path) -> None:
    start.passing("web", socket.create_server(("127.0.0.1", 0)))
    start.passing("local", socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    start.passing("unbound", socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    base = free_ports()
    start.adopt("127.0.0.1", base, 1)
    warnings = start.err.splitlines()
    assert [line.split()[0] for line in warnings] == 3 * ["WARNING"]
    assert "descriptor 3 (web)" in warnings[0]
    assert "AF_INET SOCK_STREAM" in warnings[0]
    assert "(local)" in warnings[1]
    assert "(unbound)" in warnings[2]
    assert "not bound" in warnings[2]


def test_a_wildcard_socket_serves_with_a_warning(start: Start) -> None:
    base = free_ports(2)
    for port in (base, base + 1):
        start.passing(f"peer-{port}", udp("0.0.0.0", port))
    start.adopt("localhost", base, 2)
    assert start.out[:2] == ["0.0.0.0 -", "0.0.0.0 -"]
    (warning,) = start.err.splitlines()
    assert f"0.0.0.0:{base} (of 2)" in warning
    assert "--host 0.0.0.0" in warning


@pytest.mark.parametrize(("only_ipv6", "code"), [(0, 0), (1, 1)])
def test_a_dual_stack_wildcard_serves_ipv4(start: Start, only_ipv6: int, code: int) -> None:
    base = free_ports()
    sock = start.passing("dual", socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
    sock.bind(("::", base))
    start.adopt("127.0.0.1", base, 1, code)


def test_another_address_is_an_error_that_names_both(start: Start) -> None:
    base = free_ports(2)
    start.passing(f"peer-{base + 1}", udp("127.0.0.2", base + 1))
    start.adopt("127.0.0.1", base, 2, 1)
    (error,) = start.out
    assert error.startswith("BindError")
    assert f"127.0.0.2:{base + 1}" in error
    assert f"127.0.0.1:{base + 1}" in error
    assert "systemctl stop" in error


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_sockets_for_a_port_the_better_fit_is_used(start: Start, order: int) -> None:
    base = free_ports()
    for address in ("127.0.0.1", "127.0.0.2")[::order]:
        start.passing(f"at-{address}", udp(address, base))
    start.adopt("127.0.0.1", base, 1)
    assert start.out == ["127.0.0.1 -", "left"]
    (warning,) = start.err.splitlines()
    assert f"127.0.0.2:{base} is closed" in warning


def test_a_socket_passed_twice_is_used_once(start: Start) -> None:
    """Its .socket unit passes it, and so does the store."""
    base = free_ports()
    sock = start.passing("unit", udp("127.0.0.1", base))
    start.passing("store", sock.dup())
    start.adopt("127.0.0.1", base, 1)
    assert not start.err


@pytest.mark.parametrize(
    ("pid", "count", "warns"), [(None, "1", False), ("1", "1", False), ("own", "-1", True)]
)
def test_descriptors_for_another_process_are_ignored(
    pid: str | None,
    count: str,
    warns: bool,
) -> None:
    base = free_ports()
    command = [sys.executable, "-c", ADOPT, "127.0.0.1", str(base), "1"]
    if pid == "own":
        set_pid = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid());"
        set_pid += "os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", set_pid, *command]
    environment = {**os.environ, "LISTEN_FDS": count, "LISTEN_PID": pid or ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["127.0.0.1 -", "left"]
    assert ("LISTEN_FDS" in done.stderr) == warns


def test_an_error_names_the_flag_of_the_port() -> None:
    port = free_ports()
    (sock,) = bind_all("localhost", port, 1, 65536)
    with sock:
        assert sock.getsockname() == ("127.0.0.1", port)
        with pytest.raises(PortInUseError, match="another --flag"):
            bind_all("localhost", port, 1, 65536, flag="--flag")


def test_no_descriptor_is_a_bind_error() -> None:
    port = free_ports()
    bind_all("127.0.0.1", port, 1, 65536)[0].close()  # the first look-up of a name opens files
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # all of those are taken
    try:
        with pytest.raises(BindError, match=f"port {port}: Too many open files"):
            bind_all("127.0.0.1", port, 1, 65536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_bind_all_binds_nothing_when_it_fails() -> None:
    base = free_ports(2)
    inherited = {base: udp(port=base)}
    with inherited[base], udp(port=base + 1), pytest.raises(BindError):
        bind_all("127.0.0.1", base, 2, 65536, inherited)
    assert list(inherited) == [base]
