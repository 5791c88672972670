"""The end of a supervisor, in phases with a time limit each, all within ``stop_timeout_s``:

    WITHDRAW  the slots are STOPPING; the registrar revokes their records, the workers still serve
    DRAIN     the workers get SIGTERM, serve what their queues hold, and exit
    CLOSE     the registrar's lifeline is cut, then etcd is ended

Late workers are killed one second before the limit, which leaves that second to the registrar.

A second signal kills the workers and cuts the lifeline: the registrar then revokes by itself what is left,
as it does when the supervisor is killed. A third signal kills all processes that are left.

etcd gets SIGKILL, because its data are discarded anyway.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Mapping

from peerd.name_list import shortened
from peerd.settings import SupervisorSettings
from peerd.supervisor.events import PeerEnded, RecordsChanged, ServiceEnded
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Callback, Loop, Timer
from peerd.supervisor.services import EtcdService, RegistrarService
from peerd.supervisor.socket_queue import queue_state
from peerd.supervisor.supervised_peer import SupervisedPeer

log = logging.getLogger(__name__)

WITHDRAW_TIMEOUT_S = 2.0
"""How long a stop waits for the registrar, and a peer that is scaled away serves on: longer than an answer
of etcd takes, shorter than a stop."""

LAST_TIMEOUT_S = 1.0  # The end of a stop, which is left to the registrar to revoke records
NOTICE_INTERVAL_S = 1.0  # Interval between log lines that name what the stop waits for


class _Phase(enum.Enum):
    WITHDRAW = enum.auto()
    DRAIN = enum.auto()
    CLOSE = enum.auto()
    DONE = enum.auto()


class Stop:
    def __init__(
        self,
        loop: Loop,
        journal: Journal,
        settings: SupervisorSettings,
        peers: Mapping[int, SupervisedPeer],
        registrar: RegistrarService,
        etcd: EtcdService | None,
    ) -> None:
        """``peers`` may shrink: the scaler still removes those that were being scaled away."""
        self._loop = loop
        self._settings = settings
        self._peers = peers
        self._registrar = registrar
        self._etcd = etcd
        self._phase = _Phase.WITHDRAW
        self._signals = 1
        self._begun_s = time.monotonic()
        limit_s = settings.stop_timeout_s
        self._timers: list[Timer] = [
            loop.call_later(WITHDRAW_TIMEOUT_S, self._drain),
            loop.call_later(max(limit_s - LAST_TIMEOUT_S, limit_s / 2), self._kill_workers),
            loop.call_later(limit_s, self._kill_rest),
            loop.call_later(NOTICE_INTERVAL_S, self._log_progress),
        ]
        for kind in (PeerEnded, RecordsChanged, ServiceEnded):
            journal.subscribe(kind, lambda _: self._advance())
        if etcd is not None:
            etcd.disable_restart()
        if not registrar.is_running:
            # It died a moment ago. The records that it left need a successor to revoke them.
            registrar.start()
        for peer in reversed(list(peers.values())):
            peer.stop()
        self._advance()

    @property
    def is_done(self) -> bool:
        return self._phase is _Phase.DONE

    def another_signal(self) -> None:
        self._signals += 1
        if self._signals == 2:
            log.warning("second signal: stopping at once; a third one kills whatever is left")
            for peer in self._peers.values():
                peer.kill()
            self._close()
            self._later(LAST_TIMEOUT_S, self._kill_rest)
        else:
            log.warning("signal %d: SIGKILL for all that is left", self._signals)
            self._kill_all()
        self._advance()

    def _advance(self) -> None:
        """Go on to the next phases, as far as nothing is left to wait for."""
        if self._phase is _Phase.WITHDRAW and not any(
            peer.slot.lease_id for peer in self._peers.values()
        ):
            self._drain()
        if self._phase is _Phase.DRAIN and all(peer.has_ended for peer in self._peers.values()):
            self._close()
        if self._phase is not _Phase.CLOSE or self._registrar.is_running:
            return
        if self._etcd is not None and self._etcd.is_running:
            self._etcd.kill()
        elif all(peer.has_ended for peer in self._peers.values()):
            self._phase = _Phase.DONE
            log.info("stopped, in %.1f s", time.monotonic() - self._begun_s)
            for timer in self._timers:
                timer.cancel()

    def _drain(self) -> None:
        if self._phase is _Phase.WITHDRAW:
            self._phase = _Phase.DRAIN
            for peer in reversed(list(self._peers.values())):
                peer.drain()
            self._advance()

    def _close(self) -> None:
        if self._phase in (_Phase.CLOSE, _Phase.DONE):
            return
        self._phase = _Phase.CLOSE
        left = sum(peer.slot.lease_id != 0 for peer in self._peers.values())
        if left and not self._registrar.is_running:
            text = "no registrar to revoke %d records: their leases run out within %d s"
            log.warning(text, left, self._settings.registry.lease_ttl_s)
        self._registrar.cut_lifeline()

    def _kill_workers(self) -> None:
        if self._phase in (_Phase.WITHDRAW, _Phase.DRAIN):
            for peer in self._peers.values():
                if not peer.has_ended:
                    log.warning("the worker of %s has not stopped in time: SIGKILL", peer.peer_id)
                    peer.kill()
            self._close()

    def _kill_rest(self) -> None:
        for name in self._unfinished():
            log.warning("the %s has not stopped in time: SIGKILL", name)
        self._kill_all()

    def _kill_all(self) -> None:
        for peer in self._peers.values():
            peer.kill()
        self._close()
        self._registrar.kill()
        if self._etcd is not None:
            self._etcd.kill()

    def _log_progress(self) -> None:
        passed_s = time.monotonic() - self._begun_s
        names = self._unfinished()
        if names:
            log.info("stopping for %.0f s; waiting for: %s", passed_s, shortened(names))
        self._later(NOTICE_INTERVAL_S, self._log_progress)

    def _unfinished(self) -> list[str]:
        names = [
            f"worker of {peer.peer_id} ({_progress_of(peer)})"
            for peer in self._peers.values()
            if not peer.has_ended
        ]
        if self._registrar.is_running:
            names.append(self._registrar.name)
        if self._etcd is not None and self._etcd.is_running:
            names.append(self._etcd.name)
        return names

    def _later(self, delay_s: float, callback: Callback) -> None:
        self._timers.append(self._loop.call_later(delay_s, callback))


def _progress_of(peer: SupervisedPeer) -> str:
    age_s = (time.monotonic_ns() - peer.slot.heartbeat_ns) / 1e9
    if peer.worker is not None and peer.worker.is_ready and age_s > NOTICE_INTERVAL_S:
        return f"its loop is blocked for {age_s:.0f} s"
    return f"{queue_state(peer.sock).queued_bytes} bytes queued"
