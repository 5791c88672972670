"""Free ports for tests. Each xdist worker has its own range, so no two workers use the same port."""

from __future__ import annotations

import os

from peerd.free_ports import BELOW_EPHEMERAL, FreePorts

MAX_WORKERS = 16
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""The number of this xdist worker; 0 without xdist."""

assert WORKER < MAX_WORKERS, f"pytest -n {MAX_WORKERS} is the most that ports are divided among"
_SIZE = len(BELOW_EPHEMERAL) // MAX_WORKERS
_PORTS = FreePorts(BELOW_EPHEMERAL[WORKER * _SIZE : (WORKER + 1) * _SIZE])


def free_ports(count: int = 1) -> int:
    """The first of ``count`` neighbouring free ports, for UDP and TCP."""
    return _PORTS.take(count)
