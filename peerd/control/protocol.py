"""The control protocol: what client and server must agree on.

A Unix stream socket. A request is one line of JSON, ``{"v": 1, "command": "status"}``, with an object
under ``"arguments"`` where the command takes some. The answer is one line as well:
``{"v": 1, "ok": true, "result": ...}`` or ``{"v": 1, "ok": false, "error": "..."}``. A command that
takes time (a reload) is answered when it is done. Requests on one connection are answered in order.
"""

from __future__ import annotations

import os
from pathlib import Path

VERSION = 1

LONG_COMMANDS = ("reload", "restart", "scale", "stop")
"""Commands that change something. The supervisor completes them even if the client stops waiting."""


def directory() -> Path:
    """Where sockets are by default: the user's run-time directory, or one that only the user can enter."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime, "peerd")
    if os.getuid() == 0:
        return Path("/run/peerd")
    return Path(f"/tmp/peerd-{os.getuid()}")


def default_path(base_port: int) -> Path:
    """The socket of the supervisor whose first peer has this port."""
    return directory() / f"{base_port}.sock"
