"""Sockets and other resources opened before the supervisor starts, and the entry points of its children."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peerd.settings import EmbeddedEtcdSettings
from peerd.supervisor.notify import Notifier
from peerd.supervisor.services import RegistrarEntry
from peerd.supervisor.worker_process import WorkerEntry


@dataclass(frozen=True, kw_only=True)
class ChildEntryPoints:
    worker: WorkerEntry
    registrar: RegistrarEntry


@dataclass(frozen=True, kw_only=True)
class Resources:
    sockets: Sequence[socket.socket]
    """Bound, one per peer. The supervisor owns them from here on."""

    control_path: Path
    metrics_socket: socket.socket | None
    etcd: EmbeddedEtcdSettings | None
    """None: the supervisor starts no etcd."""

    notifier: Notifier
    version: str

    log_dropped: Callable[[], int]
    """Number of records of the supervisor's log that were dropped because no process read them."""
