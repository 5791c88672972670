"""Fixtures of all tests, and the guard that each test cleans up after itself."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

from harness.etcd_fixture import shared_etcd
from harness.eventually import eventually
from harness.supervised import Supervised

# Every process that a test starts inherits this variable, orphans included.
RUN_MARK = f"PEERD_TEST_RUN={uuid.uuid4()}"
os.environ["PEERD_TEST_RUN"] = RUN_MARK.partition("=")[2]
# Else setproctitle writes over what /proc shows of a process's environment.
os.environ["SPT_NOENV"] = "1"

# What others do on this machine is no finding.
hypothesis.settings.register_profile("peerd", deadline=None)
hypothesis.settings.load_profile("peerd")

etcd = shared_etcd


@pytest.fixture(autouse=True)
def nothing_left_behind(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fails a test that leaves a process, a thread, a descriptor or a file behind; the process is killed."""
    temporary = tmp_path_factory.mktemp("tmpdir")
    runtime = tmp_path_factory.mktemp("runtime")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    threads, fds, processes = threading.active_count(), _descriptors(), _processes()
    yield
    gc.collect()  # a descriptor that only a dead cycle holds is not a leak
    try:
        eventually(lambda: not (_processes() - processes), within_s=5)
    finally:
        for pid in _processes() - processes:
            _kill(pid)
    eventually(lambda: threading.active_count() <= threads, within_s=5)
    eventually(lambda: not (_descriptors() - fds), within_s=5)
    left = [str(path) for path in (*temporary.iterdir(), *runtime.glob("peerd/*"))]
    assert not left, f"files left behind: {left}"


@pytest.fixture
def supervised(tmp_path: Path, etcd: str) -> Iterator[Supervised]:
    """A way to run ``peerd supervise``; what still runs at the end of the test is killed."""
    runner = Supervised(tmp_path, etcd)
    yield runner
    runner.kill_all()


def _descriptors() -> set[tuple[int, str]]:
    """This process's open files, but for etcd connections of gRPC, which it closes in its own time."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except OSError:
            continue
    return {entry for entry in found if not entry[1].startswith(("anon_inode", "/proc"))}


def _is_ours(pid: int) -> bool:
    return RUN_MARK.encode() in Path(f"/proc/{pid}/environ").read_bytes()


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        pidfd = os.pidfd_open(pid)
        stack.callback(os.close, pidfd)
        # From here on the pid may be another's, but not the pidfd.
        if _is_ours(pid):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _processes() -> set[int]:
    found = set()
    for process in psutil.process_iter():
        try:
            marked = _is_ours(process.pid)
            if marked and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.add(process.pid)
        except (OSError, psutil.Error):
            continue
    return found
