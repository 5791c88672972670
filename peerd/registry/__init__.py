"""The peers in etcd, for any program. Needs no supervisor.

    from peerd.registry import PeerRecord, Registry

    with Registry("http://localhost:23790", prefix="peerd") as registry:
        registry.nodes()
        with registry.register(PeerRecord(url="localhost", port=5001, peer_id="seedId")):
            ...

    peerd.registry.nodes()   # one listing, with PEERD_ETCD, PEERD_PREFIX or the defaults

Everything except the errors is imported at first use: gRPC takes a quarter of a second to import, and a
process that has imported it should not fork.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from peerd.errors import (
    InvalidRecordError,
    PeerConflictError,
    RegistryAuthError,
    RegistryError,
    RegistryUnavailableError,
)

if TYPE_CHECKING:
    from peerd.registry.cache import Cache
    from peerd.registry.records import PeerRecord
    from peerd.registry.registry import Listing, Registration, Registry, nodes
    from peerd.registry.session import SessionState
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
    home = "records" if name == "PeerRecord" else "registry"
    module = importlib.import_module(f"peerd.registry.{home}")
    globals()[name] = value = getattr(module, name)  # for the next look-up
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
