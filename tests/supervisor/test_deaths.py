"""The death certificate: how a worker ended, what was lost, its last lines, and what happens next."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from typing import Any

import orjson
import pytest

from harness import raw_client
from harness.eventually import eventually
from harness.supervised import Running, Supervised, alive, send_signal
from harness.supervisor_requests import Asked, death_of, events, logged, pids

APP = r"""
import ctypes, os, sys, peerd

app = peerd.App()

@app.handler("PING")
def ping(message):
    return message.body

@app.handler("OS_EXIT")
def os_exit(message):
    print("about to go", flush=True)
    os._exit(3)

@app.handler("SEGFAULT")
def segfault(message):
    print("about to crash", flush=True)
    ctypes.string_at(0)

@app.handler("SYS_EXIT")
def sys_exit(message):
    print("about to leave")
    sys.exit(5)

@app.handler("SYS_EXIT_TEXT")
def sys_exit_text(message):
    sys.exit("enough")

@app.handler("INTERRUPT")
def interrupt(message):
    raise KeyboardInterrupt
"""

COROUTINES = APP.replace("\ndef ", "\nasync def ")


def start(
    supervised: Supervised, *args: str, peers: int = 2, app: str = APP, ready: bool = True
) -> Running:
    (supervised.folder / "mortal.py").write_text(app)
    running = supervised.start("--app=mortal:app", *args, peers=peers)
    if ready:
        running.wait_ready()
    return running


def check_certificate(running: Running, pid: int) -> dict[str, Any]:
    """Log, status and events agree on the death of slot 0's first worker. Returns the event."""
    died = death_of(running, pid)
    assert died["peer_id"] == f"localhost:{running.ports[0]}"
    assert died["generation"] == 1
    assert 0 < died["ready_for_s"] < 60
    assert died["oom"] is False
    last_exit = running.peer(0)["last_exit"]
    for name in (
        *("pid", "generation", "how", "cause", "oom", "ready_for_s", "lost_in_flight", "next"),
        "last_lines",
    ):
        assert last_exit[name] == died[name], name
    assert 0 <= last_exit["age_s"] < 60
    sentence = (
        f"worker pid {pid}: {died['how']} after {died['ready_for_s']:.1f} s of service; "
        f"datagrams in hand and lost: {died['lost_in_flight']}; next: {died['next']}"
    )
    (line,) = [line for line in running.err.splitlines() if sentence in line]
    assert f" ERROR    peer=localhost:{running.ports[0]} " in line
    assert f" pid={pid} gen=1: " in line
    assert sentence in logged(running, 0)
    return died


@pytest.mark.parametrize(
    ("magic", "how", "cause", "last"),
    [
        (b"OS_EXIT", "exit code 3", "exit", "about to go"),
        (b"SEGFAULT", "killed by SIGSEGV", "signal", "Fatal Python error: Segmentation fault"),
        (b"SYS_EXIT", "exit code 5", "exit", "SystemExit: 5"),
        (b"SYS_EXIT_TEXT", "exit code 1", "exit", "SystemExit: enough"),
        (b"INTERRUPT", "exit code 70", "exit", "KeyboardInterrupt"),
    ],
)
@pytest.mark.parametrize("app", [APP, COROUTINES], ids=["plain", "coroutine"])
def test_a_handler_ends_its_worker(
    supervised: Supervised, app: str, magic: bytes, how: str, cause: str, last: str
) -> None:
    running = start(supervised, app=app)
    pid, sibling = pids(running)
    raw_client.send(running.ports[0], magic)
    died = check_certificate(running, pid)
    assert (died["how"], died["cause"], died["lost_in_flight"]) == (how, cause, 1)
    assert last in "\n".join(died["last_lines"])
    assert died["next"] == "restarted at once"
    running.wait_ready()
    assert running.peer(0)["lost_in_flight"] == 1
    assert pids(running)[1] == sibling


def test_the_last_lines_are_those_of_the_dead_worker(supervised: Supervised) -> None:
    running = start(supervised)
    pid = pids(running)[0]
    raw_client.send(running.ports[0], b"SYS_EXIT")
    first = check_certificate(running, pid)
    assert first["last_lines"][0] == "about to leave"
    assert "in sys_exit\n" in first["last_lines"][1]
    running.wait_ready()
    second = pids(running)[0]
    send_signal(second, signal.SIGKILL)
    assert death_of(running, second)["last_lines"] == []


@pytest.mark.parametrize(
    ("number", "how", "cause"),
    [
        (signal.SIGKILL, "killed by SIGKILL", "signal"),
        (signal.SIGHUP, "killed by SIGHUP", "signal"),
        (signal.SIGUSR1, "killed by SIGUSR1", "signal"),
        (signal.SIGRTMIN + 5, "killed by signal 39", "signal"),
        (signal.SIGTERM, "exit code 0", "exit"),
        (signal.SIGRTMIN, "exit code 0", "exit"),  # HAND_OVER, without a successor
    ],
)
def test_another_process_kills_a_worker(
    supervised: Supervised, number: signal.Signals, how: str, cause: str
) -> None:
    running = start(supervised)
    pid = pids(running)[0]
    send_signal(pid, number)
    died = check_certificate(running, pid)
    assert (died["how"], died["cause"], died["lost_in_flight"]) == (how, cause, 0)
    assert died["next"] == "restarted at once"
    eventually(lambda: running.peer(0)["pid"] not in (pid, None))
    running.wait_ready()
    assert raw_client.request(running.ports[0], b"PING", b"x")[2] == b"x"
    assert running.peer(0)["restarts"] == 1


def test_a_sigint_from_another_process_is_ignored(supervised: Supervised) -> None:
    running = start(supervised)
    before = pids(running)
    for pid in before:
        send_signal(pid, signal.SIGINT)
    for port in running.ports:
        assert raw_client.request(port, b"PING", b"x")[2] == b"x"
    assert pids(running) == before


def test_the_next_step_in_a_certificate_is_what_happens(supervised: Supervised) -> None:
    running = start(supervised, "--stop-timeout=1.5", peers=1)
    port = running.ports[0]
    plans = []
    for _ in range(6):
        pid = eventually(lambda: running.peer(0)["pid"])
        running.wait_ready()
        send_signal(pid, signal.SIGKILL)
        plans.append(death_of(running, pid)["next"])
        peer = running.peer(0)
        if peer["state"] == "backoff":
            assert 0 <= peer["next_start_in_s"] <= promised_s(plans[-1]) + 0.1
    assert plans[0] == "restarted at once"
    happened = events(running, "died", "ready")
    for died, ready in itertools.pairwise(happened):
        if died["event"] == "died":
            assert ready["event"] == "ready"
            late_s = died["age_s"] - ready["age_s"] - promised_s(died["next"])
            assert -0.1 < late_s < 15
    assert [promised_s(plan) for plan in plans[:5]] == [
        pytest.approx(delay_s, rel=0.25) for delay_s in (0, 0.25, 0.5, 1, 2)
    ]
    assert plans[5] == (
        "parked because it failed 6 times within 60 s; tried again in 60 s, or by 'peerd restart 0'"
    )
    assert running.peer(0)["state"] == "crashloop"
    assert 30 < running.peer(0)["next_start_in_s"] <= 60
    assert running.peer(0)["last_exit"]["next"] == plans[5]
    (parked,) = events(running, "parked")
    assert (parked["peer_id"], parked["retry_in_s"]) == (f"localhost:{port}", 60)


def promised_s(plan: str) -> float:
    return 0.0 if plan == "restarted at once" else float(plan.split()[2])


def test_a_successor_that_was_starting_takes_over_from_a_dead_worker(
    supervised: Supervised,
) -> None:
    running = start(supervised, peers=1)
    pid = pids(running)[0]
    (supervised.folder / "mortal.py").write_text(f"import time\ntime.sleep(1)\n{APP}")
    restart = Asked(running, "restart", slot=0)
    eventually(lambda: len(running.tree()) == 4)
    send_signal(pid, signal.SIGKILL)
    died = check_certificate(running, pid)
    assert died["next"] == "its successor, which was starting, takes over"
    (replaced,) = restart.answer()["replaced"]
    assert replaced["pid"] == pids(running)[0]


def test_a_death_during_a_stop(supervised: Supervised) -> None:
    running = start(supervised)
    pid = pids(running)[0]
    send_signal(pid, signal.SIGSTOP)
    running.signal(signal.SIGTERM)
    eventually(lambda: "SIGTERM: stopping" in running.err)
    send_signal(pid, signal.SIGKILL)
    assert running.wait() == 0
    assert f"worker pid {pid}: killed by SIGKILL after" in running.err
    assert "next: stopping" in running.err


def test_a_worker_that_was_asked_to_end_gets_no_certificate(supervised: Supervised) -> None:
    running = start(supervised)
    Asked(running, "reload").answer()
    assert events(running, "died") == []
    assert running.peer(0)["last_exit"] is None
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    assert "ERROR" not in running.err
    assert "lost" not in running.err


def test_a_worker_that_dies_while_it_starts(supervised: Supervised) -> None:
    running = start(
        supervised,
        peers=1,
        app="import os\nprint('so far so good', flush=True)\nos._exit(9)\n",
        ready=False,
    )
    (died, *_) = eventually(lambda: events(running, "died"))
    assert (died["how"], died["cause"]) == ("exit code 9", "exit")
    assert "ready_for_s" not in died
    assert died["last_lines"] == ["so far so good"]
    assert "exit code 9 before it was ready" in running.err
    assert running.peer(0)["last_exit"]["ready_for_s"] is None


def test_peerd_events_shows_deaths(supervised: Supervised) -> None:
    running = start(supervised)
    pid = pids(running)[0]
    raw_client.send(running.ports[0], b"OS_EXIT")
    death_of(running, pid)
    command = [sys.executable, "-m", "peerd", "events", f"--control={running.control}"]
    lines = subprocess.check_output([*command, "--json"]).splitlines()
    (died,) = [each for each in map(orjson.loads, lines) if each["event"] == "died"]
    assert died["pid"] == pid
    assert (died["how"], died["cause"], died["oom"]) == ("exit code 3", "exit", False)
    assert (died["lost_in_flight"], died["next"]) == (1, "restarted at once")
    assert died["last_lines"] == ["about to go"]
    (line,) = [
        line for line in subprocess.check_output(command, text=True).splitlines() if "died" in line
    ]
    assert f"pid={pid}" in line
    assert "how='exit code 3'" in line
    assert "next='restarted at once'" in line


@pytest.mark.parametrize("how", ["dies", "cannot start"])
def test_a_crash_loop_ends_the_supervisor_if_configured(supervised: Supervised, how: str) -> None:
    running = start(supervised, "--on-crashloop=exit")
    tree = [process.pid for process in running.tree()]
    source = "import os\nos._exit(3)\n" if how == "dies" else "raise ValueError('broken')\n"
    (supervised.folder / "mortal.py").write_text(source)
    send_signal(pids(running)[0], signal.SIGKILL)
    assert running.wait(60) == 70
    assert f"peer localhost:{running.ports[0]} is in a crash loop: stopping" in running.err
    parked, stops = (
        "times within 60 s; the supervisor stops (--on-crashloop)",
        "crash loop: stopping",
    )
    assert running.err.index(parked) < running.err.index(stops)  # the certificate comes first
    assert not alive(tree)
