"""``make run``, from the terminal's point of view."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from harness.command import started
from harness.ports import free_ports

ROOT = Path(__file__).parents[2]


def test_ctrl_c_ends_make_run_without_an_error(tmp_path: Path) -> None:
    venv = Path(sys.prefix)
    args = f"--peers 1 --base-port {free_ports()} --etcd http://127.0.0.1:9"
    command = [
        "make",
        "--no-print-directory",
        "-o",
        f"{venv}/.run",
        "run",
        f"VENV={venv}",
        f"ARGS={args}",
    ]
    with (
        (tmp_path / "err").open("w") as err,
        started(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=err, process_group=0, text=True
        ) as make,
    ):
        assert make.stdout is not None
        assert make.stdout.readline().startswith("peerd ")
        os.killpg(make.pid, signal.SIGINT)
        make.stdout.read()
        make.wait()
    assert "***" not in (tmp_path / "err").read_text()


def test_progress_is_a_line_for_each_step() -> None:
    output = (
        "  Installing build dependencies: started\n"
        "  Installing build dependencies: finished with status 'done'\n"
        "  Getting requirements to build editable: started\n"
        "Collecting click>=8.1 (from peerd==0.1.0)\n"
        "  Downloading click-8.4.1-py3-none-any.whl (1 kB)\n"
        "  Building editable for peerd (pyproject.toml): started\n"
        "Installing collected packages: click, peerd\n"
    )
    script = ROOT / "tools" / "pip_progress.sed"
    done = subprocess.run(["sed", "-nuf", script], input=output, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "  fetching the build tools",
        "  translating ext/ to C",
        "  fetching click>=8.1",
        "  compiling",
        "  installing",
    ]
