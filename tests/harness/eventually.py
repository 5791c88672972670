"""Waiting for a fact instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.01


def eventually(check: Callable[[], T | None], within_s: float = 60.0) -> T:
    """Return the first true result of ``check``. Raises its last failure when the time is over."""
    give_up_s = time.monotonic() + within_s
    while True:
        try:
            value = check()
            if value:
                return value
            raise AssertionError(f"still {value!r} after {within_s:g} s")
        except Exception:
            if time.monotonic() >= give_up_s:
                raise
        time.sleep(_POLL_S)
