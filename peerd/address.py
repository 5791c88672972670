"""Hosts and ports, as users write them, and the endpoints of etcd."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

from peerd.errors import SettingsError

MAX_PORT = 65535


class Address(NamedTuple):
    host: str
    """A name or an address; IPv6 without brackets."""

    port: int

    @classmethod
    def of_etcd(cls, url: str) -> Address:
        """From one ``http://host:port``. Raises SettingsError that says what to write."""
        endpoints = EtcdEndpoints.of(url)
        if endpoints.tls or len(endpoints.members) > 1:
            raise _wrong(url, "write one http://host:port")
        return endpoints.members[0]

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class EtcdEndpoints(NamedTuple):
    """The members of one etcd cluster."""

    members: tuple[Address, ...]
    tls: bool

    @classmethod
    def of(cls, urls: str) -> EtcdEndpoints:
        """From ``http://host:port``, or several of them with commas between; ``https`` for TLS.

        Raises SettingsError for anything else; its text says what to write.
        """
        schemes, members = zip(*map(_scheme_and_address, urls.split(",")), strict=True)
        if len(set(schemes)) > 1:
            raise _wrong(urls, "use TLS for all members (https) or for none (http)")
        if len(set(members)) < len(members):
            raise _wrong(urls, "name each member once")
        return cls(members, tls=schemes[0] == "https")

    def url(self, member: Address) -> str:
        return f"{'https' if self.tls else 'http'}://{member}"


def address_of(text: str) -> Address | None:
    """From ``host:port`` or ``[IPv6]:port``; None for anything else, such as a peer id.

    Raises SettingsError for a port out of range.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal()):
        return None
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    if not host:
        return None
    # int() raises ValueError for thousands of digits.
    if len(port) > 5 or not 1 <= int(port) <= MAX_PORT:
        raise SettingsError(f"{text!r}: a port is a number from 1 to {MAX_PORT}")
    return Address(host, int(port))


def _scheme_and_address(url: str) -> tuple[str, Address]:
    url = url.strip()
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _wrong(url, f"{error}: write http://host:port") from None
    if parts.scheme not in ("http", "https"):
        raise _wrong(url, "write http://host:port, such as http://localhost:23790")
    if parts.username is not None:
        raise _wrong(
            url.replace(parts.netloc, "..."),
            "do not put a user or password into the URL: use --etcd-user",
        )
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise _wrong(url, "nothing may follow the port: write http://host:port")
    if not host or not port:
        raise _wrong(url, "name the host and the port: http://host:port")
    return parts.scheme, Address(host, port)


def _wrong(url: str, why: str) -> SettingsError:
    return SettingsError(f"etcd endpoint {url!r}: {why}", "etcd")
