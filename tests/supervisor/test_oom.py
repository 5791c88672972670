"""A worker that the kernel's OOM killer ended is distinguished from one killed by a user."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import orjson

from harness import raw_client
from harness.eventually import eventually
from harness.memory_group import MemoryGroup, memory_group
from harness.supervised import Running, Supervised, send_signal
from harness.supervisor_requests import death_of

NO_ETCD = "http://127.0.0.1:1"

LIMIT_BYTES = 256 << 20
"""The supervisor, its registrar and two workers use a third of that."""

APP = """
import subprocess, sys, peerd
app = peerd.App()
hoard = []

@app.handler("EAT")
def eat(message):
    while True:
        hoard.append(b"x" * 2**20)

@app.handler("CHILD")
def child(message):
    eat = "hoard = []\\nwhile True: hoard.append(b'x' * 2**20)"
    return b"%d" % subprocess.run([sys.executable, "-c", eat]).returncode
"""


def start(supervised: Supervised, group: MemoryGroup) -> Running:
    (supervised.folder / "hungry.py").write_text(APP)
    running = supervised.start("--app=hungry:app", peers=2, etcd=NO_ETCD, through=group.enter)
    running.wait_ready()
    assert {process.pid for process in running.tree()} == group.pids()
    return running


def replaced(running: Running, slot: int, pid: int) -> dict[str, Any]:
    def successor() -> dict[str, Any] | None:
        peer = running.peer(slot)
        return peer if peer["state"] == "ready" and peer["pid"] != pid else None

    peer = eventually(successor)
    assert peer is not None
    return peer


def kill_as_a_user(running: Running, slot: int) -> dict[str, Any]:
    pid = running.peer(slot)["pid"]
    send_signal(pid, signal.SIGKILL)
    peer = replaced(running, slot, pid)
    assert peer["last_exit"]["oom"] is False
    event = death_of(running, pid)
    assert (event["oom"], event["how"]) == (False, "killed by SIGKILL")
    return event


def test_out_of_memory_is_distinguished_from_a_kill(supervised: Supervised) -> None:
    with memory_group(LIMIT_BYTES) as group:
        running = start(supervised, group)
        kill_as_a_user(running, 0)
        assert "out of memory" not in running.err

        pid, well = (running.peer(slot)["pid"] for slot in (0, 1))
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(raw_client.pack(b"EAT", b"1", b""), ("127.0.0.1", running.ports[0]))
            peer = replaced(running, 0, pid)
        last_exit = peer["last_exit"]
        assert last_exit["oom"] is True
        assert (last_exit["how"], last_exit["lost_in_flight"]) == ("killed by SIGKILL", 1)
        assert last_exit["ready_for_s"] > 0
        assert last_exit["age_s"] >= 0
        assert last_exit["next"].startswith("restarted")
        event = death_of(running, pid)
        assert (event["oom"], event["lost_in_flight"]) == (True, 1)
        assert "out of memory" in running.err
        assert orjson.dumps(event)
        assert running.peer(1)["pid"] == well
        assert running.peer(1)["last_exit"] is None

        kill_as_a_user(running, 0)  # one kill explains one death only
        assert running.err.count("out of memory") == 1
        running.signal(signal.SIGTERM)
        assert running.wait() == 0


def test_an_oom_kill_of_a_handlers_child_explains_no_later_death(
    supervised: Supervised,
) -> None:
    with memory_group(LIMIT_BYTES) as group:
        running = start(supervised, group)
        answer = raw_client.request(running.ports[0], b"CHILD", b"", timeout_s=20)
        assert answer[2] == b"%d" % -signal.SIGKILL
        # The supervisor counts twice per second, and a kill explains a death within the next 5 s.
        answered_s = running.status()["supervisor"]["uptime_s"]
        eventually(lambda: running.status()["supervisor"]["uptime_s"] > answered_s + 6)
        kill_as_a_user(running, 0)
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
