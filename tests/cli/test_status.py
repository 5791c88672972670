"""peerd status and peerd wait on a running supervisor, in terminals and in pipes."""

import signal
import socket
import subprocess
from pathlib import Path

import orjson
import pytest

from harness import raw_client
from harness.command import command, peerd, started
from harness.eventually import eventually
from harness.supervised import Running, Supervised, send_signal
from harness.terminal import Terminal


def ready(supervised: Supervised, peers: int = 2) -> Running:
    return supervised.start(peers=peers).wait_ready()


def test_status_in_a_pipe(supervised: Supervised) -> None:
    """The document, the table with every column and no colour, and fields for scripts."""
    running = ready(supervised).wait_registered()
    raw_client.request(running.ports[1], b"PING", b"x")
    eventually(lambda: running.peer(1)["rx_messages"] == 1)
    where = f"--control={running.control}"
    document = peerd("status", where, "--json")
    assert document.returncode == 0
    report = orjson.loads(document.stdout)
    assert set(report) == {"supervisor", "registry", "peers"}
    assert {"pid", "state", "uptime_s", "version"} <= set(report["supervisor"])
    expected = "slot peer_id url port pid state restarts uptime_s registered rx_messages rx_bytes "
    expected += (
        "rx_dropped decode_errors handler_errors tx_messages tx_dropped rss_bytes cpu_percent"
    )
    assert set(expected.split()) <= set(report["peers"][0])
    table = peerd("status", where).stdout
    assert "\x1b" not in table
    for text in ("CPU%", f"localhost:{running.ports[1]}", "peers 2 of 2 ready"):
        assert text in table
    fields = peerd("status", where, "-o", "slot, port,state,conflict,counters.rx_messages")
    assert fields.returncode == 0
    assert fields.stdout == (
        f"0\t{running.ports[0]}\tready\t-\t0\n1\t{running.ports[1]}\tready\t-\t1\n"
    )


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_table_fits_the_terminal(supervised: Supervised, columns: int) -> None:
    running = ready(supervised)
    with Terminal(command("status", f"--control={running.control}"), columns) as terminal:
        assert terminal.wait() == 0
        lines = terminal.text.splitlines()
        assert "\x1b[32mready" in terminal.raw
    head = next(number for number, line in enumerate(lines) if line.startswith("#"))
    table = lines[head : head + 4]
    assert all(len(line) <= columns for line in table)
    assert {"PEER", "STATE", "UP", "RST"} <= set(table[0].split())
    assert ("left out" in " ".join(lines)) == (columns < 200)


def test_a_degraded_supervisor_exits_with_1(supervised: Supervised) -> None:
    running = ready(supervised)
    pid = running.peer(1)["pid"]
    send_signal(pid, signal.SIGSTOP)
    try:
        eventually(lambda: peerd("status", f"--control={running.control}").returncode == 1)
        shown = peerd("status", f"--control={running.control}", "-o", "slot,state")
        assert shown.returncode == 1
    finally:
        send_signal(pid, signal.SIGCONT)
    eventually(lambda: peerd("status", f"--control={running.control}").returncode == 0)


BUSY = """
import time, peerd
app = peerd.App()

@app.handler("SLEEP")
def sleep(message):
    time.sleep(60)
"""


def test_a_handler_that_does_not_return_is_shown(supervised: Supervised) -> None:
    running = supervised.start("--stop-timeout=1", peers=3, app=BUSY).wait_ready()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(raw_client.pack(b"SLEEP", b"1", b""), ("127.0.0.1", running.ports[1]))
    where = f"--control={running.control}"
    eventually(lambda: running.status()["supervisor"]["state"] == "degraded")
    fields = peerd("status", where, "-o", "slot,state,health").stdout.splitlines()
    assert fields[1] == "1\tready\tlate"
    shown = peerd("status", where)
    assert shown.returncode == 1
    assert "peers 2 of 3 ready" in shown.stdout
    (row,) = [line for line in shown.stdout.splitlines() if f"localhost:{running.ports[1]}" in line]
    assert row.split()[2] == "late"
    waited = peerd("wait", where, "--timeout=0.2")
    assert waited.returncode == 1
    assert f"localhost:{running.ports[1]} (" in waited.stderr
    assert f"localhost:{running.ports[0]}" not in waited.stderr


def test_without_a_supervisor_status_exits_with_3(tmp_path: Path) -> None:
    assert peerd("status").returncode == 3
    for more in ([], ["--watch"], ["-o", "pid"], ["--json"]):
        named = peerd("status", f"--control={tmp_path / 'none.sock'}", *more)
        assert named.returncode == 3
        assert "peerd supervise" in named.stderr


def test_the_last_exit(supervised: Supervised) -> None:
    running = ready(supervised)
    fields = ["status", f"--control={running.control}", "-o", "slot,restarts,last_exit.how"]
    assert peerd(*fields).stdout == "0\t0\t-\n1\t0\t-\n"
    send_signal(running.peer(1)["pid"], signal.SIGKILL)
    eventually(lambda: running.peer(1)["restarts"] == 1)
    running.wait_ready()
    assert peerd(*fields).stdout == "0\t0\t-\n1\t1\tkilled by SIGKILL\n"
    assert "SIGKILL " in peerd("status", f"--control={running.control}").stdout


def test_an_unknown_field(supervised: Supervised) -> None:
    running = ready(supervised, peers=1)
    for fields, text in {
        "stat": "did you mean 'state'?",
        "counters.rx_mesages": "did you mean 'counters.rx_messages'?",
        "last_exit.hwo": "did you mean 'last_exit.how'?",
        "qqq": "there are: slot, peer_id",
        "state,": "there is no field ''",
    }.items():
        shown = peerd("status", f"--control={running.control}", "-o", fields)
        assert (shown.returncode, shown.stdout) == (2, ""), fields
        assert text in shown.stderr


def test_json_and_fields_exclude_each_other() -> None:
    assert peerd("status", "--json", "-o", "pid").returncode == 2


@pytest.mark.parametrize(("key", "code"), [(b"q", 0), (b"\x03", 0), (b"", 128 + signal.SIGTERM)])
def test_watch_ends_and_restores_the_screen(supervised: Supervised, key: bytes, code: int) -> None:
    """With a key, or with SIGTERM."""
    running = ready(supervised)
    with Terminal(command("status", "--watch", f"--control={running.control}")) as terminal:
        eventually(lambda: "RX/s" in terminal.text)
        if key:
            terminal.type(key)
        else:
            terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait() == code
        assert "Traceback" not in terminal.text
        # To the alternate screen, and back.
        assert "\x1b[?1049h" in terminal.raw
        assert "\x1b[?1049l" in terminal.raw


@pytest.mark.parametrize("term", ["dumb", ""])
def test_watch_on_a_terminal_without_cursor_movement(supervised: Supervised, term: str) -> None:
    running = ready(supervised)
    options = ["env", f"TERM={term}", *command("status", "--watch", f"--control={running.control}")]
    with Terminal(options) as terminal:
        eventually(lambda: terminal.text.count("peers 2 of 2 ready") >= 2)
        assert "\x1b[?1049h" not in terminal.raw
        terminal.type(b"\x03")
        assert terminal.wait() == 0


def test_watch_shows_rates(supervised: Supervised) -> None:
    running = ready(supervised, peers=1)
    with (
        Terminal(command("status", "--watch", f"--control={running.control}"), 200) as terminal,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.connect(("127.0.0.1", running.ports[0]))

        def shows_a_rate() -> bool:
            client.send(raw_client.pack(b"NOTE", b"1", b""))
            client.send(raw_client.pack(b"PING", b"1", b""))
            row = terminal.text.rpartition(f"localhost:{running.ports[0]}")[2].split()
            return len(row) > 4 and row[3].isdecimal() and int(row[3]) > 0

        eventually(shows_a_rate)


def test_watch_continues_without_its_supervisor(supervised: Supervised) -> None:
    first = ready(supervised)
    with Terminal(command("status", "--watch", f"--control={first.control}"), 120) as terminal:
        eventually(lambda: f"supervisor pid {first.pid}, ready" in terminal.text)
        first.kill()
        eventually(lambda: "no answer for" in terminal.text)
        second = supervised.start(
            f"--control={first.control}", peers=2, base_port=first.base_port, prefix=first.prefix
        )
        restarted = f"pid {second.pid} follows {first.pid}"
        eventually(lambda: restarted in terminal.text)
        terminal.type(b"q")
        assert terminal.wait() == 0


def test_watch_says_how_many_peers_fit_the_screen(supervised: Supervised) -> None:
    running = ready(supervised, peers=30)
    options = ["status", "--watch", f"--control={running.control}"]
    with Terminal(command(*options), columns=100, rows=20) as terminal:
        eventually(lambda: "of 30 peers; those that are not ready come first" in terminal.text)
        terminal.type(b"q")
        assert terminal.wait() == 0


@pytest.mark.parametrize("options", [[], ["--json"], ["-o", "slot,state"]])
def test_watch_in_a_pipe_prints_report_after_report(
    supervised: Supervised, options: list[str]
) -> None:
    running = ready(supervised, peers=1)
    with started(
        command("status", "--watch", f"--control={running.control}", *options),
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        seen = 0
        while seen < 2:
            line = watching.stdout.readline()
            seen += "ready" in line and "supervisor pid" not in line and "peers 1" not in line
            if options == ["--json"]:
                orjson.loads(line)
            elif options:
                assert line == "0\tready\n"
        watching.send_signal(signal.SIGINT)
        watching.communicate()
    assert watching.returncode == 0


def test_wait(supervised: Supervised, tmp_path: Path) -> None:
    control = tmp_path / "later.sock"
    with started(
        command("wait", f"--control={control}", "--timeout=60"), stdout=subprocess.PIPE, text=True
    ) as waiting:
        running = supervised.start(f"--control={control}", peers=2)
        out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert out == f"2 peers of supervisor pid {running.pid} ready\n"


def test_wait_times_out(supervised: Supervised) -> None:
    absent = peerd("wait", "--timeout=0.2")
    assert absent.returncode == 3
    slow = "import time, peerd\ntime.sleep(30)\napp = peerd.App()\n"
    running = supervised.start("--stop-timeout=1", peers=1, app=slow)
    eventually(running.control.exists)
    late = peerd("wait", f"--control={running.control}", "--timeout=0.5")
    assert late.returncode == 1
    assert f"localhost:{running.ports[0]} (starting)" in late.stderr


def test_wait_for_a_frozen_supervisor(supervised: Supervised) -> None:
    running = ready(supervised, peers=1)
    running.signal(signal.SIGSTOP)
    try:
        assert peerd("wait", f"--control={running.control}", "--timeout=1.5").returncode == 1
    finally:
        running.signal(signal.SIGCONT)
    assert peerd("wait", f"--control={running.control}").returncode == 0
