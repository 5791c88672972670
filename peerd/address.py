"""A host and a port, as people write them and as URLs do."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

from peerd.errors import SettingsError


class Address(NamedTuple):
    host: str
    """A name or an address; an IPv6 one without its brackets."""

    port: int

    @classmethod
    def of_etcd(cls, url: str) -> Address:
        """Of ``http://host:port``. Raises SettingsError for anything else, saying what to write."""
        if "," in url:
            raise _wrong(url, "peerd talks to one endpoint for now: name a single http://host:port")
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme, parts.hostname, parts.port
        except ValueError as error:
            raise _wrong(url, f"{error}: write http://host:port") from None
        if scheme == "https":
            raise _wrong(url, "peerd does not speak TLS to etcd yet: use http://host:port")
        if scheme != "http":
            raise _wrong(url, "write http://host:port, such as http://localhost:23790")
        if parts.username is not None:
            raise _wrong(url.replace(parts.netloc, "..."), "no user or password goes into the URL")
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise _wrong(url, "nothing may follow the port: write http://host:port")
        if not host or not port:
            raise _wrong(url, "name the host and the port: http://host:port")
        return cls(host, port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _wrong(url: str, why: str) -> SettingsError:
    return SettingsError(f"etcd endpoint {url!r}: {why}")
