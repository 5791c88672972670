"""``peerd chaos``: it passes, it repeats itself, and it finds what it has not done itself."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import orjson
import psutil
import pytest

from supervised import send_signal

SEED = 5


def chaos(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "peerd", "chaos", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("seconds", "options"), [(20, []), (8, ["--coroutines"])], ids=["plain", "coroutines"]
)
def test_a_seed(tmp_path: Path, seconds: int, options: list[str]) -> None:
    run = chaos(
        f"--seed={SEED}", f"--seconds={seconds}", "--json", f"--log-dir={tmp_path}", *options
    )
    out, err = run.communicate(timeout=100)
    assert run.returncode == 0, err
    report = orjson.loads(out)
    assert (report["holds"], report["seed"]) == (True, SEED)
    assert all(invariant["holds"] for invariant in report["invariants"])
    assert {"kill", "stop", "restart"} <= report["done"].keys()
    assert f"again: peerd chaos --seed {SEED} --seconds {seconds}" in err
    assert (tmp_path / f"seed-{SEED}" / "err").exists()


def test_who_dies_of_somebody_elses_hand_is_found(tmp_path: Path) -> None:
    run = chaos("--seed=1", "--seconds=4", "--actions=restart", f"--log-dir={tmp_path}")
    assert run.stderr is not None
    said = read_until(run.stderr, "restart slot")
    worker = next(child for child in supervisor_of(run).children() if is_worker(child))
    send_signal(worker.pid, signal.SIGKILL)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1, said + err
    broken = [line for line in out.splitlines() if re.search(r"  NO  ", line)]
    assert len(broken) == 1
    assert broken[0].startswith("only who was harmed has died")
    assert f"pid {worker.pid} (killed by SIGKILL)" in broken[0]
    assert "peerd chaos: seed 1: only who was harmed has died" in err
    assert f"the supervisor's log is {tmp_path / 'seed-1' / 'err'}" in err


def test_a_supervisor_that_dies_is_found(tmp_path: Path) -> None:
    run = chaos("--seed=1", "--seconds=20", "--actions=restart", f"--log-dir={tmp_path}")
    assert run.stderr is not None
    read_until(run.stderr, "restart slot")
    supervisor_of(run).kill()
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert re.search(r"^the supervisor lives and answers +NO +exit code -9", out, re.MULTILINE), (
        out + err
    )


def test_actions_are_checked() -> None:
    run = chaos("--actions=kill,flood")
    _, err = run.communicate(timeout=20)
    assert run.returncode == 2
    assert "flood" in err
    assert "etcd-kill" in err


def read_until(stream: IO[str], text: str) -> str:
    said = ""
    while text not in said:
        line = stream.readline()
        assert line, said
        said += line
    return said


def supervisor_of(run: subprocess.Popen[str]) -> psutil.Process:
    return next(
        child
        for child in psutil.Process(run.pid).children()
        if "peerd: supervisor" in " ".join(child.cmdline())
    )


def is_worker(process: psutil.Process) -> bool:
    return "peerd: peer" in " ".join(process.cmdline())
