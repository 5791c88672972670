"""What tests ask a running supervisor over its control socket."""

from __future__ import annotations

import threading
from typing import Any

from peerd.errors import ControlError
from peerd.supervisor import control
from supervised import Running


def ask(running: Running, command: str, timeout_s: float = 30, **arguments: object) -> Any:
    """The result. Raises ControlError."""
    return control.request(running.control, command, arguments, timeout_s=timeout_s)


def scale(running: Running, peers: object) -> Any:
    return ask(running, "scale", peers=peers)


def events(running: Running, *kinds: str) -> list[dict[str, Any]]:
    """Those of these kinds, or all, oldest first."""
    return [each for each in ask(running, "events") if not kinds or each["event"] in kinds]


def logged(running: Running, slot: int) -> list[str]:
    """The messages about one peer, oldest first."""
    try:
        return [each["message"] for each in ask(running, "logs", slot=slot)]
    except ControlError:  # none so far
        return []


def pids(running: Running) -> list[int]:
    return [peer["pid"] for peer in running.status()["peers"]]


class Asked:
    """A command that is under way while the test goes on."""

    def __init__(self, running: Running, command: str, **arguments: object) -> None:
        self._answer: Any = None
        self._error: ControlError | None = None

        def request() -> None:
            try:
                self._answer = ask(running, command, timeout_s=60, **arguments)
            except ControlError as error:
                self._error = error

        self._thread = threading.Thread(target=request)
        self._thread.start()

    @property
    def is_under_way(self) -> bool:
        return self._thread.is_alive()

    def answer(self, timeout_s: float = 30) -> Any:
        """The result. Raises ControlError, as the supervisor has said it."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"no answer within {timeout_s:g} s"
        if self._error is not None:
            raise self._error
        return self._answer
