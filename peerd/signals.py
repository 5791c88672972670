"""Signals from a supervisor to its workers. Real-time signals, because apps use SIGUSR1 and SIGUSR2."""

from __future__ import annotations

import signal

HAND_OVER: int = signal.SIGRTMIN
"""Stop reading, answer what was read, and exit: a successor continues to read."""

DUMP_STACK: int = signal.SIGRTMIN + 1
"""Write the Python stack to standard error, even from within a handler that never returns."""
