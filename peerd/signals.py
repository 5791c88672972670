"""What a supervisor tells its workers by signal. Real-time ones, since apps use SIGUSR1 and SIGUSR2."""

from __future__ import annotations

import signal

HAND_OVER: int = signal.SIGRTMIN
"""Answer what was read, read no more, and exit: a successor reads on."""

DUMP_STACK: int = signal.SIGRTMIN + 1
"""Write the Python stack to standard error, even from within a handler that never returns."""
