"""What a supervisor is given beside its settings: opened and found out before it begins."""

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
class Entries:
    """What runs in the children."""

    worker: WorkerEntry
    registrar: RegistrarEntry


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    sockets: Sequence[socket.socket]
    """Bound, one a peer. The supervisor's from here on."""

    control_path: Path
    metrics_socket: socket.socket | None
    etcd: EmbeddedEtcdSettings | None
    """None: it is somebody else's."""

    notifier: Notifier
    version: str

    log_dropped: Callable[[], int]
    """How many records of the supervisor's log nobody had room for."""
