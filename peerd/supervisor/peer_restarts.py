"""When the next worker of a peer starts after one failed, and what that is called."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from peerd.settings import OnCrashloop
from peerd.supervisor.death import WorkerExit
from peerd.supervisor.events import CannotFork, CannotStart, PeerParked
from peerd.supervisor.lifecycle import LifecycleEvent
from peerd.supervisor.resources import PeerEnvironment
from peerd.supervisor.restart import RestartPolicy, RestartSchedule

if TYPE_CHECKING:
    from peerd.supervisor.supervised_peer import SupervisedPeer


class PeerRestarts(RestartSchedule):
    def __init__(self, peer: SupervisedPeer, environment: PeerEnvironment) -> None:
        super().__init__(environment.loop, RestartPolicy(), peer.start)
        self._peer = peer
        self._environment = environment

    def on_death(self, exit_: WorkerExit) -> None:
        event, plan = self._plan(exit_.worker.ready_for_s or 0.0)
        self._peer.certify(exit_, plan)
        self._peer.transition(event)

    def on_start_failed(self, why: str) -> None:
        """A worker reported why it cannot start."""
        peer = self._peer
        is_retried = not peer.is_provisional and self._environment.has_been_ready()
        peer.publish(
            CannotStart, why=why, is_provisional=peer.is_provisional, is_retried=is_retried
        )
        if is_retried:
            event, plan = self._plan(0.0)
            peer.log.log(logging.ERROR, "cannot start: %s; %s", why, plan)
            peer.transition(event)

    def on_fork_failed(self, error: OSError) -> None:
        """The machine is the cause, so it does not count as a failure, and never parks the peer."""
        peer = self._peer
        self._environment.journal.publish(CannotFork(peer_id=peer.peer_id, why=str(error)))
        if peer.is_stopping:
            peer.log.log(logging.ERROR, "cannot fork a worker: %s", error)
            return
        delay_s = self.after_failed_fork()
        peer.transition(LifecycleEvent.FAIL)
        peer.log.log(logging.ERROR, "cannot fork a worker: %s; next try in %.2g s", error, delay_s)

    def on_replacement_failed(self) -> None:
        """A worker is due where the replacement was to provide it."""
        peer = self._peer
        if peer.worker is None and not self.is_waiting and not peer.is_stopping:
            event, plan = self._plan(0.0)
            peer.log.log(logging.ERROR, "no worker: %s", plan)
            peer.transition(event)

    def arm_slowly(self) -> None:
        """Arm, and publish that the peer is parked."""
        self.arm()
        peer = self._peer
        death = peer.last_death
        peer.publish(
            PeerParked,
            retry_in_s=self.policy.parked_delay_s,
            why=death.what_happened if death else f"peer {peer.peer_id} cannot be started",
            is_provisional=peer.is_provisional,
        )

    def _plan(self, ready_for_s: float) -> tuple[LifecycleEvent, str]:
        """What happens to the peer now, and the same in words."""
        was_parked = self.was_parked
        restart = self.after_failure(ready_for_s)
        self._peer.slot.restarts += 1
        if not restart.crashloop:
            when = f"in {restart.delay_s:.2g} s" if restart.delay_s else "at once"
            return LifecycleEvent.FAIL, f"restarted {when}"
        policy = self.policy
        why = (
            f"parked again because it was not ready for {policy.reset_after_ready_s:g} s"
            if was_parked
            else f"parked because it failed {policy.max_failures + 1} times within {policy.window_s:g} s"
        )
        if self._environment.settings.on_crashloop is OnCrashloop.EXIT:
            return LifecycleEvent.PARK, f"{why}; the supervisor stops (--on-crashloop)"
        by_hand = f"by 'peerd restart {self._peer.slot.index}'"
        return LifecycleEvent.PARK, f"{why}; tried again in {restart.delay_s:g} s, or {by_hand}"
