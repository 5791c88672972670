"""``peerd supervise`` under a service manager: notifications, and sockets kept across restarts."""

import signal
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.eventually import eventually
from harness.fake_systemd import FakeSystemd
from harness.ports import free_ports
from harness.raw_client import request
from harness.supervised import all_gone, send_signal
from peerd import control
from peerd_chaos.load import Load

PEERS = 4
RX_BATCH = 16
"""Of ext/peerd/receive.pxd: the most that a worker reads at a time without --offload."""

APP = """
import os, peerd
app = peerd.App()

@app.handler("SEQ")
def answer(message):
    return message.body

@app.handler("ENV")
def environment(message):
    return " ".join(os.environ).encode()
"""

RATE = 20_000


class Service:
    """A peerd under a fake systemd."""

    def __init__(self, systemd: FakeSystemd, etcd: str, peers: int = PEERS) -> None:
        self.systemd = systemd
        base = free_ports(peers)
        self.ports = list(range(base, base + peers))
        self.control = systemd.folder / "control.sock"
        (systemd.folder / "kept.py").write_text(APP)
        self._command = [sys.executable, "-m", "peerd", "supervise", f"--control={self.control}"]
        self._command += [f"--peers={peers}", f"--base-port={base}", f"--etcd={etcd}"]
        self._command += [f"--prefix=systemd-{base}", "--no-offload"]
        # Room for datagrams that arrive while no supervisor runs.
        self._command += ["--recv-buffer=67108864", "--app=kept:app"]

    def start(self, *args: str) -> None:
        """Returns when it has reported READY."""
        before = self.systemd.names().count("READY")
        self.systemd.start(*self._command, *args)
        self.wait_ready(before + 1)

    def wait_ready(self, times: int) -> None:
        eventually(lambda: self.systemd.names().count("READY") >= times)

    def status(self) -> dict[str, Any]:
        report = control.request(self.control, "status")
        assert isinstance(report, dict)
        return report

    def pids(self) -> list[int]:
        return [peer["pid"] for peer in self.status()["peers"]]

    def keeps(self, peers: int) -> bool:
        """Whether systemd keeps exactly the sockets of the first peers, by name."""
        kept = {name: len(sockets) for name, sockets in self.systemd.store.items()}
        return kept == {f"peer-{port}": 1 for port in self.ports[:peers]}

    def ping_age_s(self) -> float:
        pings = [each.at_s for each in list(self.systemd.received) if "WATCHDOG" in each.fields]
        return time.monotonic() - pings[-1]


@pytest.fixture
def service(tmp_path: Path, etcd: str) -> Iterator[Service]:
    with FakeSystemd(tmp_path) as systemd:
        yield Service(systemd, etcd)


def wait_for_more(load: Load, service: Service, count: int = 500) -> None:
    """Wait until every peer has answered more than was in flight."""
    targets = {port: load.report().of(port).sent + count for port in service.ports}
    eventually(
        lambda: all(load.report().of(port).received > target for port, target in targets.items())
    )


def test_notifications_of_a_life(service: Service) -> None:
    """READY once all peers are, each peer's socket by name, a reload from begin to end, the stop."""
    systemd = service.systemd
    service.start()
    assert all(peer["state"] == "ready" for peer in service.status()["peers"])
    eventually(lambda: service.keeps(PEERS))
    assert systemd.values("STATUS")[-1].startswith(f"{PEERS}/{PEERS} ready")
    before_us = time.monotonic_ns() // 1000
    systemd.signal(signal.SIGHUP)
    service.wait_ready(times=2)
    (reloading_us,) = systemd.values("MONOTONIC_USEC")
    assert int(reloading_us) >= before_us
    assert systemd.stop() == 0
    assert list(dict.fromkeys(systemd.names())) == ["READY", "RELOADING", "STOPPING"]
    names = systemd.names()
    assert names[0] == "READY"
    assert names[-2:] == ["READY", "STOPPING"]
    assert not systemd.values("FDSTOREREMOVE")


def test_workers_do_not_notify_systemd(service: Service) -> None:
    service.systemd.watchdog_s = 30
    service.start()
    names = set(request(service.ports[0], b"ENV", b"")[2].decode().split())
    assert not [name for name in names if name.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_"))]


def test_a_restart_under_load_loses_nothing(service: Service) -> None:
    service.start()
    with Load(service.ports, rate=RATE) as load:
        for _ in range(2):
            wait_for_more(load, service)
            assert service.systemd.stop() == 0
            service.start()
        wait_for_more(load, service)
        report = load.finish()
    assert report.finished
    assert (report.missing, report.doubled, report.out_of_order) == (0, 0, 0)
    assert service.keeps(PEERS)


def test_a_killed_supervisor_costs_what_was_in_flight(service: Service) -> None:
    service.start()
    kills = 3
    with Load(service.ports, rate=RATE) as load:
        for _ in range(kills):
            wait_for_more(load, service)
            pids = service.pids()
            service.systemd.kill()
            # KillMode=mixed waits for the whole cgroup.
            eventually(partial(all_gone, pids))
            service.start()
        wait_for_more(load, service)
        report = load.finish()
    assert report.finished
    assert report.missing <= kills * PEERS * RX_BATCH
    assert (report.doubled, report.out_of_order) == (0, 0)


def test_a_socket_unit(service: Service) -> None:
    """Bound by systemd, with any name: it is used, and not taken a second time from the store."""
    for port in service.ports[:2]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # systemd does
        sock.bind(("127.0.0.1", port))
        sock.setblocking(False)
        service.systemd.sockets[f"chat-{port}.socket"] = sock
    for _ in range(2):
        service.start()
        for port in service.ports:
            assert request(port, b"SEQ", b"x")[2] == b"x"
        assert service.systemd.stop() == 0
    assert "WARNING" not in service.systemd.err
    assert '"warning"' not in service.systemd.err


def test_stored_sockets_without_a_peer_are_discarded(service: Service) -> None:
    """A start with fewer peers than the previous one."""
    service.start()
    eventually(lambda: service.keeps(PEERS))
    service.systemd.stop()
    service.start("--peers=2")
    eventually(lambda: service.keeps(2))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", service.ports[-1]))


def test_scaling_changes_the_stored_sockets(service: Service) -> None:
    service.start()
    for peers in (2, 3):
        control.request(service.control, "scale", {"peers": peers}, timeout_s=20)
        eventually(partial(service.keeps, peers))


def test_the_watchdog_is_pinged_while_most_peers_are_healthy(service: Service) -> None:
    """Half of the peers may hang; when most do, or the supervisor does, the pings stop."""
    service.systemd.watchdog_s = 1.0
    service.start()
    eventually(lambda: service.ping_age_s() < 0.6)
    pids = service.pids()
    for pid in pids[:2]:
        send_signal(pid, signal.SIGSTOP)
    # Longer than a heartbeat may be old (5 s), and the pings continue.
    eventually(lambda: service.status()["peers"][0]["heartbeat_age_s"] > 6)
    eventually(lambda: service.ping_age_s() < 0.6)
    send_signal(pids[2], signal.SIGSTOP)
    eventually(lambda: service.ping_age_s() > 2.0)
    send_signal(pids[0], signal.SIGCONT)
    eventually(lambda: service.ping_age_s() < 0.6)
    service.systemd.signal(signal.SIGSTOP)
    eventually(lambda: service.ping_age_s() > 2.0)
    service.systemd.signal(signal.SIGCONT)
    eventually(lambda: service.ping_age_s() < 0.6)


def test_every_reload_ends_with_ready(service: Service) -> None:
    """systemd waits for it: also with a peer in a crash loop, and with an app that cannot be loaded."""
    service.start()
    pids = service.pids()

    def crashlooped() -> bool:
        peer = service.status()["peers"][-1]
        if peer["state"] == "ready":
            psutil.Process(peer["pid"]).kill()
        return bool(peer["state"] == "crashloop")

    eventually(crashlooped)
    status = f"{PEERS - 1}/{PEERS} ready, 1 crashloop"
    eventually(lambda: service.systemd.values("STATUS")[-1] == status)
    (service.systemd.folder / "kept.py").write_text("1/0")
    service.systemd.signal(signal.SIGHUP)
    eventually(lambda: "RELOADING" in service.systemd.names())
    service.wait_ready(times=2)
    assert service.pids()[:-1] == pids[:-1]
