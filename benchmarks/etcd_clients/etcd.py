"""The etcds of the benchmark, and its own access to them.

The benchmark puts records and reads results over etcd's JSON gateway and its metrics, with http.client.
So no client judges another, and this process does not import gRPC.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from bench.children import BenchmarkError
from bench.free_ports import free_ports
from peerd.registry import PeerRecord
from peerd.registry.embedded_etcd import HOW_TO_GET_ETCD, find_etcd

MEMBERS = 3
HEALTHY_TIMEOUT_S = 20.0
_MAX_OPERATIONS = 100
_POLL_INTERVAL_S = 0.02


def record(number: int) -> PeerRecord:
    """A usual record, of about 130 bytes."""
    return PeerRecord(
        url=f"10.0.{number // 250}.{number % 250 + 1}",
        port=5001,
        peer_id=f"peer-{number:05}",
        metadata={"zone": f"zone-{number % 3}"},
    )


class Gateway:
    """One etcd at a port of 127.0.0.1. Each request opens a connection, because etcd may die in between."""

    def __init__(self, port: int) -> None:
        self._port = port

    def put(self, prefix: str, numbers: Iterable[int]) -> None:
        """Put records below the prefix, a hundred per revision."""
        puts = [
            {
                "requestPut": {
                    "key": _base64(f"{prefix}/{record(number).peer_id}".encode()),
                    "value": _base64(record(number).to_json()),
                }
            }
            for number in numbers
        ]
        for start in range(0, len(puts), _MAX_OPERATIONS):
            self._ask("/v3/kv/txn", success=puts[start : start + _MAX_OPERATIONS])

    def lease_ids(self) -> set[str]:
        return {lease["ID"] for lease in self._ask("/v3/lease/leases").get("leases", ())}

    def status(self) -> tuple[str, str]:
        """The ids of this member and of its leader, which is "0" for none."""
        answer = self._ask("/v3/maintenance/status")
        return answer["header"]["member_id"], answer.get("leader", "0")

    def make_leader(self, member_id: str) -> None:
        """Only the leader accepts this."""
        self._ask("/v3/maintenance/transfer-leadership", targetID=member_id)

    def calls(self, method: str) -> int:
        """How many calls of a gRPC method it has started to serve since its start; a stream is one call."""
        pattern = rf'^grpc_server_started_total{{grpc_method="{method}",.*}} (\S+)$'
        counts = re.findall(pattern, self._request("GET", "/metrics", b"").decode(), re.MULTILINE)
        return sum(int(float(count)) for count in counts)

    def _ask(self, path: str, **request: object) -> dict[str, Any]:
        answer: dict[str, Any] = orjson.loads(self._request("POST", path, orjson.dumps(request)))
        return answer

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5.0)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise BenchmarkError(f"etcd at port {self._port}, {path}: {error}") from None
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise BenchmarkError(f"etcd at port {self._port}, {path}: {answer.decode()}")
        return answer


class Member:
    """A member of a cluster. A killed one can be started again, a stopped one continued."""

    def __init__(self, binary: Path, name: str, folder: Path, port: int, peer_port: int) -> None:
        self.port = port
        self.gateway = Gateway(port)
        self.peer_url = f"http://127.0.0.1:{peer_port}"
        self.name = name
        self._binary = binary
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, cluster: str) -> None:
        client_url = f"http://127.0.0.1:{self.port}"
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._binary,
                    f"--name={self.name}",
                    f"--data-dir={self._folder / self.name}",
                    f"--listen-client-urls={client_url}",
                    f"--advertise-client-urls={client_url}",
                    f"--listen-peer-urls={self.peer_url}",
                    f"--initial-advertise-peer-urls={self.peer_url}",
                    f"--initial-cluster={cluster}",
                    "--unsafe-no-fsync",
                    "--logger=zap",
                    "--log-level=error",
                    "--log-outputs=stderr",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # out of reach of Ctrl-C in the terminal
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Its connections stay open, and it does not answer."""
        self._send(signal.SIGSTOP)

    def continue_(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class Cluster:
    """Three members on loopback with etcd's default timing: an election takes one to two seconds."""

    def __init__(self, binary: Path, folder: Path) -> None:
        ports = free_ports(2 * MEMBERS, socket.SOCK_STREAM)
        self.members = [
            Member(binary, f"m{number}", folder, ports[number], ports[MEMBERS + number])
            for number in range(MEMBERS)
        ]
        self._initial = ",".join(f"{member.name}={member.peer_url}" for member in self.members)

    @property
    def endpoints(self) -> list[str]:
        return [f"http://127.0.0.1:{member.port}" for member in self.members]

    def start(self, member: Member) -> None:
        member.start(self._initial)

    def wait_until_healthy(self) -> None:
        """Until all members follow the same leader."""
        give_up_s = time.monotonic() + HEALTHY_TIMEOUT_S
        while not self._agrees():
            if time.monotonic() > give_up_s:
                raise BenchmarkError(f"the etcd cluster is not healthy in {HEALTHY_TIMEOUT_S:g} s")
            time.sleep(_POLL_INTERVAL_S)

    def _agrees(self) -> bool:
        try:
            leaders = {member.gateway.status()[1] for member in self.members}
        except BenchmarkError:
            return False
        return len(leaders) == 1 and leaders != {"0"}

    def make_leader(self, member: Member) -> None:
        member_id, leader_id = member.gateway.status()
        if member_id != leader_id:
            (leader,) = (m for m in self.members if m.gateway.status()[0] == leader_id)
            leader.gateway.make_leader(member_id)
            self.wait_until_healthy()

    def other_than(self, member: Member) -> Member:
        return next(other for other in self.members if other is not member)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A healthy cluster, removed without trace after the block."""
    binary = etcd_binary()
    folder = Path(tempfile.mkdtemp(prefix="peerd-benchmark-etcd-"))
    members = Cluster(binary, folder)
    try:
        for member in members.members:
            members.start(member)
        members.wait_until_healthy()
        yield members
    finally:
        for member in members.members:
            member.kill()
        shutil.rmtree(folder)


def etcd_binary() -> Path:
    binary = find_etcd()
    if binary is None:
        raise BenchmarkError(HOW_TO_GET_ETCD)
    return binary


def etcd_version() -> str:
    """etcd --version begins with "etcd Version: 3.5.1"."""
    text = subprocess.run([etcd_binary(), "--version"], stdout=subprocess.PIPE, check=True).stdout
    return text.split(b"\n", 1)[0].rpartition(b" ")[2].decode()


def loopback(endpoint: str) -> str:
    """The same etcd, for clients that would try ::1 first, at which it does not listen."""
    return f"http://127.0.0.1:{port_of(endpoint)}"


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
