"""Host names resolved to socket addresses, IPv4 first, as the supervisor binds "localhost"."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

from peerd.address import Address


class Endpoint(NamedTuple):
    """A numeric address that a socket can send to."""

    family: int
    sockaddr: tuple[Any, ...]

    @property
    def address(self) -> Address:
        return Address(self.sockaddr[0], self.sockaddr[1])


def resolve(address: Address) -> Endpoint:
    """Ask the DNS if necessary, which blocks. Raises OSError for an unknown name."""
    return numeric(address) or preferred(socket.getaddrinfo(*address, type=socket.SOCK_DGRAM))


def numeric(address: Address) -> Endpoint | None:
    """The endpoint of a numeric address; None for a host name. Never asks the DNS.

    Raises OSError for a string that cannot be a host name either.
    """
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    except UnicodeError:
        raise OSError(errno.EINVAL, "this cannot be a host name") from None
    except OSError:
        return None
    return preferred(found)


def preferred(found: Sequence[tuple[Any, ...]]) -> Endpoint:
    """The first IPv4 entry of a getaddrinfo result, or else its first entry."""
    family, _, _, _, sockaddr = min(found, key=lambda entry: bool(entry[0] != socket.AF_INET))
    return Endpoint(family, sockaddr)
