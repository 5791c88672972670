"""UDP peers that stay up, are found through etcd and keep pace with the kernel.

Importing this opens nothing and imports no gRPC. ``peerd.registry`` is the library for programs
that only want to find peers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from peerd._core import Message, decode, encode
from peerd.app import App
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

if TYPE_CHECKING:
    from peerd.async_client import AsyncPeerClient
    from peerd.client import PeerClient
    from peerd.peer import Peer

__version__ = "0.1.0"

__all__ = [
    "App",
    "AppLoadError",
    "AsyncPeerClient",
    "BindError",
    "ControlError",
    "DecodeError",
    "InvalidRecordError",
    "Message",
    "NoAnswerError",
    "NotRunningError",
    "Peer",
    "PeerClient",
    "PeerConflictError",
    "PeerdError",
    "PortInUseError",
    "RegistryAuthError",
    "RegistryError",
    "RegistryUnavailableError",
    "SettingsError",
    "__version__",
    "decode",
    "encode",
]

# Loaded at their first use: Peer brings psutil and the rest of a running peer along, AsyncPeerClient
# brings asyncio, and an App has no use for either.
_LAZY = {
    "AsyncPeerClient": "peerd.async_client",
    "Peer": "peerd.peer",
    "PeerClient": "peerd.client",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _LAZY:
            return getattr(importlib.import_module(_LAZY[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
