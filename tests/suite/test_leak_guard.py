"""The guard that fails a test which leaves something behind, in a pytest of its own with two workers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

LEAKY = """
import os, subprocess, sys, tempfile, threading
import pytest

KEPT = []

def test_child():
    KEPT.append(subprocess.Popen(["sleep", "1000"]))

def test_orphan_of_a_new_session():
    code = "import os, subprocess; subprocess.Popen(['sleep', '1001'], start_new_session=True)"
    subprocess.run([sys.executable, "-c", code], check=True)

def test_thread():
    KEPT.append(event := threading.Event())
    threading.Thread(target=event.wait, name="lasting", daemon=True).start()

def test_descriptor():
    KEPT.append(os.open("/etc/passwd", os.O_RDONLY))

def test_temporary_file():
    KEPT.append(tempfile.mkdtemp(prefix="forgotten"))

def test_control_socket():
    path = os.path.join(os.environ["XDG_RUNTIME_DIR"], "peerd")
    os.makedirs(path, exist_ok=True)
    open(os.path.join(path, "5001.sock"), "w").close()

@pytest.fixture(scope="module")
def lasting():
    with subprocess.Popen(["sleep", "1002"]) as process:
        yield
        process.kill()

@pytest.mark.parametrize("number", range(8))
def test_without_leak(number, lasting):
    with open("/etc/passwd"), tempfile.TemporaryFile():
        subprocess.run(["true"], check=True)

class Cycle:
    def __init__(self):
        self.file, self.itself = os.fdopen(os.dup(0)), self

    def __del__(self):
        self.file.close()

def test_garbage():
    Cycle()

def test_with_a_failure_of_its_own():
    KEPT.append(subprocess.Popen(["sleep", "1003"]))
    assert not KEPT
"""

FOUND = {
    "test_child": r"process \d+ sleep 1000",
    "test_orphan_of_a_new_session": r"process \d+ sleep 1001",
    "test_thread": r"thread \d+ lasting",
    "test_descriptor": r"descriptor \d+ /etc/passwd",
    "test_temporary_file": r"file /.*/forgotten\w*",
    "test_control_socket": r"file /.*/peerd/5001\.sock",
}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_each_leak_fails_its_own_test_and_no_other(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "test_leaky.py"
    path.write_text(LEAKY)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "conftest", "-q"]
    command += ["-c", str(TESTS.parent / "pyproject.toml"), f"--rootdir={tmp_path}", "-n", workers]
    command += [f"--basetemp={tmp_path / 'base'}", "-oleak_patience_s=0.3", str(path)]
    environment = {**os.environ, "COLUMNS": "500"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    found = dict(re.findall(r"^ERROR .*::(\w+) - Failed: left behind: (.*)$", done.stdout, re.M))
    assert found.keys() == FOUND.keys(), done.stdout + done.stderr
    for test, left in found.items():
        assert re.fullmatch(FOUND[test], left.strip()), left
    assert "1 failed, 15 passed, 6 errors" in done.stdout
