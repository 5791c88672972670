"""One connection to one member of an etcd cluster, and failover to the next member.

A member can fail in ways that gRPC reports immediately (killed), late (stopped or cut off: nothing
arrives, and gRPC's own pings may not come more often than every 5 s, or etcd closes the connection) or
never (cut off from the other members: it accepts calls and does not answer). So no connection is trusted.
Each call has a deadline, a short one at first if there is another member to ask. While a stream is open,
which is silent by nature, a probe (a linearizable read) goes over the same connection every
PROBE_INTERVAL_S. The caller that meets a failure closes the connection, which ends the calls and streams
of all other threads; they then use the next member. With one member, the next one is the same member over
a new connection.

Repeating a call is safe: each request here is a read, a comparison that then fails, a grant of another
lease, or a revocation.

With a user, a call carries the token of the last login. Tokens expire (``--auth-token-ttl``, a restart of
etcd); a call that is refused for that reason logs in again.

Only this file, etcd.py, streams.py, etcd_errors.py and etcd3_import.py see gRPC or etcd3.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from peerd.address import Address, EtcdEndpoints
from peerd.errors import RegistryError, RegistryUnavailableError, SettingsError
from peerd.registry import etcd_errors
from peerd.registry.etcd3_import import import_etcd3
from peerd.registry.etcd_errors import LoginEndedError
from peerd.settings import EtcdAccess

etcd3 = import_etcd3()
rpc = etcd3.etcdrpc

PROBE_INTERVAL_S = 1.0  # between two reads that show that a connection with an open stream is alive
FIRST_ATTEMPT_TIMEOUT_S = 1.0
"""For one of several members at first; doubled after each round of all members."""

UNRESPONSIVE_S = 5.0
"""How long a member that did not answer at all is asked only after all others.

While the others elect a leader, they refuse immediately; every client would return to the dead member."""

_CLOSE_TIMEOUT_S = 1.0
ROUND_PAUSE_S = 0.1  # between two rounds of all members
_CHANNEL_OPTIONS = (
    # In spite of its name, the timeout of one attempt to connect (20 s by default).
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 400),
    # The default of 4 MiB holds only a few dozen of the longest records.
    ("grpc.max_receive_message_length", 32 * 1024 * 1024),
    # Otherwise gRPC uses the environment's http_proxy even for localhost.
    ("grpc.enable_http_proxy", 0),
    # Otherwise a new channel inherits the backoff of an older one.
    ("grpc.use_local_subchannel_pool", 1),
)


class Connection:
    """A channel to one member."""

    def __init__(self, member: Address, client: Any) -> None:
        self.member = member
        self.kv = client.kvstub
        self.leases = client.leasestub
        self.watches = rpc.WatchStub(client.channel)
        self.logins = rpc.AuthStub(client.channel)
        self.answered = False
        self._client = client

    def close(self) -> None:
        self._client.close()


class Members:
    """The members of one cluster, of which one is connected at a time. Thread-safe."""

    def __init__(self, urls: str, access: EtcdAccess, timeout_s: float) -> None:
        self.urls = urls
        self.timeout_s = timeout_s
        self._endpoints = EtcdEndpoints.of(urls)
        self._access = access
        # Spreads many clients over the members.
        self._order = random.sample(self._endpoints.members, len(self._endpoints.members))
        # Reentrant: the garbage collector may end an abandoned stream in a thread that holds the lock.
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._unresponsive_since_s: dict[Address, float] = {}
        self._token: str | None = None
        self._streams = 0
        self._no_streams = threading.Event()
        self._closed = False
        self.last_answer_s = 0.0
        """When a member last answered, on the monotonic clock; 0 before the first answer."""

    @property
    def url(self) -> str:
        """The URL of the member that is asked first."""
        return self._endpoints.url(self._order[0])

    def close(self) -> None:
        """Calls under way in other threads raise RegistryUnavailableError."""
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
            self._no_streams.set()
        if connection is not None:
            # gRPC waits for its locks for ever, and a KeyboardInterrupt within a call may leave one held.
            closer = threading.Thread(target=connection.close, daemon=True)
            closer.start()
            closer.join(_CLOSE_TIMEOUT_S)

    def call(
        self, method: Callable[[Connection], Any], request: Any, deadline_s: float | None = None
    ) -> Any:
        """The answer of a member, within ``timeout_s`` in total or until a monotonic time."""
        deadline_s = deadline_s or time.monotonic() + self.timeout_s
        attempts = 0
        logged_in_again = False
        while True:
            connection = self.connection()
            had_answered = connection.answered
            timeout_s = self._attempt_timeout_s(attempts, deadline_s)
            try:
                with self.translating_errors(connection, timeout_s):
                    metadata = self.metadata(connection, timeout_s)
                    answer = method(connection)(request, timeout=timeout_s, metadata=metadata)
                    self._on_answer(connection)
                    return answer
            except LoginEndedError:
                if logged_in_again:
                    raise
                logged_in_again = True
                continue
            except RegistryUnavailableError:
                left_s = deadline_s - time.monotonic()
                # A single member that had answered may have been restarted: its connection was stale.
                if left_s <= 0 or (self._is_alone and (attempts or not had_answered)):
                    raise
            attempts += 1
            if attempts % len(self._order) == 0:
                time.sleep(min(ROUND_PAUSE_S, max(deadline_s - time.monotonic(), 0.0)))

    @contextlib.contextmanager
    def stream(self, probe: Any) -> Iterator[Connection]:
        """A connection that fails over if it does not answer ``probe``, a RangeRequest, in time."""
        with self._lock:
            self._streams += 1
            if self._streams == 1:
                self._no_streams = threading.Event()
                threading.Thread(
                    target=self._probe_connection,
                    args=(probe, self._no_streams),
                    name="peerd-registry-probe",
                    daemon=True,
                ).start()
        try:
            yield self.connection()
        finally:
            with self._lock:
                self._streams -= 1
                if self._streams == 0:
                    self._no_streams.set()

    def connection(self) -> Connection:
        with self._lock:
            if self._closed:
                raise self._closed_meanwhile()
            if self._connection is None:
                self._connection = self._connect(self._order[0])
            return self._connection

    def fail_over(self, connection: Connection, *, unresponsive: bool = False) -> None:
        """Close the connection and continue with the next member, unless another thread has done so.

        ``unresponsive``: the member did not even refuse.
        """
        with self._lock:
            if self._connection is not connection:
                return
            self._connection = None
            if unresponsive:
                self._unresponsive_since_s[connection.member] = time.monotonic()
            self._order.append(self._order.pop(0))
            before_s = time.monotonic() - UNRESPONSIVE_S
            self._order.sort(
                key=lambda member: self._unresponsive_since_s.get(member, 0.0) > before_s
            )
        connection.close()

    def metadata(self, connection: Connection, timeout_s: float) -> tuple[tuple[str, str], ...]:
        """The metadata of each call. Logs in first if necessary."""
        if self._access.user is None:
            return ()
        token = self._token
        if token is None:
            request = rpc.AuthenticateRequest(
                name=self._access.user, password=self._access.password
            )
            try:
                token = connection.logins.Authenticate(request, timeout=timeout_s).token
            except grpc.RpcError as error:
                if "authentication is not enabled" not in (error.details() or ""):
                    raise
                token = ""
            self._token = token
        return (("token", token),) if token else ()

    def forget_login(self) -> None:
        self._token = None

    @contextlib.contextmanager
    def translating_errors(self, connection: Connection, timeout_s: float) -> Iterator[None]:
        """Raise our errors instead of gRPC's, and fail over from a connection that does not work."""
        try:
            yield
        except grpc.RpcError as error:
            failure = etcd_errors.of_rpc(
                error,
                self.urls,
                connection.member,
                self._access,
                timeout_s,
                uses_tls=self._endpoints.tls,
                has_ever_answered=self.last_answer_s > 0,
            )
            unresponsive = "etcdserver: " not in (error.details() or "")
            # Cancelled here: the stream by its user, or the channel by the thread that failed over.
            is_broken = error.code() is not grpc.StatusCode.CANCELLED
        except (ValueError, grpc.FutureCancelledError) as error:
            # gRPC has several texts for a call on a channel that another thread closes.
            if isinstance(error, ValueError) and self._connection is connection:
                raise
            failure = self._closed_meanwhile()
            unresponsive = is_broken = False
        else:
            return
        if isinstance(failure, LoginEndedError):
            self.forget_login()
        elif isinstance(failure, RegistryUnavailableError) and is_broken:
            self.fail_over(connection, unresponsive=unresponsive)
        # Not "from error": our errors keep no gRPC object, with its call and channel, alive.
        raise failure from None

    @property
    def _is_alone(self) -> bool:
        return len(self._order) == 1

    def _attempt_timeout_s(self, attempts: int, deadline_s: float) -> float:
        left_s = max(deadline_s - time.monotonic(), 0.001)
        if self._is_alone:
            return left_s
        return min(left_s, FIRST_ATTEMPT_TIMEOUT_S * (1 << attempts // len(self._order)))

    def _on_answer(self, connection: Connection) -> None:
        connection.answered = True
        self.last_answer_s = time.monotonic()

    def _connect(self, member: Address) -> Connection:
        host = f"[{member.host}]" if ":" in member.host else member.host
        files = {}
        if self._endpoints.tls:
            files = {
                "ca_cert": str(self._access.ca_file or etcd_errors.trusted_authorities()),
                "cert_cert": self._access.cert_file and str(self._access.cert_file),
                "cert_key": self._access.key_file and str(self._access.key_file),
            }
        try:
            client = etcd3.client(
                host=host, port=member.port, grpc_options=_CHANNEL_OPTIONS, **files
            )
        except OSError as error:
            raise SettingsError(f"{error.filename}: {error.strerror}") from None
        return Connection(member, client)

    def _probe_connection(self, probe: Any, no_streams: threading.Event) -> None:
        """In a thread while there are streams, whose own threads wait for events."""
        timeout_s = self._attempt_timeout_s(0, time.monotonic() + self.timeout_s)
        while not no_streams.wait(PROBE_INTERVAL_S):
            with contextlib.suppress(RegistryError):
                connection = self.connection()
                with self.translating_errors(connection, timeout_s):
                    metadata = self.metadata(connection, timeout_s)
                    connection.kv.Range(probe, timeout=timeout_s, metadata=metadata)
                    self._on_answer(connection)

    def _closed_meanwhile(self) -> RegistryUnavailableError:
        return RegistryUnavailableError(
            f"the connection to etcd at {self.urls} was closed meanwhile"
        )
