"""Standard output that is closed, or whose reader ends early."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from harness.command import command
from harness.supervised import Supervised


def shell(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)


def without_reader(*args: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose standard output is a pipe without a reader, as after ``| head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            command(*args), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("args", [["--help"], ["supervise", "--help"], ["systemd-unit"]])
def test_a_closed_pipe_exits_with_141(args: list[str]) -> None:
    done = without_reader(*args)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_report_into_a_closed_pipe(supervised: Supervised) -> None:
    running = supervised.start(peers=2).wait_registered()
    status = ["status", f"--control={running.control}"]
    for args in (
        ["nodes", f"--etcd={running.etcd}", f"--prefix={running.prefix}"],
        *([*status, *more] for more in ([], ["--json"], ["-o", "slot,state"], ["--watch"])),
    ):
        done = without_reader(*args)
        assert (done.returncode, done.stderr) == (141, ""), args


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    absent = shlex.join(command("status", f"--control={tmp_path / 'none.sock'}"))
    done = shell(f"{absent} {closed}; echo $?")
    assert done.stdout == "3\n"
    assert "Traceback" not in done.stderr
    help_text = shell(f"{shlex.join(command('--help'))} {closed}; echo $?")
    assert help_text.stdout.splitlines()[-1] == "0"
    assert help_text.stderr == ""


def test_a_supervisor_with_closed_streams(supervised: Supervised) -> None:
    running = supervised.start(peers=1).wait_ready()
    done = shell(f"{shlex.join(command('status', f'--control={running.control}'))} >&-; echo $?")
    assert (done.stdout, done.stderr) == ("0\n", "")
