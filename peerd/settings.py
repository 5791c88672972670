"""What can be set, checked once when it is built: a wrong value cannot be carried around.

The command line reads flags, ``PEERD_*`` environment variables and ``peerd.toml`` (in that order of
precedence) into these dataclasses; everything below the command line takes them, or the few fields
it needs, as arguments.
"""

from __future__ import annotations

import enum
import math
import socket
from dataclasses import dataclass, field
from pathlib import Path

from peerd.address import MAX_PORT, Address, EtcdEndpoints
from peerd.errors import SettingsError

DEFAULT_ENDPOINT = "http://localhost:23790"
"""The client port that the quick start and docker-compose.yml publish."""

DEFAULT_PREFIX = "peerd"
MAX_PEERS = 4096
MAX_PREFIX_BYTES = 255
MAX_LINGER_US = 10_000
MAX_RECV_BUFFER_BYTES = 1 << 30
LINGER_US_PER_PEER = 50
MAX_DEFAULT_LINGER_US = 400
MIN_AGE_S = 1
MIN_RSS_BYTES = 48 * 1024 * 1024
MIN_LEASE_TTL_S = 2
MAX_LEASE_TTL_S = 24 * 3600

WILDCARDS = ("0.0.0.0", "::")
"""Every address of the machine; as an address to send to, none."""


@dataclass(frozen=True, kw_only=True)
class EtcdAccess:
    """What etcd asks of its clients. Raises SettingsError for half of a pair and a missing file."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)

    ca_file: Path | None = None
    """PEM, who signed etcd's certificate. None: whom this machine trusts."""

    cert_file: Path | None = None
    """PEM, the certificate that etcd wants to see (``--client-cert-auth``), and its key."""

    key_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.user is None) != (self.password is None):
            raise SettingsError(
                "a user of etcd and a password go together: --etcd-user, and --etcd-password-file or "
                "PEERD_ETCD_PASSWORD",
                "etcd-user",
                "etcd-password-file",
            )
        if (self.cert_file is None) != (self.key_file is None):
            raise SettingsError(
                "a certificate and its key go together: --etcd-cert, --etcd-key",
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
    endpoint: str = DEFAULT_ENDPOINT
    """The etcd to register in: ``http://host:port``, or the members of a cluster with commas between;
    ``https`` for TLS."""

    access: EtcdAccess = ANONYMOUS

    prefix: str = DEFAULT_PREFIX
    """Keys are ``{prefix}/{peer_id}``."""

    lease_ttl_s: int = 10
    """How long a record outlives a host that died without a word. Longer means fewer keep-alives."""

    def __post_init__(self) -> None:
        if not EtcdEndpoints.of(self.endpoint).tls and (
            self.access.ca_file or self.access.cert_file
        ):
            raise SettingsError(
                f"certificates are for https, and etcd's endpoint is {self.endpoint}",
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
                f"{MAX_LEASE_TTL_S} (a dead peer stays listed for as long)",
                "ttl",
            )


@dataclass(frozen=True, kw_only=True)
class DatagramSettings:
    offload: bool = True
    """Let the kernel join datagrams of one size in both directions (UDP_GRO, UDP_SEGMENT)."""

    linger_us: int = 0
    """For how long a loop waits for its queue to refill after a short batch, where that pays.

    It saves CPU time where many peers share few cores, and is at most added to a round trip.
    ``default_linger_us`` says what suits how many.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.linger_us <= MAX_LINGER_US:
            raise SettingsError(
                f"--linger {self.linger_us}: give microseconds from 0 to {MAX_LINGER_US}", "linger"
            )


def _is_host(name: str) -> bool:
    """A rough look, which finds what was meant as something else; resolving it is the real test."""
    return 0 < len(name) <= 247 and name.isprintable() and not set(" /@[]") & set(name)


def default_linger_us(peers: int, cpus: int) -> int:
    """None for peers that have a core each, and more the more of them share one.

    Measured with 8 peers on one core, datagrams interleaved, at 200,000 a second: 4.8 us of CPU time
    a datagram without, 1.6 with 100 us, 1.2 with 200 us, 1.0 with 400 us, no less with more; one
    uvloop process for all 8 took 2.3. A round trip through a busy peer takes up to the linger longer.
    """
    if peers <= cpus:
        return 0
    return min(LINGER_US_PER_PEER * peers // cpus, MAX_DEFAULT_LINGER_US)


class OnCrashloop(enum.Enum):
    """What happens when a worker has died too often (restart.py has the policy)."""

    RETRY = "retry"
    """It is parked and tried again once a minute; the others go on."""

    EXIT = "exit"
    """The supervisor stops in order, and exits with 70."""


@dataclass(frozen=True, kw_only=True)
class SupervisorSettings:
    peers: int = 1
    """How many workers; worker i serves UDP port ``base_port + i``."""

    base_port: int = 5001

    host: str = "localhost"
    """The address to bind. Loopback unless asked otherwise: peers answer whoever reaches them."""

    advertise: str | None = None
    """The host name that records carry; None: ``host``, or this machine's name for a wildcard."""

    app: str | None = None
    """``module:attr`` of the App; None: the built-in one."""

    partition_key: str | None = None
    """What the records carry as PartitionKey."""

    registry: RegistrySettings = RegistrySettings()

    datagrams: DatagramSettings = DatagramSettings()

    recv_buffer_bytes: int = 4 * 1024 * 1024
    """The kernel's receive buffer of each peer, which bridges a restart: at 20,000 datagrams a
    second, the default of 208 KiB lost a tenth of them over a restart and 4 MiB none."""

    drain_timeout_s: float = 5.0
    """For how long a stopping worker serves what its socket's queue still holds: it, and two seconds for
    the records to be revoked, should end before ``stop_timeout_s``."""

    stop_timeout_s: float = 8.0
    """The hard end of a stop, below the 10 s after which container runtimes kill."""

    liveness_timeout_s: float = 5.0
    """A worker whose loop has not turned for so long loses its record until it turns again."""

    stuck_timeout_s: float = 30.0
    """A worker that could have turned for so long, and has not, is killed and replaced."""

    boot_timeout_s: float = 60.0
    """For how long a worker may load its app."""

    on_crashloop: OnCrashloop = OnCrashloop.RETRY

    pin: bool = False
    """Give each worker one of the CPUs that this process may use, in turn (sched_setaffinity(2))."""

    max_age_s: float | None = None
    """A worker that has been ready for so long is replaced, losing nothing; None: never."""

    max_rss_bytes: int | None = None
    """A worker whose resident memory is above this is replaced, losing nothing; None: never."""

    metrics: Address | None = None
    """Where the supervisor serves Prometheus text and health checks, over HTTP; None: nowhere."""

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
            if name is not None and not _is_host(name):
                raise SettingsError(
                    f"--{flag} {name!r}: give a host name or an address, without scheme and port",
                    flag,
                )
        if not 0 < self.recv_buffer_bytes <= MAX_RECV_BUFFER_BYTES:
            raise SettingsError(
                f"--recv-buffer {self.recv_buffer_bytes}: give 1 to {MAX_RECV_BUFFER_BYTES} bytes",
                "recv-buffer",
            )
        for name in (
            "drain_timeout_s",
            "stop_timeout_s",
            "liveness_timeout_s",
            "stuck_timeout_s",
            "boot_timeout_s",
        ):
            if not 0 < getattr(self, name) < math.inf:
                flag = name.removesuffix("_s").replace("_", "-")
                raise SettingsError(f"--{flag} {getattr(self, name)}: give seconds above 0", flag)
        if self.max_age_s is not None and not MIN_AGE_S <= self.max_age_s < math.inf:
            raise SettingsError(
                f"--max-age {self.max_age_s}: give {MIN_AGE_S} seconds or more", "max-age"
            )
        if self.max_rss_bytes is not None and self.max_rss_bytes < MIN_RSS_BYTES:
            raise SettingsError(
                f"--max-rss {self.max_rss_bytes}: give {MIN_RSS_BYTES} bytes or more; "
                "a worker that does nothing has half of that",
                "max-rss",
            )

    @property
    def last_port(self) -> int:
        return self.base_port + self.peers - 1

    @property
    def url(self) -> str:
        """The host that others are told."""
        if self.advertise is not None:
            return self.advertise
        return socket.gethostname() if self.host in WILDCARDS else self.host

    def peer_id(self, slot: int) -> str:
        return str(Address(self.url, self.base_port + slot))


@dataclass(frozen=True)
class EmbeddedEtcdSettings:
    """An etcd that the supervisor runs as its child."""

    command: tuple[str, ...]
    data_dir: Path
    """Made for this run, holds etcd's log as well, and removed at the end."""
