"""Sockets, entry points of the children and other resources opened before the supervisor starts; and what
its peers share."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peerd.settings import EmbeddedEtcdSettings, SupervisorSettings
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Loop
from peerd.supervisor.notify import Notifier
from peerd.supervisor.output import RecentLines
from peerd.supervisor.services import RegistrarEntry
from peerd.supervisor.worker_process import WorkerEntry


@dataclass(frozen=True, kw_only=True)
class ChildEntryPoints:
    worker: WorkerEntry
    registrar: RegistrarEntry


@dataclass(frozen=True, kw_only=True)
class Resources:
    sockets: Sequence[socket.socket]  # Bound, one per peer. The supervisor owns them from here on.
    control_path: Path
    metrics_socket: socket.socket | None
    etcd: EmbeddedEtcdSettings | None  # None: the supervisor starts no etcd
    notifier: Notifier
    version: str

    log_dropped: Callable[[], int]
    """Number of records of the supervisor's log that were dropped because no process read them."""


@dataclass(frozen=True, kw_only=True)
class PeerEnvironment:
    """What all peers of a supervisor share."""

    settings: SupervisorSettings
    loop: Loop
    journal: Journal
    worker_entry: WorkerEntry
    recent_lines: RecentLines
    claim_oom_kill: Callable[[], bool]
    """Whether a process that just ended by SIGKILL may have been killed by the OOM killer."""

    has_been_ready: Callable[[], bool]
    """Whether any peer ever was. If none was, a failed start means a wrong configuration."""
