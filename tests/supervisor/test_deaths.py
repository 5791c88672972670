"""The death certificate: how a worker ended, what was lost, its last lines, and what happens next."""

import itertools
import signal
from functools import partial
from typing import Any

import orjson
import pytest

from harness import raw_client
from harness.command import peerd
from harness.eventually import eventually
from harness.supervised import Running, Supervised, send_signal
from harness.supervisor_requests import Asked, ask, death_of, events, is_replaced, logged, pids

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


def start(supervised: Supervised, *args: str, peers: int = 2, app: str = APP) -> Running:
    return supervised.start(*args, peers=peers, app=app).wait_ready()


def check_certificate(running: Running, pid: int, slot: int = 0) -> dict[str, Any]:
    """Log, status and events agree on the death of a slot's first worker. Returns the event."""
    peer_id = f"localhost:{running.ports[slot]}"
    died = death_of(running, pid)
    assert died["peer_id"] == peer_id
    assert died["generation"] == 1
    assert 0 < died["ready_for_s"] < 60
    assert died["oom"] is False
    last_exit = running.peer(slot)["last_exit"]
    assert 0 <= last_exit["age_s"] < 60
    shown = ("pid", "generation", "how", "cause", "oom", "ready_for_s", "lost_in_flight")
    for name in (*shown, "next", "last_lines"):
        assert last_exit[name] == died[name], name
    sentence = (
        f"worker pid {pid}: {died['how']} after {died['ready_for_s']:.1f} s of service; "
        f"datagrams in hand and lost: {died['lost_in_flight']}; next: {died['next']}"
    )
    (line,) = [line for line in running.err.splitlines() if sentence in line]
    assert f" ERROR    peer={peer_id} " in line
    assert f" pid={pid} gen=1: " in line
    assert sentence in logged(running, slot)
    return died


@pytest.mark.parametrize("app", [APP, COROUTINES], ids=["plain", "coroutine"])
def test_a_handler_ends_its_worker(supervised: Supervised, app: str) -> None:
    cases = [
        (b"OS_EXIT", "exit code 3", "exit", "about to go"),
        (b"SEGFAULT", "killed by SIGSEGV", "signal", "Fatal Python error: Segmentation fault"),
        (b"SYS_EXIT", "exit code 5", "exit", "SystemExit: 5"),
        (b"SYS_EXIT_TEXT", "exit code 1", "exit", "SystemExit: enough"),
        (b"INTERRUPT", "exit code 70", "exit", "KeyboardInterrupt"),
    ]
    running = start(supervised, app=app, peers=len(cases) + 1)
    before = pids(running)
    for slot, (magic, how, cause, last) in enumerate(cases):
        raw_client.send(running.ports[slot], magic)
        died = check_certificate(running, before[slot], slot)
        assert (died["how"], died["cause"], died["lost_in_flight"]) == (how, cause, 1)
        assert last in "\n".join(died["last_lines"])
        assert died["next"] == "restarted at once"
    running.wait_ready()
    assert [peer["lost_in_flight"] for peer in running.status()["peers"]] == [1] * len(cases) + [0]
    assert pids(running)[-1] == before[-1]


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


def test_another_process_sends_signals(supervised: Supervised) -> None:
    cases = [
        (signal.SIGKILL, "killed by SIGKILL", "signal"),
        (signal.SIGHUP, "killed by SIGHUP", "signal"),
        (signal.SIGUSR1, "killed by SIGUSR1", "signal"),
        (signal.SIGRTMIN + 5, "killed by signal 39", "signal"),
        (signal.SIGTERM, "exit code 0", "exit"),
        (signal.SIGRTMIN, "exit code 0", "exit"),  # HAND_OVER, without a successor
    ]
    running = start(supervised, peers=len(cases) + 1)
    before = pids(running)
    send_signal(before[-1], signal.SIGINT)  # ignored
    for slot, (number, how, cause) in enumerate(cases):
        send_signal(before[slot], number)
        died = check_certificate(running, before[slot], slot)
        assert (died["how"], died["cause"], died["lost_in_flight"]) == (how, cause, 0)
        assert died["next"] == "restarted at once"
        eventually(partial(is_replaced, running, slot, before[slot]))
    running.wait_ready()
    for port in running.ports:
        assert raw_client.request(port, b"PING", b"x")[2] == b"x"
    assert [peer["restarts"] for peer in running.status()["peers"]] == [1] * len(cases) + [0]
    assert pids(running)[-1] == before[-1]


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
    supervised.write_app(f"import time\ntime.sleep(1)\n{APP}")
    restart = Asked(running, "restart", slot=0)
    eventually(lambda: len(running.tree()) == 4)
    send_signal(pid, signal.SIGKILL)
    died = check_certificate(running, pid)
    assert died["next"] == "its successor, which was starting, takes over"
    (replaced,) = restart.answer()["replaced"]
    assert replaced["pid"] == pids(running)[0]
    assert running.peer(0)["restarts"] == 1
    assert raw_client.request(running.ports[0], b"PING", b"x")[2] == b"x"


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
    ask(running, "reload")
    assert events(running, "died") == []
    assert running.peer(0)["last_exit"] is None
    assert running.stop() == 0
    assert "ERROR" not in running.err
    assert "lost" not in running.err


def test_a_worker_that_dies_while_it_starts(supervised: Supervised) -> None:
    app = "import os\nprint('so far so good', flush=True)\nos._exit(9)\n"
    running = supervised.start(peers=1, app=app)
    (died, *_) = eventually(lambda: events(running, "died"))
    assert (died["how"], died["cause"]) == ("exit code 9", "exit")
    assert "ready_for_s" not in died
    assert died["last_lines"] == ["so far so good"]
    assert "exit code 9 before it was ready" in running.err
    assert running.peer(0)["last_exit"]["ready_for_s"] is None


def test_peerd_events_shows_replacements_and_deaths(supervised: Supervised) -> None:
    running = start(supervised)
    pid, replaced = pids(running)
    ask(running, "restart", slot=1)
    raw_client.send(running.ports[0], b"OS_EXIT")
    death_of(running, pid)
    shown = peerd("events", "--json", f"--control={running.control}")
    found = [orjson.loads(line) for line in shown.stdout.splitlines()]
    assert [event["number"] for event in found] == list(range(1, len(found) + 1))
    (event,) = [event for event in found if event["event"] == "replaced"]
    assert (event["old_pid"], event["pid"]) == (replaced, pids(running)[1])
    (died,) = [event for event in found if event["event"] == "died"]
    assert died["pid"] == pid
    assert (died["how"], died["cause"], died["oom"]) == ("exit code 3", "exit", False)
    assert (died["lost_in_flight"], died["next"]) == (1, "restarted at once")
    assert died["last_lines"] == ["about to go"]
    assert died["ready_for_s"] > 0
    text = peerd("events", f"--control={running.control}").stdout
    (line,) = [line for line in text.splitlines() if "died" in line]
    peer_id = f"localhost:{running.ports[0]}"
    assert f"died          {peer_id}  pid={pid}  generation=1  how='exit code 3'" in line
    assert "next='restarted at once'" in line
