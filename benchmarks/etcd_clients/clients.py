"""The etcd clients behind one interface, each used as its documentation does.

Each runs in its own process, which imports no other client. They can be installed side by side (the
extra ``bench``).
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from etcd_clients.etcd import port_of, record
from peerd.registry import PeerRecord, Registry

TIMEOUT_S = 5.0
"""Of a call, given to clients that accept several endpoints; peerd's default. The others have no timeout
by default, and would wait for a stopped member without end."""


class Client(Protocol):
    """Prefixes are given without the trailing slash."""

    def listing(self, prefix: str) -> int:
        """Read all records below the prefix; returns how many there are."""

    def watch(self, prefix: str) -> Iterator[str]:
        """Start a watch; yields the peer id of each record that is put."""

    def hold(self, prefix: str, count: int, ttl_s: int) -> None:
        """Put ``count`` records, each under its own lease."""

    def refresh(self) -> int | None:
        """Refresh all leases; returns how many were gone. None: the client keeps them by itself."""


class Peerd:
    def __init__(self, endpoints: list[str]) -> None:
        self._endpoint = ",".join(endpoints)
        self._registries: dict[str, Registry] = {}
        self._registrations: list[object] = []

    def _registry(self, prefix: str) -> Registry:
        """A Registry has one prefix."""
        if prefix not in self._registries:
            self._registries[prefix] = Registry(self._endpoint, prefix)
        return self._registries[prefix]

    def listing(self, prefix: str) -> int:
        return len(self._registry(prefix).nodes())

    def watch(self, prefix: str) -> Iterator[str]:
        return (event.record.peer_id for event in self._registry(prefix).watch())

    def hold(self, prefix: str, count: int, ttl_s: int) -> None:
        registry = Registry(self._endpoint, prefix, lease_ttl_s=ttl_s)
        self._registrations = [registry.register(record(number)) for number in range(count)]

    def refresh(self) -> int | None:
        return None


class PeerdCache(Peerd):
    """Lists the local copy that a watch maintains."""

    def __init__(self, endpoints: list[str]) -> None:
        super().__init__(endpoints)
        self._caches: dict[str, Callable[[], list[PeerRecord]]] = {}

    def listing(self, prefix: str) -> int:
        if prefix not in self._caches:
            cache = self._registry(prefix).cache()
            if not cache.wait_current(TIMEOUT_S):
                raise TimeoutError("the cache is not current")
            self._caches[prefix] = cache.nodes
        return len(self._caches[prefix]())


class BareStub:
    """The reference for a listing: one call of etcd3's stub, its answer decoded by protobuf."""

    def __init__(self, endpoints: list[str]) -> None:
        import grpc

        etcd3 = _import_etcd3()
        channel = grpc.insecure_channel(f"127.0.0.1:{port_of(endpoints[0])}")
        self._range = etcd3.etcdrpc.KVStub(channel).Range
        self._request = etcd3.etcdrpc.RangeRequest

    def listing(self, prefix: str) -> int:
        answer = self._range(self._request(key=f"{prefix}/".encode(), range_end=_end_of(prefix)))
        return len(self.decoded(answer))

    def decoded(self, answer: Any) -> list[object]:
        return [item.value for item in answer.kvs]


class BareStubAndJson(BareStub):
    """The same, plus parsing the JSON of each value."""

    def decoded(self, answer: Any) -> list[object]:
        import orjson

        return [orjson.loads(item.value) for item in answer.kvs]


class Etcd3:
    """Also etcd-sdk-python, a fork of etcd3, and etcd3gw, whose interface is nearly the same."""

    def __init__(self, endpoints: list[str]) -> None:
        self._client = self._connect([port_of(endpoint) for endpoint in endpoints])
        self._leases: list[Any] = []

    def _connect(self, ports: list[int]) -> Any:
        return _import_etcd3().client("127.0.0.1", ports[0])

    def listing(self, prefix: str) -> int:
        return len(list(self._client.get_prefix(f"{prefix}/")))

    def watch(self, prefix: str) -> Iterator[str]:
        events, _ = self._client.watch_prefix(f"{prefix}/")
        return (_peer_id(self._key_of(event)) for event in events)

    def _key_of(self, event: Any) -> Any:
        return event.key

    def hold(self, prefix: str, count: int, ttl_s: int) -> None:
        for number in range(count):
            lease = self._client.lease(ttl_s)
            self._client.put(_key(prefix, number), record(number).to_json(), lease=lease)
            self._leases.append(lease)

    def refresh(self) -> int | None:
        return sum(self._refresh(lease) <= 0 for lease in self._leases)

    def _refresh(self, lease: Any) -> int:
        """The TTL that etcd has returned."""
        ttl: int = min(answer.TTL for answer in lease.refresh())
        return ttl


class EtcdSdk(Etcd3):
    def _connect(self, ports: list[int]) -> Any:
        pyetcd = importlib.import_module("pyetcd")
        if len(ports) == 1:
            return pyetcd.client("127.0.0.1", ports[0])
        each = [pyetcd.Endpoint("127.0.0.1", port, secure=False) for port in ports]
        return pyetcd.MultiEndpointEtcd3Client(each, timeout=TIMEOUT_S, failover=True)


class Etcd3gw(Etcd3):
    def _connect(self, ports: list[int]) -> Any:
        return importlib.import_module("etcd3gw").client("127.0.0.1", ports[0])

    def _key_of(self, event: Any) -> Any:
        return event["kv"]["key"]

    def _refresh(self, lease: Any) -> int:
        ttl: int = lease.refresh()
        return ttl


class Aetcd:
    def __init__(self, endpoints: list[str]) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._run(self._connected(port_of(endpoints[0])))
        self._leases: list[Any] = []

    @staticmethod
    async def _connected(port: int) -> Any:
        client = importlib.import_module("aetcd").Client("127.0.0.1", port)
        await client.connect()
        return client

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    def listing(self, prefix: str) -> int:
        return len(list(self._run(self._client.get_prefix(f"{prefix}/".encode()))))

    def watch(self, prefix: str) -> Iterator[str]:
        watch = self._run(self._client.watch_prefix(f"{prefix}/".encode()))
        return self._peer_ids(aiter(watch))

    def _peer_ids(self, events: AsyncIterator[Any]) -> Iterator[str]:
        async def next_one() -> Any:
            return await anext(events, None)

        while (event := self._run(next_one())) is not None:
            yield _peer_id(event.kv.key)

    def hold(self, prefix: str, count: int, ttl_s: int) -> None:
        async def hold() -> None:
            for number in range(count):
                lease = await self._client.lease(ttl_s)
                key, value = _key(prefix, number), record(number).to_json()
                await self._client.put(key, value, lease=lease)
                self._leases.append(lease)

        self._run(hold())

    def refresh(self) -> int | None:
        async def refresh() -> int:
            return sum([(await lease.refresh()).TTL <= 0 for lease in self._leases])

        gone: int = self._run(refresh())
        return gone


@dataclass(frozen=True)
class ClientSpec:
    title: str
    make: Callable[[list[str]], Any]
    package: str | None = None  # The name on PyPI; None: part of peerd
    module: str | None = None
    several_endpoints: bool = False

    @property
    def installed(self) -> bool:
        return self.module is None or importlib.util.find_spec(self.module) is not None


CLIENTS = {
    "peerd": ClientSpec("peerd", Peerd, several_endpoints=True),
    "etcd3": ClientSpec("etcd3", Etcd3, "etcd3", "etcd3"),
    "etcd-sdk-python": ClientSpec(
        "etcd-sdk-python", EtcdSdk, "etcd-sdk-python", "pyetcd", several_endpoints=True
    ),
    "aetcd": ClientSpec("aetcd", Aetcd, "aetcd", "aetcd"),
    "etcd3gw": ClientSpec("etcd3gw", Etcd3gw, "etcd3gw", "etcd3gw"),
}

BARE = "bare-stub"
BARE_AND_JSON = "bare-stub-json"
CACHE = "peerd-cache"

LISTING_CLIENTS = {
    CACHE: ClientSpec("peerd, cache.nodes()", PeerdCache),
    BARE: ClientSpec("bare stub call", BareStub),
    BARE_AND_JSON: ClientSpec("bare stub call, JSON parsed", BareStubAndJson),
}
"""Additional rows of the listing: peerd's cache, and the lower bound of a listing."""


def _import_etcd3() -> Any:
    """etcd3 0.12.0 cannot be imported directly with protobuf 4 and newer."""
    from peerd.registry.etcd3_import import import_etcd3

    return import_etcd3()


def _key(prefix: str, number: int) -> bytes:
    return f"{prefix}/{record(number).peer_id}".encode()


def _end_of(prefix: str) -> bytes:
    """The first key after all that start with ``prefix/``: "0" follows "/"."""
    return f"{prefix}0".encode()


def _peer_id(key: bytes) -> str:
    return key.decode().rpartition("/")[2]
