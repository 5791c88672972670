"""Who is there: peers in etcd, for any program. Needs no supervisor.

    from peerd.registry import PeerRecord, Registry

    with Registry("http://localhost:23790", prefix="peerd") as registry:
        registry.nodes()
        with registry.register(PeerRecord(url="localhost", port=5001, peer_id="seedId")):
            ...

    peerd.registry.nodes()   # the same reading, with PEERD_ETCD, PEERD_PREFIX or the defaults

What talks to etcd is loaded at its first use: gRPC takes a quarter of a second, and a process that
has it loaded had better not fork, while records and errors are needed everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peerd.errors import (
    InvalidRecordError,
    PeerConflictError,
    RegistryAuthError,
    RegistryError,
    RegistryUnavailableError,
)
from peerd.registry.records import PeerRecord

if TYPE_CHECKING:
    from peerd.registry.cache import Cache
    from peerd.registry.registry import Listing, Registry, nodes
    from peerd.registry.session import Registration, SessionState
    from peerd.registry.watch import Joined, Left, Updated, Watch
    from peerd.settings import EtcdAccess

__all__ = [
    "Cache",
    "EtcdAccess",
    "InvalidRecordError",
    "Joined",
    "Left",
    "Listing",
    "PeerConflictError",
    "PeerRecord",
    "Registration",
    "Registry",
    "RegistryAuthError",
    "RegistryError",
    "RegistryUnavailableError",
    "SessionState",
    "Updated",
    "Watch",
    "nodes",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from peerd.registry import registry

    globals()[name] = value = getattr(registry, name)  # so that this is asked once only
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
