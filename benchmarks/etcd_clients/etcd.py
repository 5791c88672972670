"""The etcds of the benchmark, and its own access to them.

The benchmark puts records and reads results over etcd's JSON gateway and its metrics, with http.client.
So no client judges another, and this process does not import gRPC.
"""

from __future__ import annotations

import base64
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from bench.children import BenchmarkError
from harness.etcd_gateway import Gateway
from peerd.address import Address
from peerd.registry import PeerRecord
from peerd.registry.embedded_etcd import HOW_TO_GET_ETCD, find_etcd

_MAX_OPERATIONS = 100


def record(number: int) -> PeerRecord:
    """A usual record, of about 130 bytes."""
    return PeerRecord(
        url=f"10.0.{number // 250}.{number % 250 + 1}",
        port=5001,
        peer_id=f"peer-{number:05}",
        metadata={"zone": f"zone-{number % 3}"},
    )


class RecordGateway(Gateway):
    """One etcd over HTTP. Raises OSError if it does not answer."""

    @classmethod
    def of(cls, endpoint: str) -> RecordGateway:
        return cls(Address("127.0.0.1", port_of(endpoint)))

    def put_records(self, prefix: str, numbers: Iterable[int]) -> None:
        """Put records below the prefix, a hundred per revision."""
        puts = []
        for each in map(record, numbers):
            key = _base64(f"{prefix}/{each.peer_id}".encode())
            puts.append({"requestPut": {"key": key, "value": _base64(each.to_json())}})
        for start in range(0, len(puts), _MAX_OPERATIONS):
            self._post("kv/txn", success=puts[start : start + _MAX_OPERATIONS])

    def lease_ids(self) -> set[str]:
        return {lease["ID"] for lease in self._post("lease/leases").get("leases", ())}

    def calls(self, method: str) -> int:
        """How many calls of a gRPC method it has started to serve since its start; a stream is one call."""
        pattern = rf'^grpc_server_started_total{{grpc_method="{method}",.*}} (\S+)$'
        return sum(int(float(count)) for count in re.findall(pattern, self.metrics(), re.MULTILINE))


def etcd_binary() -> Path:
    binary = find_etcd()
    if binary is None:
        raise BenchmarkError(HOW_TO_GET_ETCD)
    return binary


def etcd_version() -> str:
    """etcd --version begins with "etcd Version: 3.5.1"."""
    text = subprocess.check_output([etcd_binary(), "--version"], text=True)
    return text.split("\n", 1)[0].rpartition(" ")[2]


def loopback(endpoint: str) -> str:
    """The same etcd, for clients that would try ::1 first, at which it does not listen."""
    return f"http://127.0.0.1:{port_of(endpoint)}"


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
