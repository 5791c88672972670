"""The log of a run: the actions that took effect, and the news from the supervisor."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from peerd_chaos.schedule import Kind
from peerd_chaos.subject import Subject


@dataclass
class Record:
    done: list[Kind] = field(default_factory=list)  # Actions that took effect
    killed: set[int] = field(default_factory=set)  # Workers that were sent SIGKILL
    may_have_exited: set[int | None] = field(default_factory=set)
    """Workers that may have exited in order before a kill reached them: those that were replaced or
    scaled away, and those whose successor was killed while it took over."""

    deaths: list[dict[str, Any]] = field(default_factory=list)
    last_event: int = 0
    missed_events: int = 0
    failed_commands: list[str] = field(default_factory=list)
    """Commands that were not answered, or with an error that must not occur."""

    unready_since_s: dict[int, float] = field(default_factory=dict)  # Slots that are not ready now
    longest_unready_s: float = 0.0

    def update(self, subject: Subject) -> list[int]:
        """Take in the news from the supervisor, and return the slots that it has parked."""
        for event in subject.events(self.last_event):
            self.missed_events += event["number"] - self.last_event - 1
            self.last_event = event["number"]
            if event["event"] == "died" and "peer_id" in event:
                self.deaths.append(event)
            elif event["event"] == "replaced" and "old_pid" in event:
                self.may_have_exited.add(event["old_pid"])
        peers, now_s = subject.peers(), time.monotonic()
        self.unready_since_s = {
            peer["slot"]: self.unready_since_s.get(peer["slot"], now_s)
            for peer in peers
            if peer["state"] != "ready"
        }
        longest_s = now_s - min(self.unready_since_s.values(), default=now_s)
        self.longest_unready_s = max(self.longest_unready_s, longest_s)
        return [peer["slot"] for peer in peers if peer["state"] == "crashloop"]
