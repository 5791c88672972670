"""Child processes of a benchmark: started, listened to, ended, and how much CPU and memory they use."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

ANSWER_TIMEOUT_S = 15.0
BENCHMARKS = Path(__file__).parents[1]


class BenchmarkError(Exception):
    """The benchmark cannot continue; the text is for the user."""


@contextlib.contextmanager
def running(
    command: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    output: IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
    cpu: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is killed when the block ends.

    ``output``: a log for all that it prints; None: its standard output is a pipe. ``cpu``: the only CPU
    for it and its children; None: those of the caller. A Python child can import the packages of this
    folder.
    """
    with subprocess.Popen(
        command,
        stdin=stdin,
        stdout=output or subprocess.PIPE,
        stderr=output,
        pass_fds=pass_fds,
        # Ctrl-C in the terminal reaches this process only, which ends its children.
        process_group=0,
        env={**os.environ, "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent / 'tests'}"},
    ) as child:
        try:
            if cpu is not None:
                os.sched_setaffinity(child.pid, {cpu})
            yield child
        finally:
            child.kill()


def answer(name: str, child: subprocess.Popen[bytes], within_s: float = ANSWER_TIMEOUT_S) -> bytes:
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], within_s)[0]:
        raise BenchmarkError(f"{name} did not answer in {within_s:.0f} s")
    line = child.stdout.readline()
    if not line:
        raise BenchmarkError(f"{name} exited without an answer (its error is above)")
    return line


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of all threads of the processes so far, to the nanosecond."""
    # The CPU clock of another process: clock_getcpuclockid(3) as in linux/posix-timers_types.h, where
    # the low bits are CPUCLOCK_SCHED.
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def resident_bytes(pid: int) -> int:
    """From smaps_rollup, which walks the page tables: VmRSS may be off by dozens of pages."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no Rss in /proc/{pid}/smaps_rollup")
