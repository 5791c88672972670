"""One real etcd for the whole session; tests keep apart by their key prefix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.ports import free_ports
from peerd.registry.embedded_etcd import EmbeddedEtcd


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[str]:
    """The endpoint of a running etcd."""
    with EmbeddedEtcd(free_ports()) as etcd:
        yield etcd.endpoint
