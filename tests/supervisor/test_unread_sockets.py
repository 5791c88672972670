"""A peer that does not read its socket: not ready, without a record, and replaced after the stuck timeout."""

import socket
import time
from functools import partial
from typing import Any

import pytest

from harness import raw_client
from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Running, Supervised
from harness.supervisor_requests import death_of, events, http_get, is_replaced, logged
from peerd._loop import DatagramLoop
from peerd._scoreboard import PeerState, Scoreboard
from peerd.health import Health, HealthCheck
from peerd.settings import SupervisorSettings
from peerd.supervisor.events import Event, PeerEvent, SocketNotRead, SocketReadAgain
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Loop
from peerd.supervisor.output import PeerLog, RecentLines
from peerd.supervisor.peer_health import PeerHealth

MAX_WAITING = 10_000

APP = """
import asyncio, os, peerd
app = peerd.App()
released = asyncio.Event()
releases = []

async def release():
    while not os.path.exists("release"):
        await asyncio.sleep(0.1)
    released.set()

@app.handler("HANG")
async def hang(message):
    releases or releases.append(asyncio.ensure_future(release()))
    await released.wait()

@app.handler("PING")
async def ping(message):
    return peerd.Message("PONG", message.version, message.body)
"""

pytestmark = pytest.mark.timeout(240)


def start(supervised: Supervised, *args: str) -> tuple[Running, int]:
    """A supervisor of two peers, and the port of its metrics."""
    port = free_ports()
    flag = f"--metrics=127.0.0.1:{port}"
    return supervised.start(flag, *args, peers=2, app=APP).wait_registered(), port


def fill(running: Running, slot: int) -> None:
    """Send messages whose handlers wait, more than a worker takes."""

    def is_full() -> bool:
        raw_client.send(running.ports[slot], b"HANG", count=200)
        peer = running.peer(slot)
        is_waiting = sum(peer["handlers_waiting"].values()) >= MAX_WAITING
        return is_waiting and bool(peer["rx_queued_bytes"])

    eventually(is_full)


def is_shown_as(running: Running, health: str) -> bool:
    peer = running.peer(0)
    return peer["health"] == health and not peer["registered"]


def test_a_worker_with_too_many_waiting_handlers_is_not_ready_until_it_reads(
    supervised: Supervised,
) -> None:
    running, port = start(supervised)
    pid = running.peer(0)["pid"]
    fill(running, 0)
    eventually(lambda: is_shown_as(running, "full"))
    peer = running.peer(0)
    assert peer["state"] == "ready"
    assert peer["health_for_s"] >= 5
    assert peer["summary"].startswith("too many waiting handlers, socket not read for ")
    assert peer["handlers_waiting"] == {"HANG": MAX_WAITING}
    assert running.status()["supervisor"]["state"] == "degraded"
    status, line = http_get(port, "/healthz/ready")
    assert (status, line.count("\n")) == (503, 1)
    assert line.startswith(f"not ready: {peer['peer_id']} (too many waiting handlers")
    assert f"localhost:{running.ports[1]}" not in line
    _, text = http_get(port, "/metrics")
    waiting = f'peerd_handlers_waiting{{peer="{peer["peer_id"]}",magic="HANG"}} {MAX_WAITING}\n'
    assert waiting in text
    assert f'peerd_healthy{{peer="{peer["peer_id"]}"}} 0\n' in text
    (begun,) = events(running, "not reading")
    assert (begun["peer_id"], begun["health"]) == (peer["peer_id"], "full")
    assert any("too many waiting handlers" in line for line in logged(running, 0))
    assert running.peer(1)["registered"]
    assert not events(running, "reads again")
    (supervised.folder / "release").touch()
    eventually(lambda: running.peer(0)["registered"])
    eventually(lambda: http_get(port, "/healthz/ready") == (200, "ready\n"))
    assert len(events(running, "reads again")) == 1
    assert not events(running, "stuck")
    assert running.peer(0)["pid"] == pid


def test_a_full_worker_is_replaced_after_the_stuck_timeout(supervised: Supervised) -> None:
    running, port = start(supervised, "--stuck-timeout=2")
    pid = running.peer(0)["pid"]
    fill(running, 0)
    eventually(partial(is_replaced, running, 0, pid))
    running.wait_ready()
    assert death_of(running, pid)["cause"] == "stuck"
    assert events(running, "stuck")[0]["pid"] == pid
    assert 'async_server.py"' in running.err  # its stack
    eventually(lambda: raw_client.request(running.ports[0], b"PING", b"x")[0] == b"PONG")
    eventually(lambda: http_get(port, "/healthz/ready")[0] == 200)
    eventually(lambda: running.peer(0)["registered"])


def test_a_loop_that_runs_without_reading_its_queue_is_unread_then_stuck() -> None:
    """For any reason: here the loop has another socket than the peer."""
    loop = Loop()
    journal = Journal(loop)
    seen: list[Event] = []
    journal.subscribe(Event, seen.append)
    slot = Scoreboard(1).slots[0]
    slot.state = PeerState.READY

    def publish(kind: type[PeerEvent], **details: Any) -> None:
        journal.publish(kind(slot=0, peer_id="localhost:5001", **details))

    settings = SupervisorSettings(liveness_timeout_s=1.0, stuck_timeout_s=1.0)
    with bound_socket() as own, bound_socket() as other, bound_socket() as client:
        worker = DatagramLoop(other.fileno(), {}, {}, slot, lambda *_: None)
        log = PeerLog(slot, "localhost:5001", 5001, RecentLines())
        health = PeerHealth(slot, own, settings, publish, log)
        registrar = HealthCheck(settings.liveness_timeout_s)
        found: list[Health] = []

        def check_until(wanted: Health) -> bool:
            worker.turn()
            health.check()
            assert health.diagnosis is not None
            found.append(health.diagnosis.health)
            return found[-1] is wanted

        eventually(lambda: check_until(Health.IDLE))
        client.sendto(b"x", own.getsockname())
        eventually(lambda: check_until(Health.UNREAD))
        assert not health.is_healthy
        diagnosis = registrar.judge(slot, time.monotonic_ns())
        assert diagnosis is not None
        assert diagnosis.health is Health.UNREAD
        eventually(lambda: check_until(Health.STUCK))
        assert not health.has_recovered()
        client.sendto(b"x", other.getsockname())  # now the loop reads something
        eventually(lambda: check_until(Health.IDLE))
        assert health.has_recovered()
    loop.run_once()
    loop.close()
    assert list(dict.fromkeys(found)) == [Health.IDLE, Health.UNREAD, Health.STUCK]
    assert [type(event) for event in seen] == [SocketNotRead, SocketReadAgain]


def bound_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock
