"""UDP peers that stay up, are found through etcd and keep pace with the kernel.

Importing this opens nothing and imports no gRPC. ``peerd.registry`` is the library for programs
that only want to find peers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from peerd._envelope import Message, decode, encode
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
    from peerd.clients.asynchronous import AsyncPeerClient
    from peerd.clients.blocking import PeerClient
    from peerd.serving.in_process import Peer

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
    "AsyncPeerClient": "peerd.clients.asynchronous",
    "Peer": "peerd.serving.in_process",
    "PeerClient": "peerd.clients.blocking",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _LAZY:
            return getattr(importlib.import_module(_LAZY[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
