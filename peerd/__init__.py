"""UDP peers that stay up, are found through etcd and keep pace with the kernel.

Importing this package opens nothing and does not import gRPC. ``peerd.registry`` is the library for
programs that only look for peers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from peerd._envelope import Message, decode, encode
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("peerd._"):
        raise
    raise ImportError(
        f"{error.name} is not built: run 'make build' in {Path(__file__).parents[1]} and use "
        ".venv/bin/python there, or install peerd with 'pip install' into this Python",
        name=error.name,
    ) from None
from peerd.errors import (
    AppLoadError,
    BindError,
    ControlError,
    DecodeError,
    InvalidRecordError,
    NoAnswerError,
    NotRunningError,
    PeerConflictError,
    PeerdError,
    PortInUseError,
    RegistryAuthError,
    RegistryError,
    RegistryUnavailableError,
    SettingsError,
)
from peerd.serving.app import App

if TYPE_CHECKING:
    from peerd.address import Address
    from peerd.clients.asynchronous import AsyncPeerClient
    from peerd.clients.blocking import PeerClient
    from peerd.clients.client_base import KnownPeers
    from peerd.registry import Cache, PeerRecord, Registry
    from peerd.serving.in_process import Peer
    from peerd.settings import EtcdAccess

__version__ = "0.1.0"

__all__ = [
    "Address",
    "App",
    "AppLoadError",
    "AsyncPeerClient",
    "BindError",
    "Cache",
    "ControlError",
    "DecodeError",
    "EtcdAccess",
    "InvalidRecordError",
    "KnownPeers",
    "Message",
    "NoAnswerError",
    "NotRunningError",
    "Peer",
    "PeerClient",
    "PeerConflictError",
    "PeerRecord",
    "PeerdError",
    "PortInUseError",
    "Registry",
    "RegistryAuthError",
    "RegistryError",
    "RegistryUnavailableError",
    "SettingsError",
    "__version__",
    "decode",
    "encode",
]

_LAZY = {
    "Address": "peerd.address",
    "AsyncPeerClient": "peerd.clients.asynchronous",
    "Cache": "peerd.registry",
    "EtcdAccess": "peerd.settings",
    "KnownPeers": "peerd.clients.client_base",
    "Peer": "peerd.serving.in_process",
    "PeerClient": "peerd.clients.blocking",
    "PeerRecord": "peerd.registry",
    "Registry": "peerd.registry",
}
"""The module of each name that is imported at its first use: Peer imports psutil, AsyncPeerClient asyncio,
Registry gRPC, and a program that defines an App needs none of them."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _LAZY:
            return getattr(importlib.import_module(_LAZY[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
