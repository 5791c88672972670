"""The commands of the control socket: their arguments, and which part carries them out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from peerd.errors import ControlError
from peerd.supervisor.control_server import Command
from peerd.supervisor.journal import History
from peerd.supervisor.loop import Loop, Promise
from peerd.supervisor.output import RecentLines
from peerd.supervisor.peer_table import PeerView
from peerd.supervisor.reloads import Reloads
from peerd.supervisor.scaler import Scaler
from peerd.supervisor.status import StatusReport
from peerd.supervisor.supervised_peer import SupervisedPeer

Arguments = Mapping[str, object]
Result = dict[str, object]
Since = Callable[[Arguments], list[dict[str, object]]]


@dataclass(frozen=True, kw_only=True)
class ControlCommands:
    loop: Loop
    peers: PeerView
    status: StatusReport
    reloads: Reloads
    scaler: Scaler
    history: History
    recent_lines: RecentLines
    is_stopping: Callable[[], bool]
    stop: Callable[[], object]  # Begin to stop, as SIGTERM does
    stop_timeout_s: float
    # A pid is not enough: in a container, all supervisors have the same one.
    name: str = field(default_factory=lambda: f"{os.getpid()}-{time.monotonic_ns()}")

    def table(self) -> Mapping[str, Command]:
        return {
            "status": lambda _: self.status.build(self._state),
            "reload": self._reload,
            "restart": self._restart,
            "scale": self._scale,
            "stop": self._stop,
            "events": lambda arguments: self._as_requested(arguments, self.history.since),
            "logs": self._logs,
        }

    def _reload(self, _arguments: Arguments) -> Promise[Result]:
        self._refuse_while_stopping()
        return self.reloads.reload()

    def _restart(self, arguments: Arguments) -> Promise[Result]:
        self._refuse_while_stopping()
        answer = Promise[Result](self.loop)
        self._peer_at(arguments.get("slot")).replace().then(
            lambda replaced: answer.resolve({"replaced": [asdict(replaced)]}), answer.reject
        )
        return answer

    def _scale(self, arguments: Arguments) -> Promise[Result]:
        self._refuse_while_stopping()
        peers = arguments.get("peers")
        if type(peers) is not int:
            raise ControlError(f"cannot scale to {peers!r} peers: give a number")
        return self.scaler.scale_to(peers)

    def _stop(self, _arguments: Arguments) -> Result:
        self.stop()
        return {"pid": os.getpid(), "stop_timeout_s": self.stop_timeout_s}

    def _logs(self, arguments: Arguments) -> object:
        """Of ``slot``, which may be gone, as long as there are lines; None: of all."""
        slot = arguments.get("slot")
        if slot is not None and not self.recent_lines.has(slot):
            self._peer_at(slot)
        return self._as_requested(arguments, self.recent_lines.since)

    def _as_requested(self, arguments: Arguments, since: Since) -> object:
        """The entries; for a client that names the supervisor whose entries it has seen, with our name.

        The numbers of another supervisor mean nothing here: then all entries are new.
        """
        if "supervisor" not in arguments:
            return since(arguments)
        is_known = arguments["supervisor"] == self.name
        entries = since(arguments if is_known else {**arguments, "after": 0})
        return {"supervisor": self.name, "entries": entries}

    def _peer_at(self, slot: object) -> SupervisedPeer:
        peers = self.peers
        peer = peers.get(slot) if type(slot) is int else None
        if peer is None:
            raise ControlError(f"no slot {slot!r}: there are 0 to {len(peers) - 1}")
        return peer

    def _refuse_while_stopping(self) -> None:
        if self.is_stopping():
            raise ControlError("the supervisor is stopping")

    @property
    def _state(self) -> str:
        if self.is_stopping():
            return "stopping"
        return "ready" if self.status.all_healthy else "degraded"
