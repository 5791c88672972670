"""The death certificate of a worker that ended without having been asked to: who, how, why, what was lost."""

from __future__ import annotations

from typing import NamedTuple

LAST_LINES = 40
"""Of the worker's output, in its certificate. The stack of a crash in C takes 30 lines."""

_CAUSES = {
    "oom": " (out of memory: the kernel's OOM killer)",
    "stuck": " (by the supervisor, because it was stuck)",
    "late": " (by the supervisor, because it was late)",
}


class Death(NamedTuple):
    pid: int
    generation: int
    at_s: float
    how: str
    """The exit code, or the signal by name."""

    cause: str
    """``exit``, ``signal``, ``oom``; or why the supervisor killed it: ``stuck``, ``late``, ``stop``."""

    ready_for_s: float | None
    """None: it was never ready."""

    lost_in_flight: int
    """Datagrams that it had read and not answered."""

    next: str
    last_lines: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return f"{self.what_happened}; next: {self.next}"

    @property
    def what_happened(self) -> str:
        age = (
            "before it was ready"
            if self.ready_for_s is None
            else f"after {self.ready_for_s:.1f} s of service"
        )
        return (
            f"worker pid {self.pid}: {self.how}{_CAUSES.get(self.cause, '')} {age}; datagrams in hand and "
            f"lost: {self.lost_in_flight}"
        )
