"""Targets, datagrams and error messages: what both clients share and does no I/O."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from peerd._envelope import encode
from peerd.address import Address, address_of
from peerd.clients.client_sockets import AttemptSockets, SendSockets
from peerd.clients.endpoints import numeric
from peerd.errors import NoAnswerError, SettingsError

if TYPE_CHECKING:
    from peerd.registry import PeerRecord

log = logging.getLogger(__name__)

Target: TypeAlias = "str | tuple[str, int] | PeerRecord"

DEFAULT_VERSION = "1.0"
MAX_DATAGRAM_BYTES = 65507
RECEIVE_BYTES = 1 << 16

NEXT_STEP = "see that the address is right and can be reached from here"
NEXT_STEPS = {
    errno.ECONNREFUSED: "no process listens there, 'peerd nodes' lists the peers",
    errno.EMFILE: "make fewer requests at a time, or raise the limit (ulimit -n)",
}


class KnownPeers(Protocol):
    """A registry's cache, or any object with these two methods."""

    def get(self, peer_id: str, /) -> PeerRecord | None:
        """None for a peer id that is not known."""

    def nodes(self, *, partition_key: str | None = None) -> Sequence[PeerRecord]:
        """All known peers, or those with a partition key."""
        ...


class ClientBase:
    def __init__(self, peers: KnownPeers | None = None, *, source: str | None = None) -> None:
        """Without ``peers`` targets are addresses, and ``broadcast`` is refused.

        ``source``: a numeric address of this host that all datagrams leave from; None leaves the
        choice to the kernel. Raises SettingsError when it is not a numeric address.
        """
        self._peers = peers
        endpoint = None if source is None else numeric(Address(source, 0))
        if source is not None and endpoint is None:
            raise SettingsError(f"source {source!r}: give a numeric address of this host")
        self._attempt_sockets = AttemptSockets(endpoint)
        self._send_sockets = SendSockets(endpoint)

    def locate(self, target: Target) -> Address:
        """The target's current address. A host name is not resolved.

        A string is a peer id first: the registered record wins even if the id reads as an address,
        as the default peer id does. Otherwise it is ``host:port``, with an IPv6 address in brackets.

        Raises SettingsError for a target that can be neither, NoAnswerError for an unknown peer id,
        and whatever ``peers`` raises.
        """
        match target:
            case str():
                record = self._peers.get(target) if self._peers is not None else None
                return self._parse(target) if record is None else Address(record.url, record.port)
            case (str(host), int(port)) if host and 1 <= port <= 65535:
                return Address(host, port)
            case tuple():
                how = "write (host, port), a port from 1 to 65535"
                raise SettingsError(f"target {target!r}: {how}")
        return Address(target.url, target.port)

    def _parse(self, target: str) -> Address:
        address = address_of(target)
        if address is not None:
            return address
        if self._peers is None:
            raise SettingsError(
                f"target {target!r} is no host:port: write one, or make the client with a registry's"
                " cache, which finds peers by their id"
            )
        raise NoAnswerError(f"no peer has the id {target!r}: 'peerd nodes' lists the peers")

    def _recipients(self, partition_key: str | None) -> Sequence[PeerRecord]:
        if self._peers is None:
            how = "make the client with a registry's cache, which knows them"
            raise SettingsError(f"no peers to broadcast to: {how}")
        return self._peers.nodes(partition_key=partition_key)

    def _encode(self, magic: str, version: str, body: bytes) -> bytes:
        self._send_sockets.check_open()
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


@contextlib.contextmanager
def failures_named(
    target: Target, address: Address, timeout_s: float | None = None
) -> Iterator[None]:
    """Translate an OSError of the block to a NoAnswerError with target, cause and next step."""
    try:
        yield
    except OSError as error:
        given = target if isinstance(target, str) else getattr(target, "peer_id", str(address))
        named = given if given == str(address) else f"{given} at {address}"
        raise NoAnswerError(f"no answer from {named}: {_cause(error, timeout_s)}") from None


@contextlib.contextmanager
def unreachable_skipped() -> Iterator[None]:
    """For a broadcast: log that a peer cannot be sent to."""
    try:
        yield
    except NoAnswerError as error:
        log.debug("broadcast: %s", error)


def _cause(error: OSError, timeout_s: float | None) -> str:
    if isinstance(error, TimeoutError) and timeout_s is not None:
        return (
            f"nothing within {timeout_s:g} s; allow more time or more tries, "
            "and see that the peer has a handler that replies"
        )
    return f"{error.strerror or error}; {NEXT_STEPS.get(error.errno or 0, NEXT_STEP)}"
