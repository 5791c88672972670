"""Kills all processes that run in a folder, and removes it.

    python guard.py FOLDER

The program waits for the end of its standard input, so it cleans up even if the benchmark is killed. A
process runs in the folder if its current directory is in it. Children inherit that, orphans keep it, and
no process of this benchmark changes it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POLL_INTERVAL_S = 0.01


def main(folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    kill_all_in(Path(folder))
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def guarded_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder. No process in it outlives the block or this process."""
    folder = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
    command = [sys.executable, "-IS", __file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0):
        yield folder  # leaving Popen closes its standard input and waits for it


def kill_all_in(folder: Path) -> None:
    while pids := processes_in(folder):
        for pid in pids:
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                if _runs_in(pid, folder):  # checked again, because the pid may have been reused
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
        time.sleep(POLL_INTERVAL_S)


def processes_in(folder: Path) -> list[int]:
    """Zombies are not included."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
    return [pid for pid in pids if _runs_in(pid, folder)]


def _runs_in(pid: int, folder: Path) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")).is_relative_to(folder)
    except OSError:  # of another user, or gone
        return False


if __name__ == "__main__":
    main(sys.argv[1])
