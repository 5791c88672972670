"""All settings, validated when they are constructed.

The command line fills these dataclasses from flags, ``PEERD_*`` environment variables and
``peerd.toml``, in this order of precedence. A field that users can set carries a ``Flag``, from which
the command line generates the option, its help and the key in the file.
"""

from __future__ import annotations

import enum
import math
import socket
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peerd.address import MAX_PORT, Address, EtcdEndpoints
from peerd.errors import SettingsError

DEFAULT_ENDPOINT = "http://localhost:23790"
"""The client port that the quick start and docker-compose.yml publish."""

DEFAULT_PREFIX = "peerd"
MAX_PEERS = 4096
MAX_PREFIX_BYTES = 255
MAX_LINGER_US = 10_000
DEFAULT_MAX_REPLY_RATE = 20_000
MAX_REPLY_RATE = 1_000_000_000
MAX_RECV_BUFFER_BYTES = 1 << 30
LINGER_US_PER_PEER = 50
MAX_DEFAULT_LINGER_US = 400
MIN_AGE_S = 1
MIN_RSS_BYTES = 48 * 1024 * 1024
MIN_LEASE_TTL_S = 2
MAX_LEASE_TTL_S = 24 * 3600

WILDCARDS = ("0.0.0.0", "::")
"""Addresses to bind that mean every address of this machine. Nothing can be sent to them."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How users set a field: with ``--NAME``, ``PEERD_NAME`` or ``NAME = ...`` in ``peerd.toml``."""

    name: str
    """Without dashes in front."""

    section: str
    """The heading of ``--help`` that lists it."""

    help: str
    metavar: str | None = None

    reads: type | None = None
    """The type that the command line reads, where it is not the type of the field."""


FLAG = "flag"
"""The key of a field's metadata whose value is its Flag."""


def setting(
    default: Any,
    name: str,
    section: str,
    help: str,
    *,
    metavar: str | None = None,
    reads: type | None = None,
    repr: bool = True,
) -> Any:
    """A dataclass field that users can set."""
    flag = Flag(name=name, section=section, help=help, metavar=metavar, reads=reads)
    return field(default=default, repr=repr, metadata={FLAG: flag})


@dataclass(frozen=True, kw_only=True)
class EtcdAccess:
    """Credentials for etcd. Raises SettingsError for half of a pair and for a file that is missing."""

    user: str | None = setting(None, "etcd-user", "Registry", "Log in to etcd as this user.")
    password: str | None = setting(
        None,
        "etcd-password-file",
        "Registry",
        "File whose first line is the password of --etcd-user. Without it: the environment variable "
        "PEERD_ETCD_PASSWORD.",
        metavar="FILE",
        reads=Path,
        repr=False,
    )
    ca_file: Path | None = setting(
        None,
        "etcd-ca",
        "Registry",
        "Certificate (PEM) of the authority that signed the certificate of an https etcd. Without it: "
        "the authorities that this machine trusts.",
        metavar="FILE",
    )
    cert_file: Path | None = setting(
        None,
        "etcd-cert",
        "Registry",
        "Client certificate (PEM), for an etcd that asks for one.",
        metavar="FILE",
    )
    key_file: Path | None = setting(
        None, "etcd-key", "Registry", "Private key (PEM) of --etcd-cert.", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if (self.user is None) != (self.password is None):
            raise SettingsError(
                "etcd needs a user and a password together: --etcd-user, and --etcd-password-file or "
                "PEERD_ETCD_PASSWORD",
                "etcd-user",
                "etcd-password-file",
            )
        if (self.cert_file is None) != (self.key_file is None):
            raise SettingsError(
                "etcd needs a client certificate and its key together: --etcd-cert, --etcd-key",
                "etcd-cert",
                "etcd-key",
            )
        for flag, file in (
            ("etcd-ca", self.ca_file),
            ("etcd-cert", self.cert_file),
            ("etcd-key", self.key_file),
        ):
            if file is not None:
                try:
                    file.read_bytes()
                except OSError as error:
                    raise SettingsError(f"--{flag} {file}: {error.strerror}", flag) from None


ANONYMOUS = EtcdAccess()


@dataclass(frozen=True, kw_only=True)
class RegistrySettings:
    endpoint: str = setting(
        DEFAULT_ENDPOINT,
        "etcd",
        "Registry",
        "The etcd to register in: URLs of its members, https for TLS. If it is not given and nothing "
        "listens at the default, peerd starts an etcd there, with throw-away data.",
        metavar="URL[,URL...]",
    )
    prefix: str = setting(
        DEFAULT_PREFIX,
        "prefix",
        "Registry",
        "Records are stored as PREFIX/peer-id; 'eventmesh' is FaasNet's prefix.",
    )
    lease_ttl_s: int = setting(
        10,
        "ttl",
        "Registry",
        "Lease of the records, in seconds: how long a record outlives a host that went down.",
    )
    access: EtcdAccess = ANONYMOUS

    def __post_init__(self) -> None:
        if not EtcdEndpoints.of(self.endpoint).tls and (
            self.access.ca_file or self.access.cert_file
        ):
            raise SettingsError(
                f"certificates need an https endpoint, but --etcd is {self.endpoint}",
                "etcd",
                "etcd-ca",
                "etcd-cert",
            )
        if (
            not self.prefix.isprintable()
            or not 1 <= len(self.prefix.encode()) <= MAX_PREFIX_BYTES
            or self.prefix.endswith("/")
        ):
            raise SettingsError(
                f"prefix {self.prefix[:100]!r}: give printable text of 1 to {MAX_PREFIX_BYTES} bytes "
                "in UTF-8 that does not end with '/', such as 'peerd'",
                "prefix",
            )
        if not MIN_LEASE_TTL_S <= self.lease_ttl_s <= MAX_LEASE_TTL_S:
            raise SettingsError(
                f"lease TTL {self.lease_ttl_s} s: give {MIN_LEASE_TTL_S} (etcd grants 2 for 1) to "
                f"{MAX_LEASE_TTL_S} (a dead peer stays listed for the whole TTL)",
                "ttl",
            )


@dataclass(frozen=True, kw_only=True)
class DatagramSettings:
    offload: bool = setting(
        True,
        "offload",
        "Datagrams",
        "Let the kernel join datagrams of one size in both directions (UDP_GRO, UDP_SEGMENT).",
    )
    linger_us: int = setting(
        0,
        "linger",
        "Datagrams",
        "After a short batch, wait up to this long for more datagrams, if waiting saves CPU time; adds "
        "at most this to a round trip. 0 never waits.  [default: 0 if each peer has a core of its own, "
        "else 50 per peer on a core, at most 400]",
        metavar="MICROSECONDS",
    )
    max_reply_rate: int = setting(
        DEFAULT_MAX_REPLY_RATE,
        "max-reply-rate",
        "Datagrams",
        "Send at most this many replies per second to one source (address and port); it ends reply "
        "loops. The default concerns only sources below port 32768, where servers listen, and takes "
        "20 for a reply with the request's magic code. 0: no limit.",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.max_reply_rate <= MAX_REPLY_RATE:
            raise SettingsError(
                f"--max-reply-rate {self.max_reply_rate}: give replies per second, at most "
                f"{MAX_REPLY_RATE}; 0 for no limit",
                "max-reply-rate",
            )
        if not 0 <= self.linger_us <= MAX_LINGER_US:
            raise SettingsError(
                f"--linger {self.linger_us}: give microseconds from 0 to {MAX_LINGER_US}", "linger"
            )


def default_linger_us(peers: int, cpus: int) -> int:
    """0 for peers that have a core each; otherwise the more, the more peers share a core.

    Measured with 8 peers on one core and interleaved datagrams, 200,000 per second: a datagram cost
    4.8 us of CPU time without lingering, 1.6 us with 100 us, 1.2 us with 200 us and 1.0 us with 400 us
    or more; one uvloop process for all 8 peers took 2.3 us.
    """
    if peers <= cpus:
        return 0
    return min(LINGER_US_PER_PEER * peers // cpus, MAX_DEFAULT_LINGER_US)


class OnCrashloop(enum.Enum):
    """What happens to a worker that dies too often (restart.py has the policy)."""

    RETRY = "retry"
    """The supervisor parks the peer and retries it every minute; the other peers are not affected."""

    EXIT = "exit"
    """The supervisor stops gracefully and exits with 70."""


@dataclass(frozen=True, kw_only=True)
class SupervisorSettings:
    peers: int = setting(1, "peers", "Peers", "Number of peers, each in a worker process.")
    base_port: int = setting(
        5001, "base-port", "Peers", "UDP port of the first peer; peer i serves port BASE-PORT + i."
    )
    host: str = setting("localhost", "host", "Peers", "Address to bind; 0.0.0.0 for all addresses.")
    advertise: str | None = setting(
        None,
        "advertise",
        "Peers",
        "Host name to put into the records. Without it: --host, or this machine's name if --host is a "
        "wildcard.",
        metavar="HOST",
    )
    app: str | None = setting(
        None,
        "app",
        "Peers",
        "The peerd.App to serve. Without it: a built-in app that answers PING and ECHO.",
        metavar="MODULE:ATTR",
    )
    registry: RegistrySettings = RegistrySettings()
    partition_key: str | None = setting(
        None, "partition-key", "Registry", "PartitionKey of the records.", metavar="KEY"
    )
    datagrams: DatagramSettings = DatagramSettings()

    recv_buffer_bytes: int = setting(
        4 * 1024 * 1024,
        "recv-buffer",
        "Datagrams",
        "Kernel receive buffer of each peer, in bytes or like 4M. It bridges restarts.",
    )
    """At 20,000 datagrams per second, the kernel's default of 208 KiB lost a tenth of them during a
    restart, and 4 MiB lost none."""

    pin: Literal["auto", "none"] = setting(
        "none",
        "pin",
        "Workers",
        "auto: bind each worker to one of the CPUs that this process may use, in turn.",
    )
    boot_timeout_s: float = setting(
        60.0,
        "boot-timeout",
        "Workers",
        "A worker that has not loaded the app after this time is killed.",
    )
    liveness_timeout_s: float = 5.0
    """A worker whose event loop is blocked for this long loses its record until the loop runs again."""

    stuck_timeout_s: float = setting(
        30.0,
        "stuck-timeout",
        "Workers",
        "A worker whose loop had this much CPU time without completing an iteration is killed and "
        "replaced.",
    )
    drain_timeout_s: float = setting(
        5.0,
        "drain-timeout",
        "Workers",
        "A stopping worker serves what its queue still holds for at most this time.",
    )
    """It must leave room within ``stop_timeout_s`` for revoking the records, two seconds at most."""

    stop_timeout_s: float = setting(
        8.0,
        "stop-timeout",
        "Workers",
        "Processes that are still running this long after a stop began are killed.",
    )
    """Below the 10 s after which container runtimes kill."""

    on_crashloop: OnCrashloop = setting(
        OnCrashloop.RETRY,
        "on-crashloop",
        "Workers",
        "What to do when a worker dies too often: retry it every minute, or stop all peers and exit "
        "with 70.",
    )
    max_age_s: float | None = setting(
        None,
        "max-age",
        "Workers",
        "Replace a worker that has been ready for this long (1 s or more), without losing datagrams.",
        metavar="SECONDS",
    )
    max_rss_bytes: int | None = setting(
        None,
        "max-rss",
        "Workers",
        "Replace a worker whose resident memory exceeds this (bytes, or like 256M or 1G), without losing "
        "datagrams.",
        metavar="SIZE",
    )
    metrics: Address | None = setting(
        None,
        "metrics",
        "Operation",
        "Serve /metrics (Prometheus text), /healthz/live and /healthz/ready over HTTP at this address, "
        "without authentication.",
        metavar="HOST:PORT",
    )

    def __post_init__(self) -> None:
        if not 1 <= self.peers <= MAX_PEERS:
            raise SettingsError(
                f"--peers {self.peers}: give a number from 1 to {MAX_PEERS}", "peers"
            )
        if not 1 <= self.base_port <= MAX_PORT:
            raise SettingsError(
                f"--base-port {self.base_port}: give a port from 1 to {MAX_PORT}", "base-port"
            )
        if self.last_port > MAX_PORT:
            raise SettingsError(
                f"--base-port {self.base_port} with {self.peers} peers ends at {self.last_port}, "
                f"past {MAX_PORT}: use --base-port {MAX_PORT - self.peers + 1} or lower, or fewer peers",
                "base-port",
                "peers",
            )
        for flag, name in (("host", self.host), ("advertise", self.advertise)):
            if name is not None and not _looks_like_host(name):
                raise SettingsError(
                    f"--{flag} {name!r}: give a host name or an address, without scheme and port",
                    flag,
                )
        if not 0 < self.recv_buffer_bytes <= MAX_RECV_BUFFER_BYTES:
            raise SettingsError(
                f"--recv-buffer {self.recv_buffer_bytes}: give 1 to {MAX_RECV_BUFFER_BYTES} bytes",
                "recv-buffer",
            )
        for timeout in fields(self):
            if timeout.name.endswith("_timeout_s"):
                _check_seconds(timeout, getattr(self, timeout.name))
        if self.max_age_s is not None and not MIN_AGE_S <= self.max_age_s < math.inf:
            raise SettingsError(
                f"--max-age {self.max_age_s}: give {MIN_AGE_S} seconds or more", "max-age"
            )
        if self.max_rss_bytes is not None and self.max_rss_bytes < MIN_RSS_BYTES:
            raise SettingsError(
                f"--max-rss {self.max_rss_bytes}: give {MIN_RSS_BYTES} bytes or more; "
                "a worker that does nothing uses half of that",
                "max-rss",
            )

    @property
    def last_port(self) -> int:
        return self.base_port + self.peers - 1

    @property
    def port_range(self) -> str:
        """For messages: "UDP ports 5001 to 5008"."""
        if self.peers == 1:
            return f"UDP port {self.base_port}"
        return f"UDP ports {self.base_port} to {self.last_port}"

    @property
    def advertised_host(self) -> str:
        """The host name in the records."""
        if self.advertise is not None:
            return self.advertise
        return socket.gethostname() if self.host in WILDCARDS else self.host

    def peer_id(self, slot: int) -> str:
        return str(Address(self.advertised_host, self.base_port + slot))


def _looks_like_host(name: str) -> bool:
    """Rejects URLs and host:port; whether the name resolves is found out when it is bound."""
    return 0 < len(name) <= 247 and name.isprintable() and not set(" /@[]") & set(name)


def _check_seconds(timeout: Field[Any], seconds: float) -> None:
    if not 0 < seconds < math.inf:
        flag = timeout.name.removesuffix("_s").replace("_", "-")
        raise SettingsError(f"--{flag} {seconds}: give seconds above 0", flag)


@dataclass(frozen=True)
class EmbeddedEtcdSettings:
    """An etcd that the supervisor runs as its child."""

    command: tuple[str, ...]
    data_dir: Path
    """Created for this run, also holds etcd's log, and removed at the end."""
