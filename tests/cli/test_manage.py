"""peerd reload, restart and scale, run as a shell would. Other tests check that they lose no datagram."""

import signal
import subprocess
import time
from typing import Any

import orjson

from harness import raw_client
from harness.command import command, peerd
from harness.eventually import eventually
from harness.supervised import Running, Supervised, is_gone

PLAIN = "import peerd\napp = peerd.App()\n"


def ports(running: Running) -> list[int]:
    return [peer["port"] for peer in running.status()["peers"]]


def test_reload_prints_a_summary(supervised: Supervised) -> None:
    running = supervised.start(peers=2).wait_ready()
    shown = peerd("reload", f"--control={running.control}")
    assert shown.returncode == 0
    last = shown.stdout.splitlines()[-1]
    assert last.startswith("2 workers replaced, longest gap ")
    gaps = [row["gap_ms"] for row in replaced(running)]
    assert len(gaps) == 2


def replaced(running: Running) -> list[dict[str, Any]]:
    shown = peerd("reload", f"--control={running.control}", "--json")
    rows = orjson.loads(shown.stdout)["replaced"]
    assert isinstance(rows, list)
    return rows


def test_restart_of_a_slot_that_does_not_exist(supervised: Supervised) -> None:
    running = supervised.start(peers=1).wait_ready()
    shown = peerd("restart", "7", f"--control={running.control}")
    assert shown.returncode == 1
    assert "no slot 7" in shown.stderr


def test_a_command_that_times_out_does_not_report_a_stopped_supervisor(
    supervised: Supervised,
) -> None:
    running = supervised.start("--stop-timeout=1", peers=1, app=PLAIN).wait_ready()
    where = f"--control={running.control}"
    supervised.write_app("import time\ntime.sleep(60)\n" + PLAIN)
    for args in (["reload", "--timeout=0"], ["restart", "0", "--timeout=0.3"]):
        late = peerd(*args, where)
        assert late.returncode == 1
        assert f"{args[0]!r} has not ended within 0" in late.stderr
        assert "see 'peerd events'" in late.stderr
        assert "is it stopped?" not in late.stderr


def test_a_supervisor_that_dies_during_a_command_is_named(supervised: Supervised) -> None:
    running = supervised.start(peers=1, app=PLAIN).wait_ready()
    supervised.write_app("import time\ntime.sleep(60)\n" + PLAIN)
    before = len(running.tree())
    with subprocess.Popen(
        command("reload", f"--control={running.control}"), stderr=subprocess.PIPE, text=True
    ) as reload:
        eventually(lambda: len(running.tree()) > before)
        running.kill()
        _, err = reload.communicate(timeout=60)
    assert reload.returncode == 1
    assert f"the supervisor at {running.control} hung up without an answer: has it ended?" in err


def test_a_worker_for_a_parked_peer_has_no_gap(supervised: Supervised) -> None:
    running = supervised.start("--stop-timeout=1", peers=1, app="import os\nos._exit(3)\n")
    eventually(lambda: running.peer(0)["state"] == "crashloop")
    supervised.write_app(PLAIN)
    shown = peerd("restart", "0", f"--control={running.control}")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[-2].split()[-2:] == ["-", "-"]
    assert lines[-1] == "1 worker replaced, longest gap -"


def test_stop_has_one_deadline(supervised: Supervised) -> None:
    running = supervised.start("--stop-timeout=1", peers=1).wait_ready()
    running.signal(signal.SIGSTOP)
    begun_s = time.monotonic()
    late = peerd("stop", "--timeout=1", f"--control={running.control}")
    assert time.monotonic() - begun_s < 30
    assert late.returncode == 1
    assert "'stop' has not ended within 1 s; the supervisor goes on with it" in late.stderr
    assert peerd("stop", "--timeout=0", f"--control={running.control}").returncode == 1
    running.signal(signal.SIGCONT)
    assert running.wait() == 0


def test_scale(supervised: Supervised) -> None:
    running = supervised.start(peers=2).wait_ready()
    base = running.base_port
    grown = peerd("scale", "4", f"--control={running.control}")
    assert grown.returncode == 0, grown.stderr
    lines = grown.stdout.splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == [
        f"started localhost:{base + 2}",
        f"started localhost:{base + 3}",
    ]
    assert lines[-1] == "4 peers, 2 before"
    assert ports(running) == [base, base + 1, base + 2, base + 3]
    assert raw_client.request(base + 3, b"PING", b"x")[0] == b"PONG"
    status = peerd("status", f"--control={running.control}").stdout
    assert "configured 2, running 4" in status
    last_pid = running.peer(3)["pid"]
    shrunk = orjson.loads(peerd("scale", "3", "--json", f"--control={running.control}").stdout)
    assert (shrunk["before"], shrunk["peers"], shrunk["started"]) == (4, 3, [])
    assert [peer["peer_id"] for peer in shrunk["stopped"]] == [f"localhost:{base + 3}"]
    eventually(lambda: is_gone(last_pid))
    same = peerd("scale", "3", f"--control={running.control}")
    assert same.stdout == "3 peers, as before\n"


def test_scale_to_zero_is_bad_usage(supervised: Supervised) -> None:
    for number in ("0", "-1", "x", "5000"):
        assert peerd("scale", "--", number).returncode == 2
