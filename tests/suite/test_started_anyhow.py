"""The tests pass however they are started."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "line",
    [
        "trap '' INT QUIT HUP TERM; \"$@\"",
        'cd /; "$@"',
        'exec "$@" <&-',
        'setsid -w "$@" </dev/null',
        'env -i PATH="$PATH" "$@"',
    ],
    ids=["signals-ignored", "other-folder", "stdin-closed", "no-terminal", "no-environment"],
)
def test_tests_of_signals_and_streams_pass(line: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--rootdir={TESTS.parent}", f"-c{TESTS.parent}/pyproject.toml"]
    command += [f"{TESTS}/clients/test_peer.py::test_ctrl_c_in_the_foreground"]
    command += [f"{TESTS}/cli/test_streams_of_commands.py"]
    # The path of a socket is short, so the folder is not below this test's own.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        command.append(f"--basetemp={folder}/base")
        done = subprocess.run(
            ["bash", "-c", line, "bash", *command], capture_output=True, text=True, cwd=folder
        )
    assert done.returncode == 0, done.stdout + done.stderr
