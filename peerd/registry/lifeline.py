"""The pipe that ends when the supervisor dies, and what the registrar does then.

The workers die of their death signal, but the processes that they started do not inherit it. Each worker
leads a process group, whose number is not reused while the group has a member (setpgid(2), credentials(7)),
so the registrar can kill what is left of it by that number. A process that has created a session or a group
of its own was meant to survive.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable

from peerd._scoreboard import Scoreboard

log = logging.getLogger(__name__)

ORPHAN_TIMEOUT_S = 0.8
"""How long the registrar survives the supervisor if etcd does not answer. The leases then expire."""


class Lifeline:
    """Read by a thread, so that no call to etcd delays the notice."""

    def __init__(self, fd: int, board: Scoreboard, at_end: Callable[[], None]) -> None:
        self._fd = fd
        self._board = board
        self._at_end = at_end
        self._changed = threading.Event()
        self.has_ended = False
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def wait(self, timeout_s: float) -> None:
        """Until the supervisor writes to the pipe or dies."""
        self._changed.wait(timeout_s)
        self._changed.clear()

    def _watch(self) -> None:
        while os.read(self._fd, 4096):
            self._changed.set()
        self.has_ended = True
        self._changed.set()
        _end_process_groups(self._board)
        if any(slot.lease_id for slot in self._board.slots):
            time.sleep(ORPHAN_TIMEOUT_S)  # the main thread revokes the records, and exits
            log.warning("etcd does not answer: leaving the records to their leases")
        # Without a lease to revoke, the main thread may still be importing gRPC.
        self._at_end()
        os._exit(0)


def _end_process_groups(board: Scoreboard) -> None:
    """After an orderly stop there are none."""
    for slot in board.slots:
        for pid in (slot.pid, slot.successor_pid):
            if pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
