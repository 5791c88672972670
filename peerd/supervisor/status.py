"""The document of ``peerd status --json``: from the scoreboard, the kernel's counters and psutil."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from peerd._scoreboard import PeerState, RegistryState, Scoreboard
from peerd.name_list import shortened
from peerd.settings import SupervisorSettings
from peerd.supervisor.death import Death
from peerd.supervisor.resources import Resources
from peerd.supervisor.supervised_peer import SupervisedPeer

if TYPE_CHECKING:
    import psutil

REGISTRAR_STALE_S = 5.0  # Longer than one of the registrar's rounds takes when etcd does not answer
EXIT_FIELDS = (*(name for name in Death._fields if name != "at_s"), "oom", "age_s", "summary")
"""Fields of ``last_exit``, which is null until a worker has died."""


class StatusReport:
    """Keeps one psutil.Process per worker because cpu_percent() is a rate between two calls."""

    def __init__(
        self,
        settings: SupervisorSettings,
        peers: Mapping[int, SupervisedPeer],
        board: Scoreboard,
        resources: Resources,
    ) -> None:
        self._settings = settings
        self._peers = peers
        self._board = board
        self._resources = resources
        self._started_ns = time.monotonic_ns()
        self._processes: dict[int, psutil.Process] = {}

    @property
    def all_healthy(self) -> bool:
        return all(peer.health.is_healthy for peer in self._peers.values())

    def summary(self) -> str:
        """One line: ``ready``, or the peers that are not ready or not healthy, each with the reason."""
        unhealthy = [
            f"{peer.peer_id} ({_summary(peer)})"
            for peer in self._peers.values()
            if not peer.health.is_healthy
        ]
        return f"not ready: {shortened(unhealthy)}" if unhealthy else "ready"

    def line(self) -> str:
        """Such as ``7/8 ready, 1 crashloop``."""
        states = Counter(peer.slot.state.name.lower() for peer in self._peers.values())
        ready = states.pop("ready", 0)
        others = [f"{count} {state}" for state, count in sorted(states.items())]
        return ", ".join([f"{ready}/{len(self._peers)} ready", *others])

    def build(self, state: str) -> dict[str, object]:
        """``state``: the supervisor's."""
        self._follow_workers()
        return {
            "supervisor": {
                "pid": os.getpid(),
                "state": state,
                "summary": self.summary(),
                "uptime_s": _seconds_since(self._started_ns),
                "version": self._resources.version,
                "configured_peers": self._settings.peers,
                "log_dropped": self._resources.log_dropped(),
            },
            "registry": {
                "state": self.registry_state().name.lower(),
                "endpoint": self._settings.registry.endpoint,
            },
            "peers": [self._peer(peer) for peer in self._peers.values()],
        }

    def registry_state(self) -> RegistryState:
        """The state that the registrar has reported, unless it has not reported for a while."""
        if _seconds_since(self._board.registrar_heartbeat_ns) > REGISTRAR_STALE_S:
            return RegistryState.SUSPENDED
        return self._board.registry_state

    def _peer(self, peer: SupervisedPeer) -> dict[str, object]:
        slot, found, now_s = peer.slot, peer.health.diagnosis, time.monotonic()
        counters = slot.counters()
        rss_bytes, cpu_percent = self._usage(slot.pid)
        queue, dropped = peer.drops.read()
        next_s = peer.restarts.next_start_s
        counters["rx_kernel_drops"] = dropped
        return {
            "slot": slot.index,
            "peer_id": peer.peer_id,
            "url": self._settings.advertised_host,
            "port": peer.port,
            "pid": slot.pid or None,
            "generation": slot.generation,
            "state": slot.state.name.lower(),
            "health": found.health.value if found else None,
            "health_for_s": round(found.for_s, 3) if found else None,
            "summary": _summary(peer),
            "restarts": slot.restarts,
            "next_start_in_s": None if next_s is None else round(max(0.0, next_s - now_s), 3),
            "last_exit": _last_exit(peer, now_s),
            "last_reload_gap_ms": peer.last_gap_ms,
            "lost_in_flight": slot.lost_in_flight,
            "lost_unread": slot.lost_unread,
            "uptime_s": _seconds_since(slot.since_ns) if slot.state is PeerState.READY else 0.0,
            "heartbeat_age_s": _seconds_since(slot.heartbeat_ns) if slot.heartbeat_ns else None,
            "registered": slot.registered,
            "conflict": slot.holder or None,
            "rx_messages": counters["rx_messages"],
            "rx_bytes": counters["rx_bytes"],
            "rx_dropped": dropped,
            "rx_queued_bytes": queue.queued_bytes,
            "decode_errors": _sum(counters, "decode_"),
            "handler_errors": counters["handler_errors"],
            "handlers_waiting": slot.waiting_by_magic,
            "tx_messages": counters["tx_messages"],
            "tx_dropped": _sum(counters, "tx_dropped_") + counters["tx_loop"],
            "log_dropped": slot.log_dropped,
            "rss_bytes": rss_bytes,
            "cpu_percent": cpu_percent,
            "counters": counters,
            "histograms": slot.histograms(),
        }

    def _usage(self, pid: int) -> tuple[int, float]:
        import psutil

        process = self._processes.get(pid)
        if process is not None:
            with contextlib.suppress(psutil.Error):
                return process.memory_info().rss, process.cpu_percent()
        return 0, 0.0

    def _follow_workers(self) -> None:
        import psutil

        pids = {peer.slot.pid for peer in self._peers.values() if peer.slot.pid}
        for pid in self._processes.keys() - pids:
            del self._processes[pid]
        for pid in pids - self._processes.keys():
            with contextlib.suppress(psutil.Error):
                self._processes[pid] = psutil.Process(pid)


def _summary(peer: SupervisedPeer) -> str:
    """One phrase: ``ready``, another state, or why a ready peer is not healthy."""
    found = peer.health.diagnosis
    if peer.slot.state is PeerState.READY and found is not None and not found.is_healthy:
        waiting = shortened([f"{magic} {n}" for magic, n in peer.slot.waiting_by_magic.items()])
        return f"{found.sentence} (waiting: {waiting})" if waiting else found.sentence
    return peer.slot.state.name.lower()


def _last_exit(peer: SupervisedPeer, now_s: float) -> dict[str, object] | None:
    death = peer.last_death
    if death is None:
        return None
    more = {"oom": death.cause == "oom", "age_s": round(now_s - death.at_s, 3)}
    known = {**death._asdict(), **more, "summary": death.summary}
    return {name: known[name] for name in EXIT_FIELDS}


def _sum(counters: dict[str, int], prefix: str) -> int:
    return sum(value for name, value in counters.items() if name.startswith(prefix))


def _seconds_since(then_ns: int) -> float:
    return round((time.monotonic_ns() - then_ns) / 1e9, 3)
