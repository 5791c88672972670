"""Ends whatever runs in a folder, the folder included.

    python supervisors_guard.py FOLDER

As a program it waits for the end of its standard input: then it does so for a benchmark that was
killed. A process belongs to the folder if that is its current directory or above it, which children
inherit, orphans keep, and nobody here changes.
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

LOOK_AGAIN_S = 0.01


def main(folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    end_all_in(Path(folder))
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def guarded_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder, and nothing that runs in it outlives the block or this process."""
    folder = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
    command = [sys.executable, "-IS", __file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0):
        yield folder  # Popen's own end closes its standard input and waits for it


def end_all_in(folder: Path) -> None:
    while pids := processes_in(folder):
        for pid in pids:
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                if _runs_in(pid, folder):  # looked at again: by now the pid may be a stranger's
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
        time.sleep(LOOK_AGAIN_S)


def processes_in(folder: Path) -> list[int]:
    """Without those that are dead and not reaped yet."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
    return [pid for pid in pids if _runs_in(pid, folder)]


def _runs_in(pid: int, folder: Path) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")).is_relative_to(folder)
    except OSError:  # somebody else's, or gone
        return False


if __name__ == "__main__":
    main(sys.argv[1])
