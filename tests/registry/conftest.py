"""A prefix of its own for each test, within the etcd that all of them share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from harness.store import Store
from peerd.registry import Registry


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid.uuid4()}"


@pytest.fixture
def registry(etcd: str, prefix: str) -> Iterator[Registry]:
    with Registry(etcd, prefix) as registry:
        yield registry


@pytest.fixture
def store(etcd: str, prefix: str) -> Iterator[Store]:
    store = Store(etcd, prefix)
    yield store
    store.etcd.close()
