"""The end of a supervisor, in phases, each with an end of its own, all within ``stop_timeout_s``:

    WITHDRAW  the slots are STOPPING; the registrar revokes their records, the workers still serve
    DRAIN     the workers get SIGTERM, serve what their queues hold, and exit
    CLOSE     the registrar's lifeline is cut, then etcd is ended

Workers that are late are killed a second before that end, which leaves it to the registrar.

A second signal skips to SIGKILL for the workers and the end of the lifeline: the registrar revokes what is
left by itself, as it does when the supervisor is killed. A third kills whatever is left.

etcd is killed, never asked: its data are thrown away.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Mapping

from peerd.settings import SupervisorSettings
from peerd.supervisor.loop import Callback, Loop, Timer
from peerd.supervisor.services import EtcdService, RegistrarService
from peerd.supervisor.supervised_peer import Peer

log = logging.getLogger(__name__)

WITHDRAW_TIMEOUT_S = 2.0
"""For how long a stop waits for the registrar, and a peer that is scaled away serves on; longer than etcd's
answer, shorter than the stop."""

LAST_TIMEOUT_S = 1.0
"""What a stop at its end leaves the registrar to revoke the records."""

NOTICE_S = 1.0
"""How often it is said who is waited for."""

MOST_NAMES = 8
"""In one log line."""


class _Phase(enum.Enum):
    WITHDRAW = enum.auto()
    DRAIN = enum.auto()
    CLOSE = enum.auto()
    DONE = enum.auto()


class Stop:
    def __init__(
        self,
        loop: Loop,
        settings: SupervisorSettings,
        peers: Mapping[int, Peer],
        registrar: RegistrarService,
        etcd: EtcdService | None,
        on_done: Callback,
    ) -> None:
        """``peers`` is the supervisor's, which those that were being scaled away still leave."""
        self._loop = loop
        self._settings = settings
        self._peers = peers
        self._registrar = registrar
        self._etcd = etcd
        self._on_done = on_done
        self._phase = _Phase.WITHDRAW
        self._signals = 1
        self._begun_s = time.monotonic()
        limit_s = settings.stop_timeout_s
        self._timers: list[Timer] = [
            loop.call_later(WITHDRAW_TIMEOUT_S, self._drain),
            loop.call_later(max(limit_s - LAST_TIMEOUT_S, limit_s / 2), self._kill_workers),
            loop.call_later(limit_s, self._kill_rest),
            loop.call_later(NOTICE_S, self._notice),
        ]
        registrar.on_end = self.advance
        if etcd is not None:
            etcd.no_more()
            etcd.on_end = self.advance
        if not registrar.is_running:
            # One that died a moment ago: the records it left need a successor to revoke them.
            registrar.start()
        for peer in reversed(list(peers.values())):
            peer.stop()
        self.advance()

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
        self.advance()

    def advance(self) -> None:
        """Something has changed: a record is revoked, a child has ended."""
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
            self._on_done()

    def _drain(self) -> None:
        if self._phase is _Phase.WITHDRAW:
            self._phase = _Phase.DRAIN
            for peer in reversed(list(self._peers.values())):
                peer.drain()
            self.advance()

    def _close(self) -> None:
        if self._phase in (_Phase.CLOSE, _Phase.DONE):
            return
        self._phase = _Phase.CLOSE
        left = sum(peer.slot.lease_id != 0 for peer in self._peers.values())
        if left and not self._registrar.is_running:
            log.warning(
                "no registrar to revoke %d records: their leases run out within %d s",
                left,
                self._settings.registry.lease_ttl_s,
            )
        self._registrar.cut_lifeline()

    def _kill_workers(self) -> None:
        if self._phase in (_Phase.WITHDRAW, _Phase.DRAIN):
            for peer in self._peers.values():
                if not peer.has_ended:
                    log.warning("the worker of %s has not stopped in time: SIGKILL", peer.peer_id)
                    peer.kill()
            self._close()

    def _kill_rest(self) -> None:
        for name in self._names():
            log.warning("the %s has not stopped in time: SIGKILL", name)
        self._kill_all()

    def _kill_all(self) -> None:
        for peer in self._peers.values():
            peer.kill()
        self._close()
        self._registrar.kill()
        if self._etcd is not None:
            self._etcd.kill()

    def _notice(self) -> None:
        passed_s = time.monotonic() - self._begun_s
        names = self._names()
        more = len(names) - MOST_NAMES
        if more > 0:
            names[MOST_NAMES:] = [f"and {more} more"]
        if names:
            log.info("stopping for %.0f s; waiting for: %s", passed_s, ", ".join(names))
        self._later(NOTICE_S, self._notice)

    def _names(self) -> list[str]:
        names = [
            f"worker of {peer.peer_id} ({_what_it_does(peer)})"
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


def _what_it_does(peer: Peer) -> str:
    age_s = (time.monotonic_ns() - peer.slot.heartbeat_ns) / 1e9
    if peer.worker is not None and peer.worker.is_ready and age_s > NOTICE_S:
        return f"its loop has not turned for {age_s:.0f} s"
    return f"{peer.queued_bytes} bytes queued"
