"""All settings, validated when they are constructed.

The command line fills these dataclasses from flags, ``PEERD_*`` environment variables and
``peerd.toml``, in this order of precedence. A field that users can set carries a ``Flag``, from which
the command line generates the option, its help and the key in the file.
"""

from __future__ import annotations

import enum
import math
import socket
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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


class Flag(NamedTuple):
    """How users set a field: with ``--NAME``, ``PEERD_NAME`` or ``NAME = ...`` in ``peerd.toml``."""

    name: str  # without dashes in front
    section: str  # the heading of --help that lists it
    help: str
    metavar: str | None
    reads: type | None  # what the command line reads, where it is not the type of the field

    @property
    def parameter(self) -> str:
        return self.name.replace("-", "_")


FLAG = "flag"
"""The key of a field's metadata whose value is its Flag."""


def setting(
    section: str,
    name: str,
    help: str,
    default: Any = None,
    *,
    reads: type | None = None,
    repr: bool = True,
) -> Any:
    """A dataclass field that users can set. ``name``: of the flag, and the metavar, if it needs one."""
    name, _, metavar = name.partition(" ")
    metadata = {FLAG: Flag(name, section, help, metavar or None, reads)}
    return field(default=default, repr=repr, metadata=metadata)


_peers = partial(setting, "Peers")
_registry = partial(setting, "Registry")
_datagrams = partial(setting, "Datagrams")
_workers = partial(setting, "Workers")


def _check(holds: bool, flag: str, value: object, advice: str) -> None:
    if not holds:
        raise SettingsError(f"--{flag} {value}: give {advice}", flag)


@dataclass(frozen=True, kw_only=True)
class EtcdAccess:
    """Credentials for etcd. Raises SettingsError for half of a pair and for a file that is missing."""

    user: str | None = _registry("etcd-user", "Log in to etcd as this user.")
    password: str | None = _registry(
        "etcd-password-file FILE",
        "File whose first line is the password of --etcd-user. Without it: the environment variable "
        "PEERD_ETCD_PASSWORD.",
        reads=Path,
        repr=False,
    )
    ca_file: Path | None = _registry(
        "etcd-ca FILE",
        "Certificate (PEM) of the authority that signed the certificate of an https etcd. Without it: "
        "the authorities that this machine trusts.",
    )
    cert_file: Path | None = _registry(
        "etcd-cert FILE", "Client certificate (PEM), for an etcd that asks for one."
    )
    key_file: Path | None = _registry("etcd-key FILE", "Private key (PEM) of --etcd-cert.")

    def __post_init__(self) -> None:
        if (self.user is None) != (self.password is None):
            flags = "--etcd-user, and --etcd-password-file or PEERD_ETCD_PASSWORD"
            text = f"etcd needs a user and a password together: {flags}"
            raise SettingsError(text, "etcd-user", "etcd-password-file")
        if (self.cert_file is None) != (self.key_file is None):
            text = "etcd needs a client certificate and its key together: --etcd-cert, --etcd-key"
            raise SettingsError(text, "etcd-cert", "etcd-key")
        files = {"etcd-ca": self.ca_file, "etcd-cert": self.cert_file, "etcd-key": self.key_file}
        for flag, file in files.items():
            try:
                if file is not None:
                    file.read_bytes()
            except OSError as error:
                raise SettingsError(f"--{flag} {file}: {error.strerror}", flag) from None


ANONYMOUS = EtcdAccess()


@dataclass(frozen=True, kw_only=True)
class RegistrySettings:
    endpoint: str = _registry(
        "etcd URL[,URL...]",
        "The etcd to register in: URLs of its members, https for TLS. If it is not given and nothing "
        "listens at the default, peerd starts an etcd there, with throw-away data.",
        DEFAULT_ENDPOINT,
    )
    prefix: str = _registry(
        "prefix",
        "Records are stored as PREFIX/peer-id; 'eventmesh' is FaasNet's prefix.",
        DEFAULT_PREFIX,
    )
    lease_ttl_s: int = _registry(
        "ttl",
        "Lease of the records, in seconds: how long a record outlives a host that went down.",
        10,
    )
    access: EtcdAccess = ANONYMOUS

    def __post_init__(self) -> None:
        has_tls = EtcdEndpoints.of(self.endpoint).tls
        if not has_tls and (self.access.ca_file or self.access.cert_file):
            text = f"certificates need an https endpoint, but --etcd is {self.endpoint}"
            raise SettingsError(text, "etcd", "etcd-ca", "etcd-cert")
        size = len(self.prefix.encode(errors="replace"))
        is_prefix = self.prefix.isprintable() and 1 <= size <= MAX_PREFIX_BYTES
        if not is_prefix or self.prefix.endswith("/"):
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
    offload: bool = _datagrams(
        "offload",
        "Let the kernel join datagrams of one size in both directions (UDP_GRO, UDP_SEGMENT).",
        True,
    )
    linger_us: int = _datagrams(
        "linger MICROSECONDS",
        "After a short batch, wait up to this long for more datagrams, if waiting saves CPU time; adds "
        "at most this to a round trip. 0 never waits.  [default: 0 if each peer has a core of its own, "
        "else 50 per peer on a core, at most 400]",
        0,
    )
    max_reply_rate: int = _datagrams(
        "max-reply-rate",
        "Send at most this many replies per second to one source (address and port); it ends reply "
        "loops. The default concerns only sources below port 32768, where servers listen, and takes "
        "20 for a reply with the request's magic code. 0: no limit.",
        DEFAULT_MAX_REPLY_RATE,
    )

    def __post_init__(self) -> None:
        rate, advice = self.max_reply_rate, f"at most {MAX_REPLY_RATE}; 0 for no limit"
        _check(0 <= rate <= MAX_REPLY_RATE, "max-reply-rate", rate, f"replies per second, {advice}")
        advice = f"microseconds from 0 to {MAX_LINGER_US}"
        _check(0 <= self.linger_us <= MAX_LINGER_US, "linger", self.linger_us, advice)


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
    peers: int = _peers("peers", "Number of peers, each in a worker process.", 1)
    base_port: int = _peers(
        "base-port", "UDP port of the first peer; peer i serves port BASE-PORT + i.", 5001
    )
    host: str = _peers("host", "Address to bind; 0.0.0.0 for all addresses.", "localhost")
    advertise: str | None = _peers(
        "advertise HOST",
        "Host name to put into the records. Without it: --host, or this machine's name if --host is a "
        "wildcard.",
    )
    app: str | None = _peers(
        "app MODULE:ATTR",
        "The peerd.App to serve. Without it: a built-in app that answers PING and ECHO.",
    )
    registry: RegistrySettings = RegistrySettings()
    partition_key: str | None = _registry("partition-key KEY", "PartitionKey of the records.")
    datagrams: DatagramSettings = DatagramSettings()

    recv_buffer_bytes: int = _datagrams(
        "recv-buffer",
        "Kernel receive buffer of each peer, in bytes or like 4M. It bridges restarts.",
        4 * 1024 * 1024,
    )
    """At 20,000 datagrams per second, the kernel's default of 208 KiB lost a tenth of them during a
    restart, and 4 MiB lost none."""

    pin: Literal["auto", "none"] = _workers(
        "pin",
        "auto: bind each worker to one of the CPUs that this process may use, in turn.",
        "none",
    )
    boot_timeout_s: float = _workers(
        "boot-timeout", "A worker that has not loaded the app after this time is killed.", 60.0
    )
    liveness_timeout_s: float = 5.0
    """A worker whose event loop is blocked for this long loses its record until the loop runs again."""

    stuck_timeout_s: float = _workers(
        "stuck-timeout",
        "A worker whose loop had this much CPU time without completing an iteration is killed and "
        "replaced.",
        30.0,
    )
    drain_timeout_s: float = _workers(
        "drain-timeout",
        "A stopping worker serves what its queue still holds for at most this time.",
        5.0,
    )
    """It must leave room within ``stop_timeout_s`` for revoking the records, two seconds at most."""

    stop_timeout_s: float = _workers(
        "stop-timeout",
        "Processes that are still running this long after a stop began are killed.",
        8.0,
    )
    """Below the 10 s after which container runtimes kill."""

    on_crashloop: OnCrashloop = _workers(
        "on-crashloop",
        "What to do when a worker dies too often: retry it every minute, or stop all peers and exit "
        "with 70.",
        OnCrashloop.RETRY,
    )
    max_age_s: float | None = _workers(
        "max-age SECONDS",
        "Replace a worker that has been ready for this long (1 s or more), without losing datagrams.",
    )
    max_rss_bytes: int | None = _workers(
        "max-rss SIZE",
        "Replace a worker whose resident memory exceeds this (bytes, or like 256M or 1G), without losing "
        "datagrams.",
    )
    metrics: Address | None = setting(
        "Operation",
        "metrics HOST:PORT",
        "Serve /metrics (Prometheus text), /healthz/live and /healthz/ready over HTTP at this address, "
        "without authentication.",
    )

    def __post_init__(self) -> None:
        number, port = f"a number from 1 to {MAX_PEERS}", f"a port from 1 to {MAX_PORT}"
        _check(1 <= self.peers <= MAX_PEERS, "peers", self.peers, number)
        _check(1 <= self.base_port <= MAX_PORT, "base-port", self.base_port, port)
        if self.last_port > MAX_PORT:
            raise SettingsError(
                f"--base-port {self.base_port} with {self.peers} peers ends at {self.last_port}, "
                f"past {MAX_PORT}: use --base-port {MAX_PORT - self.peers + 1} or lower, or fewer peers",
                "base-port",
                "peers",
            )
        for flag, name in (("host", self.host), ("advertise", self.advertise)):
            advice = "a host name or an address, without scheme and port"
            _check(name is None or _looks_like_host(name), flag, repr(name), advice)
        size, advice = self.recv_buffer_bytes, f"1 to {MAX_RECV_BUFFER_BYTES} bytes"
        _check(0 < size <= MAX_RECV_BUFFER_BYTES, "recv-buffer", size, advice)
        for timeout in fields(self):
            if timeout.name.endswith("_timeout_s"):
                flag, seconds = timeout.name.removesuffix("_s"), getattr(self, timeout.name)
                _check(0 < seconds < math.inf, flag.replace("_", "-"), seconds, "seconds above 0")
        if (age_s := self.max_age_s) is not None:
            _check(MIN_AGE_S <= age_s < math.inf, "max-age", age_s, f"{MIN_AGE_S} seconds or more")
        if (rss := self.max_rss_bytes) is not None:
            half = "a worker that does nothing uses half of that"
            _check(rss >= MIN_RSS_BYTES, "max-rss", rss, f"{MIN_RSS_BYTES} bytes or more; {half}")

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


@dataclass(frozen=True)
class EmbeddedEtcdSettings:
    """An etcd that the supervisor runs as its child."""

    command: tuple[str, ...]
    data_dir: Path
    """Created for this run, also holds etcd's log, and removed at the end."""
