"""Requests to a running supervisor over its control socket."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

from harness.eventually import eventually
from harness.supervised import Running
from peerd import control
from peerd.errors import ControlError


def ask(running: Running, command: str, timeout_s: float = 60, **arguments: object) -> Any:
    """The result. Raises ControlError."""
    return control.request(running.control, command, arguments, timeout_s=timeout_s)


def scale(running: Running, peers: object) -> Any:
    return ask(running, "scale", peers=peers)


def events(running: Running, *kinds: str) -> list[dict[str, Any]]:
    """The events of these kinds, or all events, oldest first."""
    return [each for each in ask(running, "events") if not kinds or each["event"] in kinds]


def logged(running: Running, slot: int) -> list[str]:
    """The messages about one peer, oldest first."""
    try:
        return [each["message"] for each in ask(running, "logs", slot=slot)]
    except ControlError:  # no messages yet
        return []


def pids(running: Running) -> list[int]:
    return [peer["pid"] for peer in running.status()["peers"]]


def serving(running: Running, slot: int, but_not: Collection[int] = ()) -> int:
    """The pid of a slot's worker, once it has one that serves. One that is put off is started.

    ``but_not``: those that were killed; of one that was just now, the supervisor may not know yet.
    """

    def pid() -> int | None:
        peer = running.peer(slot)
        if peer["state"] in ("backoff", "crashloop"):
            ask(running, "restart", slot=slot)
        return peer["pid"] if peer["state"] == "ready" and peer["pid"] not in but_not else None

    found = eventually(pid)
    assert found is not None
    return found


def death_of(running: Running, pid: int) -> dict[str, Any]:
    """Waits for the event of this death."""

    def find() -> dict[str, Any] | None:
        return next((each for each in events(running, "died") if each["pid"] == pid), None)

    found = eventually(find)
    assert found is not None
    return found


class Asked:
    """A command that runs while the test continues."""

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

    def answer(self, timeout_s: float = 60) -> Any:
        """The result. Raises the supervisor's ControlError."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"no answer within {timeout_s:g} s"
        if self._error is not None:
            raise self._error
        return self._answer
