"""What ``peerd status --json`` shows: the scoreboard, the kernel's counters and psutil's numbers."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence

import psutil

from peerd._scoreboard import PeerState, RegistryState, Scoreboard, Slot
from peerd.settings import SupervisorSettings
from peerd.supervisor.sockets import queue_state

REGISTRAR_STALE_S = 5.0
"""Longer than a round in which etcd answers nothing."""


class StatusReport:
    """Keeps one psutil.Process a worker, since cpu_percent is a rate between two calls."""

    def __init__(
        self,
        settings: SupervisorSettings,
        sockets: Sequence[socket.socket],
        board: Scoreboard,
        version: str,
    ) -> None:
        self._settings = settings
        self._sockets = sockets
        self._board = board
        self._version = version
        self._started_ns = time.monotonic_ns()
        self._processes: dict[int, psutil.Process] = {}

    def all_get_on(self) -> bool:
        """Whether every peer is ready and its loop has turned lately."""
        return not self.laggards()

    def laggards(self) -> list[str]:
        """Each peer that does not get on, with its state or for how long its loop has not turned."""
        found = []
        for slot in self._board.slots:
            age_s = _seconds_since(slot.heartbeat_ns)
            if slot.state is not PeerState.READY:
                found.append(f"{self._settings.peer_id(slot.index)} ({slot.state.name.lower()})")
            elif age_s >= self._settings.liveness_timeout_s:
                found.append(
                    f"{self._settings.peer_id(slot.index)} (has not turned for {age_s:.0f} s)"
                )
        return found

    def build(self, state: str) -> dict[str, object]:
        """The document of the design's ``peerd status --json``."""
        self._follow_workers()
        return {
            "supervisor": {
                "pid": os.getpid(),
                "state": state,
                "uptime_s": _seconds_since(self._started_ns),
                "version": self._version,
            },
            "registry": {
                "state": self.registry_state().name.lower(),
                "endpoint": self._settings.registry.endpoint,
            },
            "peers": [self._peer(slot) for slot in self._board.slots],
        }

    def registry_state(self) -> RegistryState:
        """What the registrar says, unless it has not got on for a while."""
        if _seconds_since(self._board.registrar_heartbeat_ns) > REGISTRAR_STALE_S:
            return RegistryState.SUSPENDED
        return self._board.registry_state

    def _peer(self, slot: Slot) -> dict[str, object]:
        counters = slot.counters()
        rss_bytes, cpu_percent = self._usage(slot.pid)
        return {
            "slot": slot.index,
            "peer_id": self._settings.peer_id(slot.index),
            "url": self._settings.url,
            "port": self._settings.base_port + slot.index,
            "pid": slot.pid or None,
            "state": slot.state.name.lower(),
            "restarts": slot.restarts,
            "lost_in_flight": slot.lost_in_flight,
            "uptime_s": _seconds_since(slot.since_ns) if slot.state is PeerState.READY else 0.0,
            "heartbeat_age_s": _seconds_since(slot.heartbeat_ns) if slot.heartbeat_ns else None,
            "registered": slot.registered,
            "conflict": slot.holder or None,
            "rx_messages": counters["rx_messages"],
            "rx_bytes": counters["rx_bytes"],
            "rx_dropped": queue_state(self._sockets[slot.index]).dropped,
            "decode_errors": _sum(counters, "decode_"),
            "handler_errors": counters["handler_errors"],
            "tx_messages": counters["tx_messages"],
            "tx_dropped": _sum(counters, "tx_dropped_"),
            "rss_bytes": rss_bytes,
            "cpu_percent": cpu_percent,
            "counters": counters,
            "histograms": slot.histograms(),
        }

    def _usage(self, pid: int) -> tuple[int, float]:
        process = self._processes.get(pid)
        if process is not None:
            with contextlib.suppress(psutil.Error):
                return process.memory_info().rss, process.cpu_percent()
        return 0, 0.0

    def _follow_workers(self) -> None:
        pids = {slot.pid for slot in self._board.slots if slot.pid}
        for pid in self._processes.keys() - pids:
            del self._processes[pid]
        for pid in pids - self._processes.keys():
            with contextlib.suppress(psutil.Error):
                self._processes[pid] = psutil.Process(pid)


def _sum(counters: dict[str, int], prefix: str) -> int:
    return sum(value for name, value in counters.items() if name.startswith(prefix))


def _seconds_since(then_ns: int) -> float:
    return round((time.monotonic_ns() - then_ns) / 1e9, 3)
