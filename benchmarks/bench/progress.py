"""The progress of a run on stderr: one changing line on a terminal, otherwise a line per trial."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator


class Progress:
    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._began_s = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._trial = ""

    @contextlib.contextmanager
    def step(self, trial: str, what: str) -> Iterator[None]:
        if self._is_terminal:
            print(f"\r\x1b[K{self._share()} {trial}: {what}", end="", file=sys.stderr, flush=True)
        elif trial != self._trial:
            print(f"{self._share()} {trial}", file=sys.stderr, flush=True)
        self._trial = trial
        yield
        self._done += 1

    def clear(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _share(self) -> str:
        if self._done == 0:
            return "[  0 %]"
        left_s = (time.monotonic() - self._began_s) / self._done * (self._steps - self._done)
        return f"[{self._done / self._steps:4.0%}, {left_s:.0f} s left]"
