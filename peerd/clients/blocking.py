"""Messages to peers, by address or by peer id: the client that blocks, and what async_client.py shares.

The envelope has no request id, and peers that are not ours would not send one back. What tells replies
apart is the socket: each try of a request has one of its own, connected to the peer. A reply to an
earlier try meets a closed port; what others send does not arrive; and an ICMP error belongs to this
try, so a peer that is not there is known at once. Ports are drawn at random, so one could come again
while a reply to its last try is still on its way: those that were given up are remembered and left out.

``send`` and ``broadcast`` expect nothing back and share one socket for each address family: to a peer
they are one sender, whose datagrams stay in order and are handed over joined (UDP_GRO).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeAlias

from peerd._core import Message, decode, encode
from peerd.address import Address, address_of
from peerd.errors import DecodeError, NoAnswerError, SettingsError

if TYPE_CHECKING:
    from peerd.registry import PeerRecord

log = logging.getLogger(__name__)

Target: TypeAlias = "str | tuple[str, int] | PeerRecord"
IsAnswer: TypeAlias = Callable[[Message], bool]

DEFAULT_VERSION = "1.0"
MAX_DATAGRAM_BYTES = 65507
RECEIVE_BYTES = 1 << 16
MAX_TIMEOUT_S = 86_400.0

RETRY_PAUSE_S = 0.1
"""Before the next try at a peer that is known not to be there: it may be starting again."""

MAX_GIVEUPS = 4096
"""Of Linux's 28,232 ephemeral ports."""

MAX_DRAWS = 16
"""Of a port, until it is one that was not given up; then any is better than none."""

NEXT_STEP = "see that the address is right and can be reached from here"
NEXT_STEPS = {
    errno.ECONNREFUSED: "nobody listens there, 'peerd nodes' shows where peers are",
    errno.EMFILE: "make fewer requests at a time, or raise the limit (ulimit -n)",
}

# linux/in.h and linux/in6.h; the socket module has them from Python 3.14 on.
IP_RECVERR = 11
IPV6_RECVERR = 25


class Peers(Protocol):
    """Who is there: a registry's cache, or whatever else has these two."""

    def get(self, peer_id: str, /) -> PeerRecord | None: ...

    def nodes(self, *, partition_key: str | None = None) -> Sequence[PeerRecord]: ...


class ClientBase:
    """What the clients have in common, blocking or not."""

    def __init__(self, peers: Peers | None = None) -> None:
        """Without ``peers`` a target is an address, and there is nobody to broadcast to."""
        self._peers = peers
        self._ports = _Ports()
        self._senders = _Senders()

    def locate(self, target: Target) -> Address:
        """Where a target is now. A name stays a name.

        A string is a peer id first: what is registered under it is the truth, even where it reads as
        an address, as the default peer id does. Else it is ``host:port``, IPv6 in brackets.

        Raises SettingsError for what can be neither, NoAnswerError for a peer id that nobody has,
        and what ``peers`` raises.
        """
        if isinstance(target, str):
            record = self._peers.get(target) if self._peers is not None else None
            return self._read(target) if record is None else Address(record.url, record.port)
        if isinstance(target, tuple):
            return _checked(target)
        return Address(target.url, target.port)

    def _read(self, target: str) -> Address:
        address = address_of(target)
        if address is not None:
            return address
        if self._peers is None:
            raise SettingsError(
                f"target {target!r} is no host:port: write one, or make the client with a registry's"
                " cache, which finds peers by their id"
            )
        raise NoAnswerError(
            f"no peer has the id {target!r}: 'peerd nodes' shows those that are there"
        )

    def _everyone(self, partition_key: str | None) -> Sequence[PeerRecord]:
        if self._peers is None:
            raise SettingsError(
                "nobody to broadcast to: make the client with a registry's cache, which knows the peers"
            )
        return self._peers.nodes(partition_key=partition_key)

    def _datagram(self, magic: str, version: str, body: bytes) -> bytes:
        self._senders.check_open()
        try:
            datagram = encode(magic, version, body)
        except ValueError as error:
            raise SettingsError(f"magic {magic!r}, version {version!r}: {error}") from None
        if len(datagram) > MAX_DATAGRAM_BYTES:
            raise SettingsError(
                f"a message of {len(datagram)} bytes does not fit into a UDP datagram "
                f"({MAX_DATAGRAM_BYTES} bytes): send less at a time"
            )
        return datagram


class PeerClient(ClientBase):
    """Sends messages to peers and waits for their replies. A context manager; usable from any thread.

        with Registry(...) as registry, registry.cache() as cache, PeerClient(cache) as client:
            cache.wait_current(5.0)
            reply = client.request("orders-3", "ASK", b"...", timeout=0.5, retries=2)

    Targets are what :meth:`locate` reads, an ``(address, port)`` or a PeerRecord. Every method raises
    SettingsError for a target, message or limit that cannot work, what ``peers`` raises, and
    RuntimeError after :meth:`close`.
    """

    def request(
        self,
        target: Target,
        magic: str,
        body: bytes = b"",
        timeout: float = 1.0,
        retries: int = 0,
        *,
        version: str = DEFAULT_VERSION,
        is_answer: IsAnswer = lambda _: True,
    ) -> Message:
        """Send, and return the first message that the peer replies to this try and that ``is_answer``.

        ``timeout``: seconds for each try, which locates the target anew. Looking up a host name in
        the DNS can take longer than that. ``retries``: tries after the first.

        Raises NoAnswerError when the last try has got nothing in time or its peer cannot be reached;
        the latter at once.
        """
        datagram = self._datagram(magic, version, body)
        check_limits(timeout, retries)
        while True:
            started_s = time.monotonic()
            try:
                return self._try(target, datagram, started_s, timeout, is_answer)
            except NoAnswerError:
                if not retries:
                    raise
            retries -= 1
            time.sleep(pause_s(started_s, timeout))

    def send(
        self, target: Target, magic: str, body: bytes = b"", *, version: str = DEFAULT_VERSION
    ) -> None:
        """Send and expect nothing. Raises NoAnswerError when this host knows no way to the peer."""
        self._send(target, self._datagram(magic, version, body))

    def broadcast(
        self,
        magic: str,
        body: bytes = b"",
        partition_key: str | None = None,
        *,
        version: str = DEFAULT_VERSION,
    ) -> int:
        """Send to every peer, or to those with the partition key; returns to how many.

        One that cannot be sent to is logged (debug), and does not keep the others from getting theirs.
        """
        datagram = self._datagram(magic, version, body)
        return sum(self._sent(record, datagram) for record in self._everyone(partition_key))

    def close(self) -> None:
        """Requests of other threads that are under way come to their own end."""
        self._senders.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _try(
        self,
        target: Target,
        datagram: bytes,
        started_s: float,
        timeout_s: float,
        is_answer: IsAnswer,
    ) -> Message:
        address = self.locate(target)
        with failures_named(target, address, timeout_s):
            endpoint = resolve(address)
            with self._ports.connect(endpoint) as sock:
                sock.send(datagram)
                while True:
                    reply = _receive(sock, started_s + timeout_s)
                    message = message_in(reply, endpoint)
                    if message is not None and is_answer(message):
                        return message

    def _send(self, target: Target, datagram: bytes) -> None:
        address = self.locate(target)
        with failures_named(target, address):
            endpoint = resolve(address)
            self._senders.of(endpoint.family).sendto(datagram, endpoint.sockaddr)

    def _sent(self, record: PeerRecord, datagram: bytes) -> bool:
        try:
            self._send(record, datagram)
        except NoAnswerError as error:
            log.debug("broadcast: %s", error)
            return False
        return True


class Endpoint(NamedTuple):
    """An address that is no name any more."""

    family: int
    sockaddr: tuple[Any, ...]

    @property
    def address(self) -> Address:
        return Address(self.sockaddr[0], self.sockaddr[1])


def resolve(address: Address) -> Endpoint:
    """Raises OSError for a name that nobody knows; may take as long as the DNS does."""
    return numeric(address) or preferred(socket.getaddrinfo(*address, type=socket.SOCK_DGRAM))


def numeric(address: Address) -> Endpoint | None:
    """The endpoint of an address without a name in it, which nobody needs to be asked for.

    Raises OSError for what cannot be a name either.
    """
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    except UnicodeError:
        raise OSError(errno.EINVAL, "this cannot be a host name") from None
    except OSError:
        return None
    return preferred(found)


def preferred(found: Sequence[tuple[Any, ...]]) -> Endpoint:
    """Of what getaddrinfo gave. As the supervisor binds "localhost": IPv4 first."""
    family, _, _, _, sockaddr = min(found, key=lambda entry: bool(entry[0] != socket.AF_INET))
    return Endpoint(family, sockaddr)


def message_in(datagram: bytes, endpoint: Endpoint) -> Message | None:
    try:
        return decode(datagram, endpoint.sockaddr[:2])
    except DecodeError:
        return None


def check_limits(timeout_s: float, retries: int) -> None:
    """Raises SettingsError."""
    if not (math.isfinite(timeout_s) and 0 <= timeout_s <= MAX_TIMEOUT_S):
        raise SettingsError(f"timeout {timeout_s!r}: from 0 to {MAX_TIMEOUT_S:g} seconds")
    if retries < 0:
        raise SettingsError(f"retries {retries!r}: 0 or more, after the first try")


def pause_s(started_s: float, timeout_s: float) -> float:
    """Between a try that began at ``started_s`` and the next: nothing after one that timed out."""
    return max(0.0, min(RETRY_PAUSE_S, started_s + timeout_s - time.monotonic()))


@contextlib.contextmanager
def failures_named(
    target: Target, address: Address, timeout_s: float | None = None
) -> Iterator[None]:
    """Raises NoAnswerError for an OSError inside: who, why, and what to do."""
    try:
        yield
    except OSError as error:
        given = target if isinstance(target, str) else getattr(target, "peer_id", str(address))
        who = given if given == str(address) else f"{given} at {address}"
        raise NoAnswerError(f"no answer from {who}: {_cause(error, timeout_s)}") from None


def _cause(error: OSError, timeout_s: float | None) -> str:
    if isinstance(error, TimeoutError) and timeout_s is not None:
        return (
            f"nothing within {timeout_s:g} s; allow more time or more tries, "
            "and see that the peer has a handler that replies"
        )
    return f"{error.strerror or error}; {NEXT_STEPS.get(error.errno or 0, NEXT_STEP)}"


def _checked(target: tuple[str, int]) -> Address:
    match target:
        case (str(host), int(port)) if host and 1 <= port <= 65535:
            return Address(host, port)
    raise SettingsError(f"target {target!r}: write (host, port), a port from 1 to 65535")


def _receive(sock: socket.socket, deadline_s: float) -> bytes:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    sock.settimeout(left_s)
    return sock.recv(RECEIVE_BYTES)


class _Ports:
    """Sockets for a try each, none with the port of a try that was given up lately."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given_up: dict[int, None] = {}  # oldest first

    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint) -> Iterator[socket.socket]:
        """A socket that is closed afterwards; its port is given up when that is by an exception."""
        with self._draw(endpoint) as sock:
            port: int = sock.getsockname()[1]
            try:
                yield sock
            except BaseException:
                self._give_up(port)
                raise

    def _draw(self, endpoint: Endpoint) -> socket.socket:
        for _ in range(MAX_DRAWS):
            sock = _connected(endpoint)
            if sock.getsockname()[1] not in self._given_up:
                return sock
            sock.close()
        return _connected(endpoint)

    def _give_up(self, port: int) -> None:
        with self._lock:
            self._given_up.pop(port, None)
            self._given_up[port] = None
            if len(self._given_up) > MAX_GIVEUPS:
                del self._given_up[next(iter(self._given_up))]


def _connected(endpoint: Endpoint) -> socket.socket:
    sock = socket.socket(endpoint.family, socket.SOCK_DGRAM)
    try:
        # Without it Linux keeps "host unreachable" and the like from a UDP socket (udp(7)).
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        if endpoint.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        sock.connect(endpoint.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


class _Senders:
    """An unconnected socket for each address family, made when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: dict[int, socket.socket] = {}
        self._closed = False

    def check_open(self) -> None:
        """Raises RuntimeError."""
        if self._closed:
            raise RuntimeError("this client is closed")

    def of(self, family: int) -> socket.socket:
        with self._lock:
            self.check_open()
            sock = self._sockets.get(family)
            if sock is None:
                sock = self._sockets[family] = socket.socket(family, socket.SOCK_DGRAM)
                # Nobody reads the replies: the kernel is to keep as few as it can.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            return sock

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for sock in self._sockets.values():
                sock.close()
            self._sockets.clear()
