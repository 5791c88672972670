"""``peerd chaos`` passes, repeats its schedule, and finds disturbances that are not its own."""

import re
import signal
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import orjson
import psutil
import pytest

from harness.command import command, peerd, started
from harness.supervised import send_signal
from peerd import control
from peerd_chaos.schedule import ChaosSettings, Kind, schedule

SEED = 2184  # It does each kind of action more than once within 20 s, and kills 18 times


def chaos(*args: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return started(
        command("chaos", *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("seconds", "options", "kinds"),
    # The shorter run has no time for every kind of action.
    [
        pytest.param(20, [], set(Kind), id="plain", marks=[pytest.mark.slow, pytest.mark.alone]),
        pytest.param(8, ["--coroutines"], {Kind.KILL, Kind.STOP, Kind.RESTART}, id="coroutines"),
    ],
)
def test_a_seed(tmp_path: Path, seconds: int, options: list[str], kinds: set[Kind]) -> None:
    with chaos(
        f"--seed={SEED}", f"--seconds={seconds}", "--json", f"--log-dir={tmp_path}", *options
    ) as run:
        out, err = run.communicate(timeout=100)
    assert run.returncode == 0, err
    report = orjson.loads(out)
    assert (report["holds"], report["seed"]) == (True, SEED)
    assert all(invariant["holds"] for invariant in report["invariants"])
    assert report["done"].keys() >= kinds, err
    assert f"repeat with: peerd chaos --seed {SEED} --seconds {seconds}" in err
    assert (tmp_path / f"seed-{SEED}" / "err").exists()


def test_a_worker_killed_from_outside_is_found(tmp_path: Path) -> None:
    seed, slot, seconds = 70, 2, 4
    # The schedule leaves this slot alone, so nothing else ends its worker.
    assert slot not in {
        a.slot for a in schedule(seed, seconds, ChaosSettings.peers, [Kind.RESTART])
    }
    with chaos(
        f"--seed={seed}", f"--seconds={seconds}", "--actions=restart", f"--log-dir={tmp_path}"
    ) as run:
        assert run.stderr is not None
        said = read_until(run.stderr, "restart slot")
        status = control.request(tmp_path / f"seed-{seed}" / "control.sock", "status")
        worker = status["peers"][slot]["pid"]
        send_signal(worker, signal.SIGKILL)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 1, said + err
    broken = [line for line in out.splitlines() if re.search(r"  NO  ", line)]
    assert len(broken) == 1, out
    assert broken[0].startswith("only killed workers have died")
    assert f"pid {worker} (killed by SIGKILL, cause signal)" in broken[0]
    assert f"peerd chaos: seed {seed}: only killed workers have died" in err
    assert f"the supervisor's log is {tmp_path / f'seed-{seed}' / 'err'}" in err


def test_a_supervisor_that_dies_is_found(tmp_path: Path) -> None:
    with chaos("--seed=1", "--seconds=20", "--actions=restart", f"--log-dir={tmp_path}") as run:
        assert run.stderr is not None
        read_until(run.stderr, "restart slot")
        supervisor_of(run).kill()
        out, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert re.search(r"^the supervisor lives and answers +NO +exit code -9", out, re.MULTILINE), (
        out + err
    )


def test_a_supervisor_that_cannot_start_is_explained(tmp_path: Path) -> None:
    limit = ["sh", "-c", 'ulimit -n 1000; exec "$@"', "sh"]
    with started(
        [*limit, *command("chaos", "--peers=4096", f"--log-dir={tmp_path}")],
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        _, err = run.communicate(timeout=60)
    assert run.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith("peerd: the supervisor has not started: ")
    assert "open files" in last


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--actions=kill,flood", r"unknown actions: flood; .*etcd-kill"),
        ("--log-dir=/proc/x", "--log-dir: cannot make /proc/x/seed-1: No such file or directory"),
    ],
)
def test_an_invalid_option_is_explained(option: str, says: str) -> None:
    done = peerd("chaos", "--seed=1", option)
    assert done.returncode == 2
    assert re.search(says, done.stderr)


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
