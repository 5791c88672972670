"""One connection to one member of an etcd cluster, given up for the next where it does not answer.

A member can fail in ways that gRPC tells at once (killed), late (stopped, cut off: nothing comes, and
its own pings may not come more often than every 5 s, or etcd hangs up) or never (cut off from the other
members: it accepts calls and has no answer). So nothing here trusts a connection. Each call has a
deadline, a short one first if there is another member to ask. While a stream is open, which is silent
by nature, a linearizable read goes over the same connection each PULSE_S. Whoever meets a failure
leaves the connection for everybody: closing it ends the calls and streams of other threads, which
then find the next member. With one member the next one is itself, over a new connection.

Asking again is safe, since each request here is a read, is a comparison that then fails, takes a new
lease, or ends one.

With a user, a call carries the token of the last login. Tokens end (``--auth-token-ttl``, a restart of
etcd); a call that is refused for that logs in again.

Nobody but this file and etcd.py sees gRPC or etcd3.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from peerd.address import Address, EtcdEndpoints
from peerd.errors import (
    RegistryAuthError,
    RegistryError,
    RegistryUnavailableError,
    SettingsError,
)
from peerd.registry.etcd3_import import import_etcd3
from peerd.settings import DEFAULT_ENDPOINT, EtcdAccess

etcd3 = import_etcd3()
rpc = etcd3.etcdrpc

PULSE_S = 1.0
"""Between two reads that show that a connection with an open stream is alive."""

FIRST_ATTEMPT_S = 1.0
"""How long one of several members may take at first; twice as long after each round of them all."""

SILENT_S = 5.0
"""For how long a member that has said nothing is asked only after all others.

While the others elect a leader they refuse at once, and would send everybody back to the dead one."""

ROUND_PAUSE_S = 0.1

_CHANNEL_OPTIONS = (
    # The time that one attempt to connect may take (20 s by default), in spite of its name.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 400),
    # The default of 4 MiB is a few dozen of the longest records.
    ("grpc.max_receive_message_length", 32 * 1024 * 1024),
    # gRPC would go even to localhost through the http_proxy of the environment.
    ("grpc.enable_http_proxy", 0),
    # A connection of its own, or a new object would inherit the backoff of an older one.
    ("grpc.use_local_subchannel_pool", 1),
)


class LeaseNotFoundError(RegistryError):
    """The lease to put a key under has run out or was revoked."""


class CompactedError(RegistryError):
    """The revision asked for is not in the store: too old, or of another store."""


class TooLargeError(RegistryError):
    """The answer is larger than what is taken: ask for less at once."""


class _LoginEndedError(RegistryUnavailableError):
    """The token is not valid any more: log in again."""


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
    """The members of one cluster, of which one at a time is connected. Usable from any thread."""

    def __init__(self, urls: str, access: EtcdAccess, timeout_s: float) -> None:
        self.urls = urls
        self.timeout_s = timeout_s
        self._endpoints = EtcdEndpoints.of(urls)
        self._access = access
        # So that of many clients not all are with the same member.
        self._order = random.sample(self._endpoints.members, len(self._endpoints.members))
        # Reentrant, since the garbage collector may end an abandoned stream in a thread that holds it.
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._silent_s: dict[Address, float] = {}
        self._token: str | None = None
        self._streams = 0
        self._no_streams = threading.Event()
        self._closed = False
        self.heard_s = 0.0
        """When a member last answered, on the monotonic clock."""

    @property
    def url(self) -> str:
        """Of the member that is asked first."""
        return self._endpoints.url(self._order[0])

    def close(self) -> None:
        """Calls under way in other threads raise RegistryUnavailableError."""
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
            self._no_streams.set()
        if connection is not None:
            connection.close()

    def call(
        self, method: Callable[[Connection], Any], request: Any, deadline_s: float | None = None
    ) -> Any:
        """The answer of a member, within ``timeout_s`` in all or until a monotonic time."""
        deadline_s = deadline_s or time.monotonic() + self.timeout_s
        attempts = 0
        logged_in_again = False
        while True:
            connection = self.connection()
            had_answered = connection.answered
            timeout_s = self._attempt_s(attempts, deadline_s)
            try:
                with self.failures(connection, timeout_s):
                    metadata = self.metadata(connection, timeout_s)
                    answer = method(connection)(request, timeout=timeout_s, metadata=metadata)
                    self._hear(connection)
                    return answer
            except _LoginEndedError:
                if logged_in_again:
                    raise
                logged_in_again = True
                continue
            except RegistryUnavailableError:
                left_s = deadline_s - time.monotonic()
                # One of one that had answered may just have been restarted: its connection was old.
                if left_s <= 0 or (self._is_alone and (attempts or not had_answered)):
                    raise
            attempts += 1
            if attempts % len(self._order) == 0:
                time.sleep(min(ROUND_PAUSE_S, max(deadline_s - time.monotonic(), 0.0)))

    def begin(self, method: Callable[[Connection], Any], request: Any) -> Callable[[], Any]:
        """``call``, begun now; what is returned waits for the answer."""
        deadline_s = time.monotonic() + self.timeout_s
        try:
            connection = self.connection()
            timeout_s = self._attempt_s(0, deadline_s)
            with self.failures(connection, timeout_s):
                metadata = self.metadata(connection, timeout_s)
                future = method(connection).future(request, timeout=timeout_s, metadata=metadata)
        except RegistryUnavailableError:
            return lambda: self.call(method, request, deadline_s)

        def answer() -> Any:
            try:
                with self.failures(connection, timeout_s):
                    return future.result()
            except RegistryUnavailableError:
                if time.monotonic() >= deadline_s:
                    raise
                return self.call(method, request, deadline_s)

        return answer

    @contextlib.contextmanager
    def stream(self, alive: Any) -> Iterator[Connection]:
        """A connection that is left when it does not answer ``alive``, a RangeRequest, in time."""
        with self._lock:
            self._streams += 1
            if self._streams == 1:
                self._no_streams = threading.Event()
                threading.Thread(
                    target=self._feel_pulse,
                    args=(alive, self._no_streams),
                    name="peerd-registry-pulse",
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

    def leave(self, connection: Connection, *, silent: bool = False) -> None:
        """Goes on with the next member. Nothing happens where that was done already.

        ``silent``: it has not even refused.
        """
        with self._lock:
            if self._connection is not connection:
                return
            self._connection = None
            if silent:
                self._silent_s[connection.member] = time.monotonic()
            self._order.append(self._order.pop(0))
            before_s = time.monotonic() - SILENT_S
            self._order.sort(key=lambda member: self._silent_s.get(member, 0.0) > before_s)
        connection.close()

    def metadata(self, connection: Connection, timeout_s: float) -> tuple[tuple[str, str], ...]:
        """What each call carries; logs in first if that is to be done."""
        if self._access.user is None:
            return ()
        token = self._token
        if token is None:
            request = rpc.AuthenticateRequest(
                name=self._access.user, password=self._access.password
            )
            token = self._token = self._authenticate(connection, request, timeout_s)
        return (("token", token),) if token else ()

    def forget_login(self) -> None:
        self._token = None

    @contextlib.contextmanager
    def failures(self, connection: Connection, timeout_s: float) -> Iterator[None]:
        """Raises our errors for gRPC's, and leaves a connection that does not work."""
        try:
            yield
        except grpc.RpcError as error:
            failure = self._translated(error, connection.member, timeout_s)
            silent = "etcdserver: " not in (error.details() or "")
            # Cancelled here: the stream by its user, or the channel by who has left it already.
            works = error.code() is grpc.StatusCode.CANCELLED
        except (ValueError, grpc.FutureCancelledError) as error:
            # gRPC has several texts for a call on a channel that another thread closes.
            if isinstance(error, ValueError) and self._connection is connection:
                raise
            failure = self._closed_meanwhile()
            works, silent = True, False
        else:
            return
        if isinstance(failure, _LoginEndedError):
            self.forget_login()
        elif isinstance(failure, RegistryUnavailableError) and not works:
            self.leave(connection, silent=silent)
        # Not "from error": no gRPC object, with its call and channel, hangs on our errors.
        raise failure from None

    @property
    def _is_alone(self) -> bool:
        return len(self._order) == 1

    def _attempt_s(self, attempts: int, deadline_s: float) -> float:
        left_s = max(deadline_s - time.monotonic(), 0.001)
        if self._is_alone:
            return left_s
        return min(left_s, FIRST_ATTEMPT_S * (1 << attempts // len(self._order)))

    def _hear(self, connection: Connection) -> None:
        connection.answered = True
        self.heard_s = time.monotonic()

    def _connect(self, member: Address) -> Connection:
        host = f"[{member.host}]" if ":" in member.host else member.host
        files = {}
        if self._endpoints.tls:
            files = {
                "ca_cert": str(self._access.ca_file or _trusted_authorities()),
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

    def _authenticate(self, connection: Connection, request: Any, timeout_s: float) -> str:
        try:
            return str(connection.logins.Authenticate(request, timeout=timeout_s).token)
        except grpc.RpcError as error:
            if "authentication is not enabled" in (error.details() or ""):
                return ""
            raise

    def _feel_pulse(self, alive: Any, no_streams: threading.Event) -> None:
        """While there are streams. Their thread cannot do it: it waits for what they say."""
        timeout_s = self._attempt_s(0, time.monotonic() + self.timeout_s)
        while not no_streams.wait(PULSE_S):
            with contextlib.suppress(RegistryError):
                connection = self.connection()
                with self.failures(connection, timeout_s):
                    metadata = self.metadata(connection, timeout_s)
                    connection.kv.Range(alive, timeout=timeout_s, metadata=metadata)
                    self._hear(connection)

    def _closed_meanwhile(self) -> RegistryUnavailableError:
        return RegistryUnavailableError(
            f"the connection to etcd at {self.urls} was closed meanwhile"
        )

    def _trouble_with_tls(self, member: Address) -> str:
        if self.heard_s:
            return ""
        from peerd.registry.tls import why_http_fails, why_https_fails

        if not self._endpoints.tls:
            return why_http_fails(member)
        access = self._access
        return why_https_fails(
            member,
            access.ca_file or _trusted_authorities(),
            access.cert_file,
            access.key_file,
        )

    def _translated(self, error: Any, member: Address, timeout_s: float) -> RegistryError:
        code, details = error.code(), error.details() or ""
        status = grpc.StatusCode
        if code is status.NOT_FOUND:
            return LeaseNotFoundError(f"etcd at {self.urls}: {details}")
        if code is status.OUT_OF_RANGE:
            return CompactedError(f"etcd at {self.urls}: {details}")
        # Not "frame size ... is larger than max", which a network that garbles bytes brings about.
        if code is status.RESOURCE_EXHAUSTED and "message larger than max" in details:
            return TooLargeError(f"etcd at {self.urls}: {details}")
        if "invalid auth token" in details or "revision in header is old" in details:
            return _LoginEndedError(f"etcd at {self.urls}: {details}")
        # With authentication on, etcd calls a request without a token an invalid argument.
        if "user name is empty" in details:
            if self._access.user is not None:  # authentication is on since a moment ago
                return _LoginEndedError(f"etcd at {self.urls}: {details}")
            return RegistryAuthError(
                f"etcd at {self.urls} wants a login: give --etcd-user, and --etcd-password-file or "
                "PEERD_ETCD_PASSWORD"
            )
        if "authentication failed" in details:
            return RegistryAuthError(
                f"etcd at {self.urls} refuses user {self._access.user!r} with this password: correct "
                "--etcd-user, --etcd-password-file or PEERD_ETCD_PASSWORD"
            )
        if code in (status.UNAUTHENTICATED, status.PERMISSION_DENIED):
            who = "without a login" if self._access.user is None else f"user {self._access.user!r}"
            return RegistryAuthError(
                f"etcd at {self.urls} refuses {who} ({details}): the role needs read and write "
                "permission for the prefix"
            )
        if code in (status.INVALID_ARGUMENT, status.FAILED_PRECONDITION, status.RESOURCE_EXHAUSTED):
            return RegistryError(f"etcd at {self.urls} refuses the request: {details}")
        if code is status.DEADLINE_EXCEEDED:
            cause = f"no answer within {timeout_s:.2g} s"
        elif trouble := self._trouble_with_tls(member):
            return RegistryUnavailableError(f"etcd at {self.urls} cannot be asked: {trouble}")
        else:
            # gRPC tells the whole way down to the cause: "...: last error: UNKNOWN: ...: Connection
            # refused (111)".
            cause = details.rpartition(": ")[2].rstrip("]").lower() or code.name.lower()
        start = (
            "start it with 'peerd etcd'" if self.urls == DEFAULT_ENDPOINT else "see that it runs"
        )
        return RegistryUnavailableError(
            f"etcd at {self.urls} does not answer ({cause}): {start}, or name another with --etcd"
        )


def _trusted_authorities() -> Path:
    import ssl  # only for https; OpenSSL is some megabytes

    paths = ssl.get_default_verify_paths()
    for found in (paths.cafile, "/etc/ssl/certs/ca-certificates.crt"):
        if found is not None and Path(found).is_file():
            return Path(found)
    raise SettingsError("this machine trusts no authority: name etcd's with --etcd-ca")
