"""peerd events -f and peerd logs -f continue with the next supervisor, and end when their reader does."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import orjson
import pytest

from harness import raw_client
from harness.command import command, peerd, started
from harness.eventually import eventually
from harness.supervised import Running, Supervised

APP = """
import peerd
app = peerd.App()

@app.handler("PRINT")
def say(message):
    print(message.body.decode())
    return b"done"
"""


def start(supervised: Supervised, peers: int = 1) -> Running:
    return supervised.start(peers=peers, app=APP).wait_ready()


def successor(supervised: Supervised, first: Running) -> Running:
    running = supervised.start(
        f"--control={first.control}",
        peers=len(first.ports),
        app=APP,
        base_port=first.base_port,
        prefix=first.prefix,
    )
    eventually(lambda: first.status()["supervisor"]["pid"] == running.pid)
    eventually(lambda: first.status()["supervisor"]["state"] == "ready")
    return running


def tell(running: Running, text: str, slot: int = 0) -> None:
    raw_client.request(running.ports[slot], b"PRINT", text.encode(), timeout_s=5)


class Follower:
    """The output so far of a command that runs."""

    def __init__(self, folder: Path) -> None:
        self.files = (folder / "followed.out", folder / "followed.err")

    @property
    def out(self) -> bytes:
        return self.files[0].read_bytes()

    @property
    def err(self) -> bytes:
        return self.files[1].read_bytes()


@contextmanager
def following(folder: Path, *args: str) -> Iterator[Follower]:
    follower = Follower(folder)
    with ExitStack() as stack:
        out, err = (stack.enter_context(path.open("wb")) for path in follower.files)
        stack.enter_context(started(command(*args), stdout=out, stderr=err))
        yield follower


RESTARTED = b"the supervisor was restarted"


def test_events_of_the_next_supervisor_are_shown(supervised: Supervised) -> None:
    first = start(supervised)
    for _ in range(3):  # more events than the next one has when it is asked first
        assert peerd("restart", "0", f"--control={first.control}").returncode == 0
    with following(
        supervised.folder, "events", "-f", "--json", f"--control={first.control}"
    ) as follower:
        eventually(lambda: follower.out.count(b'"replaced"') == 3)
        first.kill()
        successor(supervised, first)
        pid = first.peer(0)["pid"]
        eventually(lambda: b'"ready"' in follower.out.splitlines()[-1])
        last = [orjson.loads(line) for line in follower.out.splitlines()][-1]
        assert (last["event"], last["pid"]) == ("ready", pid)
        assert follower.err.count(RESTARTED) == 1


def test_logs_of_the_next_supervisor_are_shown(supervised: Supervised) -> None:
    first = start(supervised)
    for number in range(3):
        tell(first, f"old {number}")
    with following(supervised.folder, "logs", "-f", "0", f"--control={first.control}") as follower:
        eventually(lambda: b"old 2" in follower.out)
        first.process.terminate()
        assert first.wait() == 0
        successor(supervised, first)
        tell(first, "new 0")
        eventually(lambda: b": new 0" in follower.out)
        assert follower.out.count(b"old 2") == 1
        assert follower.err.count(RESTARTED) == 1


@pytest.mark.parametrize("name", ["events", "logs"])
def test_a_follower_ends_with_its_reader(supervised: Supervised, name: str) -> None:
    running = start(supervised)
    with subprocess.Popen(
        command(name, "-f", f"--control={running.control}"), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        if name == "events":
            process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141


def test_a_slot_without_lines_is_no_error(supervised: Supervised) -> None:
    running = start(supervised, peers=3)
    where = f"--control={running.control}"
    quiet = peerd("logs", "1", where)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    unknown = peerd("logs", "9", where)
    assert unknown.returncode == 1
    assert "no slot 9: there are 0 to 2" in unknown.stderr
    with following(supervised.folder, "logs", "-f", "1", where) as follower:
        tell(running, "of another", slot=0)
        tell(running, "at last", slot=1)
        eventually(lambda: b": at last" in follower.out)
        assert b"of another" not in follower.out


def test_values_with_spaces_are_quoted(supervised: Supervised) -> None:
    running = start(supervised)
    pid = running.peer(0)["pid"]
    os.kill(pid, 9)
    eventually(lambda: running.peer(0)["restarts"] == 1)
    text = peerd("events", f"--control={running.control}").stdout
    (line,) = [line for line in text.splitlines() if " died " in line]
    assert "how='killed by SIGKILL'" in line
    assert "oom=" not in line
