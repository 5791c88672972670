"""Lists of names in messages."""

from __future__ import annotations

from collections.abc import Sequence

MAX_NAMES = 8


def shortened(names: Sequence[str]) -> str:
    """The first eight names and the number of the rest: ``a, b, and 3 more``."""
    left_out = len(names) - MAX_NAMES
    return ", ".join([*names[:MAX_NAMES], *([f"and {left_out} more"] if left_out > 0 else [])])
