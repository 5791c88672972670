"""Free ports for tests, from a range of its own for each xdist worker: no two workers use the same port."""

from __future__ import annotations

import os

from peerd.free_ports import BELOW_EPHEMERAL, FreePorts

_RANGES = 16
_SIZE = len(BELOW_EPHEMERAL) // _RANGES


def _range_of(worker: str) -> range:
    number = int(worker.removeprefix("gw"))
    assert number < _RANGES, f"pytest -n {_RANGES} is the most that ports are divided among"
    return BELOW_EPHEMERAL[number * _SIZE : (number + 1) * _SIZE]


_PORTS = FreePorts(_range_of(os.environ.get("PYTEST_XDIST_WORKER", "gw0")))


def free_ports(count: int = 1) -> int:
    """The first of ``count`` neighbouring free ports, for UDP and TCP."""
    return _PORTS.take(count)
