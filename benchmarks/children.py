"""The benchmark's child processes: started, listened to, stopped, and what CPU time they have used."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence

ANSWER_LIMIT_S = 15.0


class BenchmarkError(Exception):
    """The benchmark cannot go on; the text is for the user."""


@contextlib.contextmanager
def running(
    command: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    cpu: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that has ended when the block is left, in whichever way.

    ``cpu``: the only one that it and its children may use; None: the caller's.
    """
    with subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        pass_fds=pass_fds,
        # Ctrl-C at the terminal is for this process only; it ends its children itself.
        process_group=0,
    ) as child:
        try:
            if cpu is not None:
                os.sched_setaffinity(child.pid, {cpu})
            yield child
        finally:
            child.kill()


def answer(name: str, child: subprocess.Popen[bytes], limit_s: float = ANSWER_LIMIT_S) -> bytes:
    """The child's next line."""
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], limit_s)[0]:
        raise BenchmarkError(f"{name} did not answer in {limit_s:.0f} s")
    line = child.stdout.readline()
    if not line:
        raise BenchmarkError(f"{name} ended without an answer (its error is above)")
    return line


def end_stdin(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.close()


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of processes so far, of all their threads, to the nanosecond."""
    # The clock of another process: clock_getcpuclockid(3) as in linux/posix-timers_types.h, where
    # the low bits are CPUCLOCK_SCHED.
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)
