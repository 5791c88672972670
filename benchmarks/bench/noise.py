"""How much of the machine other processes use during a measurement."""

from __future__ import annotations

import os
import time

import psutil

QUIET = 0.1  # The share of all CPUs that others may use before a measurement counts as disturbed
WATCH_S = 0.3


class Watch:
    """Counts from its creation. A rough figure, because the kernel samples at its clock ticks."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._busy_s = _busy_cpu_seconds()

    def others(self, ours_s: float) -> float:
        """The share of all CPUs that was used in addition to our own ``ours_s`` of CPU time."""
        elapsed_s = time.monotonic() - self._began_s
        others_s = _busy_cpu_seconds() - self._busy_s - ours_s
        return max(0.0, others_s) / elapsed_s / (os.cpu_count() or 1)


class Patience:
    """The time that a run may spend on waiting for a quiet machine and on measuring again."""

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds

    @property
    def is_left(self) -> bool:
        return self._left_s > 0

    def spend(self, seconds: float) -> None:
        self._left_s -= seconds

    def wait_for_quiet(self) -> None:
        """Return when the machine is quiet, or when no patience is left."""
        while self.is_left:
            watch = Watch()
            time.sleep(WATCH_S)
            self.spend(WATCH_S)
            if watch.others(0) <= QUIET:
                return


def _busy_cpu_seconds() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal
