"""Lines that workers print and log: attribution, format, and that no process waits for a reader."""

import signal
import subprocess
import threading
from functools import partial
from typing import Any

import orjson
import pytest

from harness import raw_client
from harness.command import command, peerd, started
from harness.eventually import eventually
from harness.supervised import Running, Supervised, send_signal
from harness.supervisor_requests import ask, death_of, is_replaced, logged, pids

APP = r"""
import logging, os, subprocess, sys, peerd

app = peerd.App()
log = logging.getLogger("chatty")

@app.handler("PING")
def ping(message):
    return message.body

@app.handler("PRINT")
def say(message):
    print(message.body.decode())
    return b"done"

@app.handler("PART")
def say_part(message):
    print(message.body.decode(), end="")
    return b"done"

@app.handler("ERR")
def say_on_stderr(message):
    print(message.body.decode(), file=sys.stderr)
    return b"done"

@app.handler("LOG")
def write_log(message):
    log.warning("%s", message.body.decode())
    return b"done"

@app.handler("RAISE")
def fail(message):
    raise ValueError(message.body.decode())

@app.handler("RAW")
def write_raw(message):
    os.write(1, message.body)
    return b"done"

@app.handler("CHILD")
def run_child(message):
    subprocess.run(["/bin/sh", "-c", "cat; echo and on stderr >&2"], input=message.body)
    return b"done"

@app.handler("MEGABYTE")
def say_a_megabyte(message):
    print("x" * 1_000_000)
    return b"done"

@app.handler("MANY")
def say_much(message):
    for _ in range(50):
        print("y" * 1000)
    return b"done"

@app.handler("EXIT")
def leave(message):
    sys.exit(3)

@app.handler("ABORT")
def abort(message):
    os.abort()
"""


def start(supervised: Supervised, *args: str, peers: int = 1, **options: Any) -> Running:
    return supervised.start(*args, peers=peers, app=APP, **options).wait_ready()


def say(port: int, magic: bytes, body: bytes = b"") -> None:
    """Returns once the handler has returned."""
    raw_client.request(port, magic, body, timeout_s=5)


def json_lines(text: str) -> list[dict[str, Any]]:
    """Every line must be JSON."""
    return [orjson.loads(line) for line in text.splitlines()]


def one_of(running: Running, message: str) -> dict[str, Any]:
    """The only JSON line with this message, once it has been written."""

    def find() -> list[dict[str, Any]]:
        return [line for line in json_lines(running.err) if line["message"] == message]

    (found,) = eventually(find)
    return found


def printed(*args: str) -> str:
    done = peerd(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_line_of_text_names_its_worker(supervised: Supervised) -> None:
    running = start(supervised, peers=2)
    port, pid = running.ports[1], pids(running)[1]
    say(port, b"PRINT", b"printed")
    say(port, b"ERR", b"on stderr")
    say(port, b"LOG", b"logged")
    raw_client.send(port, b"RAISE", b"angry", 100)
    eventually(lambda: running.peer(1)["handler_errors"] == 100)
    who = f"peer=localhost:{port} port={port} pid={pid} gen=1"
    for level, text in (("INFO", "printed"), ("INFO", "on stderr"), ("WARNING", "logged")):
        (line,) = [line for line in running.err.splitlines() if line.endswith(f": {text}")]
        assert line.endswith(f" {level:<8} {who}: {text}")
    assert running.err.count("Traceback") == 1
    assert f"{who}: from=" in running.err
    assert "ValueError: angry" in running.err
    ask(running, "restart", slot=1)
    say(port, b"PRINT", b"by the next one")
    who = f"peer=localhost:{port} port={port} pid={pids(running)[1]} gen=2"
    eventually(lambda: f"{who}: by the next one" in running.err)


def test_a_line_of_json_names_its_worker(supervised: Supervised) -> None:
    running = start(supervised, "--log-format=json", peers=2)
    port, pid = running.ports[1], pids(running)[1]
    whose = {"peer": f"localhost:{port}", "port": port, "pid": pid, "generation": 1}
    say(port, b"PRINT", b'printed, "quoted"\x01')
    line = one_of(running, 'printed, "quoted"\x01')
    assert line.pop("time").endswith("+00:00")
    message = 'printed, "quoted"\x01'
    assert line == {**whose, "level": "info", "logger": "output", "message": message}
    say(port, b"LOG", b"logged\non two lines")
    line = one_of(running, "logged\non two lines")
    assert line.items() >= {**whose, "level": "warning", "logger": "chatty"}.items()
    raw_client.send(port, b"RAISE", b"angry")
    eventually(lambda: "angry" in running.err)
    (line,) = [line for line in json_lines(running.err) if "exception" in line]
    assert line.items() >= {**whose, "level": "error"}.items()
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("\nValueError: angry")
    (line,) = [each for each in json_lines(running.err) if "peers are ready" in each["message"]]
    assert (line["process"], line["pid"]) == ("supervisor", running.pid)


def test_the_default_is_json_without_a_terminal(supervised: Supervised) -> None:
    running = start(supervised, "--log-format=auto")
    say(running.ports[0], b"PRINT", b"hello")
    assert one_of(running, "hello")["pid"] == pids(running)[0]


def test_the_default_is_text_on_a_terminal(supervised: Supervised) -> None:
    running = start(supervised, "--log-format=auto", on_terminal=True)
    port = running.ports[0]
    say(port, b"PRINT", b"hello")
    eventually(lambda: f" INFO     peer=localhost:{port} port={port} pid=" in running.err)
    eventually(lambda: "gen=1: hello" in running.err)
    assert running.stop() == 0
    assert '{"' not in running.err


@pytest.mark.parametrize("how", ["exit", "restart", "stop"])
def test_a_last_line_without_a_line_break_is_kept(supervised: Supervised, how: str) -> None:
    running = start(supervised, "--log-format=json")
    port, pid = running.ports[0], pids(running)[0]
    say(port, b"PART", b"half a li")
    say(port, b"PART", b"ne")
    assert "half" not in running.err
    if how == "exit":
        raw_client.send(port, b"EXIT")
    elif how == "restart":
        ask(running, "restart", slot=0)
    else:
        assert running.stop() == 0
    assert one_of(running, "half a line")["pid"] == pid


def test_output_that_bypasses_python_is_logged(supervised: Supervised) -> None:
    running = start(supervised, "--log-format=json")
    port, pid = running.ports[0], pids(running)[0]
    say(port, b"RAW", b"first\nsecond\r\n\nlast")
    say(port, b"RAW", b" one\n")
    say(port, b"CHILD", b"by a child\n")
    for message in ("first", "second\r", "last one", "by a child", "and on stderr"):
        assert one_of(running, message)["pid"] == pid


def test_a_crash_in_c_shows_where_python_was(supervised: Supervised) -> None:
    running = start(supervised)
    (pid,) = pids(running)
    raw_client.send(running.ports[0], b"ABORT")
    died = death_of(running, pid)
    assert died["how"] == "killed by SIGABRT"
    text = "\n".join(died["last_lines"])
    assert "Fatal Python error: Aborted" in text
    line = 1 + APP.splitlines().index("    os.abort()")
    for shown in (text, running.err):
        assert f'supervised_app.py", line {line} in abort' in shown


def test_long_lines_of_many_workers_never_mix(supervised: Supervised) -> None:
    running = start(supervised, "--log-format=json", peers=8)
    text = start(supervised, peers=8)
    letters = "abcdefgh"
    for number in range(20):
        for each in (running, text):
            for letter, port in zip(letters, each.ports, strict=True):
                raw_client.send(port, b"PRINT", letter.encode() * 10_000)
            eventually(partial(all_said, each, number + 1))
    for letter, port in zip(letters, running.ports, strict=True):
        said = [each for each in json_lines(running.err) if each.get("port") == port]
        assert [each["message"] for each in said] == [letter * 10_000] * 20
    long = [line for line in text.err.splitlines() if len(line) > 1000]
    assert len(long) == 160
    for line in long:
        who, _, said_text = line.rpartition(": ")
        letter = letters[text.ports.index(int(who.split("port=")[1].split()[0]))]
        assert said_text == letter * 10_000


def all_said(running: Running, number: int) -> bool:
    text = running.err
    return all(text.count(letter * 10_000) == number for letter in "abcdefgh")


def test_a_line_that_is_too_long_is_cut(supervised: Supervised) -> None:
    running = start(supervised, "--log-format=json")
    port = running.ports[0]
    say(port, b"MEGABYTE")
    # Not "done": the megabyte may have found a full pipe, and the worker did not wait.
    eventually(lambda: "x" * 1000 in running.err)
    say(port, b"PRINT", b"and the next")
    one_of(running, "and the next")
    (cut,) = [each for each in json_lines(running.err) if "xxxx" in each["message"]]
    assert cut["message"].endswith("x ...")
    assert len(cut["message"]) < 50_000
    # A child process waits for the supervisor to read, so its whole line goes through the pipe.
    say(port, b"CHILD", b"z" * 60_000 + b"\nshort\n")
    one_of(running, "short")
    (cut,) = [each for each in json_lines(running.err) if "zzzz" in each["message"]]
    assert cut["message"].endswith("z ...")


def test_bytes_that_are_no_text(supervised: Supervised) -> None:
    running = start(supervised, "--log-format=json")
    say(running.ports[0], b"RAW", b"\xff\xfe caf\xe9 \xc3\xa9 \x00\n")
    one_of(running, "\\xff\\xfe caf\\xe9 é \x00")
    text = start(supervised)
    say(text.ports[0], b"RAW", b"\xff caf\xe9\n")
    eventually(lambda: r": \xff caf\xe9" in text.err)


FORGED = [
    b"",
    b"garbage",
    b"[]",
    b"{}",
    b"null",
    b"[1.0, 20, 3, 4, 5]",
    b'[1e400, 20, "x", "x", null]',
    b'[1e300, 20, "x", "far away", null]',
    b'[-1e300, 20, "x", "long ago", null]',
    b'[99999999999999.0, 20, "x", "some day", null]',
    b'[1.0, 9999999999, "x", "very important", null]',
    b'[1.0, 20, "x", "%s %d %(peer)s", null]',
    b'[1.0, 20, "x", "\\ud800", null]',
    b'[1.0, 20, "x", "forged", "Traceback"]',
    b'\x1e[1.0, 20, "x", "twice", null]',
    b"[" * 30_000,
]


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_forged_records_break_nothing(supervised: Supervised, log_format: str) -> None:
    running = start(supervised, f"--log-format={log_format}")
    port, pid = running.ports[0], pids(running)[0]
    for forged in FORGED:
        say(port, b"RAW", b"\x1e" + forged + b"\n")
    say(port, b"PRINT", b"still well")
    eventually(lambda: "still well" in running.err)
    assert "Logging error" not in running.err
    assert "Traceback (most" not in running.err
    if log_format == "json":
        forged_lines = [line for line in json_lines(running.err) if "peer" in line]
        assert len([line for line in forged_lines if line["pid"] != pid]) == 0
        assert {line["peer"] for line in forged_lines} == {f"localhost:{port}"}
        (line,) = [line for line in forged_lines if line["message"] == "forged"]
        assert line["exception"] == "Traceback"
    assert len(logged(running, 0)) == len(FORGED) + 1
    assert "still well" in printed("logs", f"--control={running.control}")


def test_peerd_logs(supervised: Supervised) -> None:
    running = start(supervised, peers=2)
    first, second = pids(running)
    for slot, port in enumerate(running.ports):
        for number in range(5):
            say(port, b"PRINT", b"%d says %d" % (slot, number))
    raw_client.send(running.ports[0], b"EXIT")
    eventually(partial(is_replaced, running, 0, first))
    running.wait_ready()
    say(running.ports[0], b"PRINT", b"0 is back")
    eventually(lambda: "0 is back" in logged(running, 0))
    control_flag = f"--control={running.control}"

    everything = printed("logs", control_flag).splitlines()
    who = f"peer=localhost:{running.ports[0]} port={running.ports[0]} pid={first} gen=1"
    assert any(line.endswith(f" INFO     {who}: 0 says 4") for line in everything)
    assert any("exit code 3" in line for line in everything), "what is said of a dead worker"
    assert any(" gen=2: 0 is back" in line for line in everything)
    assert "1 says 4" in "\n".join(everything)

    of_one = printed("logs", "1", control_flag)
    assert [line.rpartition(": ")[2] for line in of_one.splitlines()] == [
        f"1 says {number}" for number in range(5)
    ]
    last = printed("logs", "1", "-n", "2", control_flag)
    assert [line.rpartition(": ")[2] for line in last.splitlines()] == ["1 says 3", "1 says 4"]
    assert printed("logs", "-n", "0", control_flag) == ""

    as_json = json_lines(printed("logs", "1", "--json", control_flag))
    port = running.ports[1]
    whose = {"slot": 1, "peer_id": f"localhost:{port}", "port": port, "pid": second}
    whose |= {"generation": 1, "level": "info", "message": "1 says 4"}
    assert as_json[-1].items() >= whose.items()
    refused = peerd("logs", "7", control_flag)
    assert (refused.returncode, "slot 7" in refused.stderr) == (1, True)


def test_peerd_logs_follows(supervised: Supervised) -> None:
    running = start(supervised)
    port = running.ports[0]
    say(port, b"PRINT", b"before")
    eventually(lambda: "before" in logged(running, 0))
    with started(
        command("logs", "-f", "--json", f"--control={running.control}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert orjson.loads(follower.stdout.readline())["message"] == "before"
        for number in range(3):
            say(port, b"PRINT", b"line %d" % number)
            assert orjson.loads(follower.stdout.readline())["message"] == f"line {number}"
        follower.send_signal(signal.SIGINT)
        assert follower.wait(60) == 130
        assert follower.stderr.read().strip() == b""


def test_the_last_200_lines_are_kept(supervised: Supervised) -> None:
    running = start(supervised)
    for number in range(6):
        say(running.ports[0], b"MANY")
        say(running.ports[0], b"PRINT", b"the last %d" % number)
        eventually(partial(has_said_last, running, f"the last {number}"))
    assert len(logged(running, 0)) == 200
    assert len(printed("logs", "-n", "500", f"--control={running.control}").splitlines()) == 200


def has_said_last(running: Running, text: str) -> bool:
    return logged(running, 0)[-1] == text


def test_a_supervisors_log_without_a_reader(supervised: Supervised) -> None:
    running = start(supervised, "--log-format=json", stderr=subprocess.PIPE)
    port, stream = running.ports[0], running.process.stderr
    assert stream is not None
    running.wait_registered()  # the supervisor's own log is quiet from then on
    for _ in range(10):  # a pipe holds 64 KiB
        say(port, b"MANY")
    eventually(lambda: dropped(running) > 0)
    for _ in range(100):
        assert raw_client.request(port, b"PING", b"x")[2] == b"x"
    last = eventually(lambda: is_steady(running))
    lines: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: lines.extend(map(orjson.loads, stream)))
    reader.start()
    eventually(lambda: len(lines) > 40)
    say(port, b"PRINT", b"now read")
    eventually(lambda: any(line["message"] == "now read" for line in lines))
    assert running.stop() == 0
    reader.join()
    (line,) = [line for line in lines if "were dropped here" in line["message"]]
    assert line["message"] == f"{last} log records were dropped here, because the log was not read"
    assert line["level"] == "warning"


def dropped(running: Running) -> int:
    return int(running.status()["supervisor"]["log_dropped"])


def is_steady(running: Running) -> int:
    """The count, once all printed lines have reached the supervisor."""
    return dropped(running) if ask(running, "logs", slot=0)[-1]["age_s"] > 0.3 else 0


def test_a_worker_does_not_wait_for_a_supervisor_that_does_not_read(
    supervised: Supervised,
) -> None:
    running = start(supervised)
    port = running.ports[0]
    running.signal(signal.SIGSTOP)
    try:
        for _ in range(10):
            say(port, b"MANY")
            assert raw_client.request(port, b"PING", b"x")[2] == b"x"
        say(port, b"LOG", b"no room for this")
        raw_client.send(port, b"RAISE", b"nor for this")
        assert raw_client.request(port, b"PING", b"x")[2] == b"x"
    finally:
        send_signal(running.pid, signal.SIGCONT)

    def has_room_again() -> bool:
        say(port, b"PRINT", b"room again")
        return logged(running, 0)[-1:] == ["room again"]

    eventually(has_room_again)
    peer = running.peer(0)
    assert peer["log_dropped"] > 100
    assert running.status()["supervisor"]["log_dropped"] == 0
    assert "no room for this" not in running.err
    # A line that was cut by a full pipe spoils no other line.
    assert {
        line.rpartition(": ")[2].strip("y") for line in running.err.splitlines() if "yy" in line
    } == {""}
