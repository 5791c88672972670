"""UDP peers that stay up, are found through etcd and keep pace with the kernel.

Importing this opens nothing and imports no gRPC. ``peerd.registry`` is the library for programs
that only want to find peers.
"""

from __future__ import annotations

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
    from peerd.peer import Peer

__version__ = "0.1.0"

__all__ = [
    "App",
    "AppLoadError",
    "BindError",
    "ControlError",
    "DecodeError",
    "InvalidRecordError",
    "Message",
    "NoAnswerError",
    "NotRunningError",
    "Peer",
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


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # Peer brings psutil and the rest of a running peer along, which an App has no use for.
        if name == "Peer":
            from peerd.peer import Peer

            return Peer
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
