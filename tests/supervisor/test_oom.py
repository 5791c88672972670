"""A worker that the kernel's OOM killer ended is distinguished from one killed by a user."""

import signal
from pathlib import Path
from typing import Any

import orjson

from harness import raw_client
from harness.control_groups import ControlGroup, memory_group
from harness.eventually import eventually
from harness.supervised import NO_ETCD, Running, Supervised, send_signal
from harness.supervisor_requests import death_of, serving

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


def start(supervised: Supervised, group: ControlGroup) -> Running:
    running = supervised.start(peers=2, etcd=NO_ETCD, through=group.enter, app=APP).wait_ready()
    assert set(running.tree_pids()) == group.pids()
    return running


def kill_as_a_user(running: Running, slot: int) -> dict[str, Any]:
    pid = running.peer(slot)["pid"]
    send_signal(pid, signal.SIGKILL)
    serving(running, slot, but_not=[pid])
    assert running.peer(slot)["last_exit"]["oom"] is False
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
        raw_client.send(running.ports[0], b"EAT")
        serving(running, 0, but_not=[pid])
        last_exit = running.peer(0)["last_exit"]
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
        assert running.stop() == 0


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
        assert running.stop() == 0
