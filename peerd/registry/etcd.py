"""The one door to etcd: its operations in our own types, its failures as our own errors.

Nobody else sees gRPC or etcd3. The calls go through etcd3's client and its stubs, not through its
methods: those have no deadline for streams, hide the lease of a key, and lose the cause of an error.

Every call has a deadline, and none waits for a connection: with nobody listening it fails at once.
An Etcd is to be used in the process that made it; gRPC's threads do not survive a fork, and a call
on an inherited channel hangs (``Session`` refuses it before it comes here).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import grpc

from peerd.address import Address
from peerd.errors import RegistryAuthError, RegistryError, RegistryUnavailableError
from peerd.registry.etcd3_import import import_etcd3

etcd3 = import_etcd3()
rpc = etcd3.etcdrpc

_PAGE_KEYS = 1000

_CHANNEL_OPTIONS = (
    # An etcd that is back is noticed within half a second; by default, gRPC waits up to 120 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 400),
    # In spite of its name, the time that one attempt to connect may take (20 s by default).
    ("grpc.min_reconnect_backoff_ms", 2000),
    # Pings, and with them TCP_USER_TIMEOUT, cut a connection whose other end has gone without a word.
    # etcd hangs up on clients that ping more often than every 5 s, or without a call under way.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # A page of our longest records. The default is 4 MiB.
    ("grpc.max_receive_message_length", 128 * 1024 * 1024),
    # gRPC would go even to localhost through the http_proxy of the environment.
    ("grpc.enable_http_proxy", 0),
    # A connection of its own, or a new object would inherit the backoff of an older one.
    ("grpc.use_local_subchannel_pool", 1),
)


class KeyValue(NamedTuple):
    key: bytes
    value: bytes
    lease_id: int
    """0: no lease."""

    mod_revision: int


class Lease(NamedTuple):
    lease_id: int
    ttl_s: int
    """As granted: etcd raises what it finds too short."""


class Range(NamedTuple):
    items: list[KeyValue]
    """In the order of their keys."""

    revision: int
    """Of the store, the same for all items."""


class LeaseNotFoundError(RegistryError):
    """The lease to put a key under has run out or was revoked."""


class CompactedError(RegistryError):
    """The revision asked for is no longer in the store."""


class Etcd:
    """One etcd at ``http://host:port``. Making one neither connects nor blocks.

    Each method raises RegistryUnavailableError when etcd does not answer within ``timeout_s``, and
    another RegistryError when it refuses.
    """

    def __init__(self, endpoint_url: str, timeout_s: float) -> None:
        endpoint = Address.of_etcd(endpoint_url)
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        self.url = endpoint_url
        self.timeout_s = timeout_s
        self._closed = False
        self._client = etcd3.client(host=host, port=endpoint.port, grpc_options=_CHANNEL_OPTIONS)
        self._kv = self._client.kvstub
        self._leases = self._client.leasestub

    def close(self) -> None:
        """Ends the connection. Calls under way in other threads raise RegistryUnavailableError."""
        self._closed = True
        self._client.close()

    # Keys

    def list(self, prefix: bytes) -> Range:
        """All keys that start with ``prefix``, at one revision, however many pages that takes."""
        for _ in range(2):
            # Only when the store is compacted between two pages, and then not soon again.
            with contextlib.suppress(CompactedError):
                return self._read_pages(prefix)
        return self._read_pages(prefix)

    def _read_pages(self, prefix: bytes) -> Range:
        request = rpc.RangeRequest(
            key=prefix, range_end=etcd3.utils.increment_last_byte(prefix), limit=_PAGE_KEYS
        )
        items: list[KeyValue] = []
        while True:
            page = self._call(self._kv.Range, request)
            request.revision = request.revision or page.header.revision
            items += map(_key_value, page.kvs)
            if not page.more:
                return Range(items, request.revision)
            request.key = items[-1].key + b"\0"  # the next possible key

    def put(self, key: bytes, value: bytes, lease_id: int = 0) -> None:
        """Raises LeaseNotFoundError, as ``create`` and ``replace`` do, when there is no such lease."""
        self._call(self._kv.Put, rpc.PutRequest(key=key, value=value, lease=lease_id))

    def create(self, key: bytes, value: bytes, lease_id: int) -> KeyValue | None:
        """Puts the key if it does not exist. Otherwise returns what is there."""
        absent = rpc.Compare(
            key=key, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL, create_revision=0
        )
        answer = self._put_if(absent, key, value, lease_id)
        return None if answer.succeeded else _key_value(answer.responses[0].response_range.kvs[0])

    def replace(self, key: bytes, value: bytes, lease_id: int, expected_mod_revision: int) -> bool:
        """Puts the key if nobody has changed it since that revision. Returns whether it did."""
        unchanged = rpc.Compare(
            key=key,
            target=rpc.Compare.MOD,
            result=rpc.Compare.EQUAL,
            mod_revision=expected_mod_revision,
        )
        return bool(self._put_if(unchanged, key, value, lease_id).succeeded)

    def _put_if(self, condition: Any, key: bytes, value: bytes, lease_id: int) -> Any:
        put = rpc.PutRequest(key=key, value=value, lease=lease_id)
        request = rpc.TxnRequest(
            compare=[condition],
            success=[rpc.RequestOp(request_put=put)],
            failure=[rpc.RequestOp(request_range=rpc.RangeRequest(key=key))],
        )
        return self._call(self._kv.Txn, request)

    # Leases

    def grant(self, ttl_s: int) -> Lease:
        lease = self._call(self._leases.LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl_s))
        return Lease(lease.ID, lease.TTL)

    def keep_alive(
        self, lease_ids: Iterable[int], timeout_s: float | None = None
    ) -> Iterator[Lease]:
        """Refreshes all leases over one stream and yields each with its TTL, 0 for one that is gone.

        A generator, so that the answers that came before a failure are not lost with it.
        """
        timeout_s = timeout_s or self.timeout_s
        requests = [rpc.LeaseKeepAliveRequest(ID=lease_id) for lease_id in lease_ids]
        with self._translated_errors(timeout_s):
            # etcd answers in order and ends the stream after the last.
            for answer in self._leases.LeaseKeepAlive(iter(requests), timeout=timeout_s):
                yield Lease(answer.ID, answer.TTL)

    def revoke(self, lease_ids: Iterable[int], timeout_s: float | None = None) -> None:
        """Ends all leases at once, and with them their keys. One that is gone already is fine."""
        timeout_s = timeout_s or self.timeout_s
        deadline_s = time.monotonic() + timeout_s
        failure: RegistryError | None = None
        with self._translated_errors(timeout_s):
            answers = [
                self._leases.LeaseRevoke.future(
                    rpc.LeaseRevokeRequest(ID=lease_id), timeout=deadline_s - time.monotonic()
                )
                for lease_id in lease_ids
            ]
        for answer in answers:
            try:
                with self._translated_errors(timeout_s):
                    answer.result()
            except LeaseNotFoundError:
                pass
            except RegistryError as error:
                failure = error
        if failure is not None:
            raise failure

    # Calls and their failures

    def _call(self, method: Any, request: Any) -> Any:
        with self._translated_errors(self.timeout_s):
            return method(request, timeout=self.timeout_s)

    @contextlib.contextmanager
    def _translated_errors(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            # Not "from error": no gRPC object, with its call and channel, hangs on our errors.
            raise self._translated(error, timeout_s) from None
        except (ValueError, grpc.FutureCancelledError):  # "Cannot invoke RPC on closed channel!"
            if not self._closed:
                raise
            raise RegistryUnavailableError(
                f"the connection to etcd at {self.url} was closed meanwhile"
            ) from None

    def _translated(self, error: Any, timeout_s: float) -> RegistryError:
        code, details = error.code(), error.details() or ""
        status = grpc.StatusCode
        if code is status.NOT_FOUND:
            return LeaseNotFoundError(f"etcd at {self.url}: {details}")
        if code is status.OUT_OF_RANGE:
            return CompactedError(f"etcd at {self.url}: {details}")
        # With authentication on, etcd calls a request without a token an invalid argument.
        if code in (status.UNAUTHENTICATED, status.PERMISSION_DENIED) or "user name is" in details:
            return RegistryAuthError(
                f"etcd at {self.url} refuses access ({details}): peerd cannot log in to etcd yet, "
                "use one without authentication"
            )
        if code in (status.INVALID_ARGUMENT, status.FAILED_PRECONDITION, status.RESOURCE_EXHAUSTED):
            return RegistryError(f"etcd at {self.url} refuses the request: {details}")
        if code is status.DEADLINE_EXCEEDED:
            cause = f"no answer within {timeout_s:g} s"
        else:
            # gRPC tells the whole way down to the cause: "...: last error: UNKNOWN: ...: Connection
            # refused (111)".
            cause = details.rpartition(": ")[2].lower() or code.name.lower()
        return RegistryUnavailableError(
            f"etcd at {self.url} does not answer ({cause}): "
            "start it with 'peerd etcd', or name another with --etcd"
        )


def _key_value(item: Any) -> KeyValue:
    return KeyValue(item.key, item.value, item.lease, item.mod_revision)
