"""What all peers of a supervisor share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peerd.settings import SupervisorSettings
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Loop
from peerd.supervisor.output import RecentLines
from peerd.supervisor.worker_process import WorkerEntry


@dataclass(frozen=True, kw_only=True)
class PeerEnvironment:
    settings: SupervisorSettings
    loop: Loop
    journal: Journal
    worker_entry: WorkerEntry
    recent_lines: RecentLines
    claim_oom_kill: Callable[[], bool]
    """Whether a process that just ended by SIGKILL may have been killed by the OOM killer."""

    has_been_ready: Callable[[], bool]
    """Whether any peer ever was. If none was, a failed start means a wrong configuration."""
