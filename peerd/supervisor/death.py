"""How a worker ended, and the death certificate of one that ended without having been asked to."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from os import EX_OK
from typing import NamedTuple

from peerd.signals import HAND_OVER
from peerd.supervisor.output import PeerLog
from peerd.supervisor.processes import Exit
from peerd.supervisor.worker_process import Worker

LAST_LINES = 40
"""Of the worker's output, in its certificate. The stack of a crash in C takes 30 lines."""

_CAUSES = {
    "oom": " (out of memory: the kernel's OOM killer)",
    "stuck": " (by the supervisor, because it was stuck)",
    "late": " (by the supervisor, because it was not ready in time)",
}


class WorkerExit(NamedTuple):
    worker: Worker
    end: Exit
    lost_in_flight: int  # Datagrams that it had read and not answered

    @property
    def is_hand_over(self) -> bool:
        """It was asked to leave its socket to a successor, and did so without a loss."""
        is_clean = self.end.code == EX_OK or self.end.signal == HAND_OVER
        return self.worker.is_handing_over and is_clean and not self.lost_in_flight

    @property
    def is_unclean_stop(self) -> bool:
        """It was asked to stop, and failed at that or lost datagrams."""
        failed = self.end.code != EX_OK and self.worker.killed_for != "stop"
        return (failed and self.worker.is_ready) or self.lost_in_flight > 0


class Death(NamedTuple):
    """The certificate."""

    pid: int
    generation: int
    at_s: float
    how: str  # The exit code, or the signal by name
    cause: str
    """``exit``, ``signal``, ``oom``; or why the supervisor killed it: ``stuck``, ``late``, ``stop``."""

    ready_for_s: float | None  # None: it was never ready
    lost_in_flight: int
    next: str
    last_lines: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return f"{self.what_happened}; next: {self.next}"

    @property
    def what_happened(self) -> str:
        return f"worker pid {self.pid}: {self.summary}; datagrams in hand and lost: {self.lost_in_flight}"

    @property
    def summary(self) -> str:
        """Such as ``killed by SIGSEGV after 3.0 s of service``."""
        age = (
            "before it was ready"
            if self.ready_for_s is None
            else f"after {self.ready_for_s:.1f} s of service"
        )
        return f"{self.how}{_CAUSES.get(self.cause, '')} {age}"


def certify(
    exit_: WorkerExit, then: str, log: PeerLog, claim_oom_kill: Callable[[], bool]
) -> Death:
    """``then``: what comes next. ``claim_oom_kill``: whether an OOM kill can explain a SIGKILL just now."""
    worker, end, lost = exit_
    cause = worker.killed_for or ("exit" if end.signal is None else "signal")
    if worker.killed_for is None and end.signal == signal.SIGKILL and claim_oom_kill():
        cause = "oom"
    ready_for_s = worker.ready_for_s
    return Death(
        pid=worker.pid,
        generation=worker.generation,
        at_s=time.monotonic(),
        how=str(end),
        cause=cause,
        ready_for_s=None if ready_for_s is None else round(ready_for_s, 3),
        lost_in_flight=lost,
        next=then,
        last_lines=tuple(log.last_of(worker.generation, LAST_LINES)),
    )
