"""Requests to a running supervisor over its control socket."""

from __future__ import annotations

import http.client
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from harness.eventually import eventually
from harness.supervised import Running
from peerd import control
from peerd.errors import ControlError
from peerd_chaos.accounts import LoadReport


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


def is_replaced(running: Running, slot: int, pid: int) -> bool:
    return running.peer(slot)["pid"] not in (pid, None)


def serving(running: Running, slot: int, but_not: Collection[int] = ()) -> int:
    """The pid of a slot's worker, once it has one that serves. One that is put off is started.

    ``but_not``: those that were killed; of one that was just now, the supervisor may not know yet.
    """

    def pid() -> int | None:
        peer = running.peer(slot)
        if peer["state"] in ("backoff", "crashloop"):
            ask(running, "restart", slot=slot)
        return peer["pid"] if peer["state"] == "ready" and peer["pid"] not in but_not else None

    return eventually(pid)


def death_of(running: Running, pid: int) -> dict[str, Any]:
    """Waits for the event of this death."""

    def find() -> dict[str, Any] | None:
        return next((each for each in events(running, "died") if each["pid"] == pid), None)

    return eventually(find)


def assert_nothing_is_lost(
    report: LoadReport, running: Running, *, but_not: Collection[int] = (), in_order: bool = True
) -> None:
    """Neither on the way to the client nor by a peer. ``but_not``: slots outside the load."""
    assert report.finished
    assert (report.dropped, report.foreign) == (0, 0)
    assert (report.missing, report.doubled) == (0, 0)
    assert not in_order or report.out_of_order == 0
    for peer in running.status()["peers"]:
        if peer["slot"] not in but_not:
            assert (peer["restarts"], peer["lost_in_flight"], peer["rx_dropped"]) == (0, 0, 0)


def http_get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """Status and text from the port of ``--metrics``."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()


class Asked:
    """A command that runs while the test continues."""

    def __init__(self, running: Running, command: str, **arguments: Any) -> None:
        self._executor = ThreadPoolExecutor()
        self._answer = self._executor.submit(ask, running, command, **arguments)

    @property
    def is_under_way(self) -> bool:
        return not self._answer.done()

    def answer(self) -> Any:
        """The result. Raises the supervisor's ControlError."""
        with self._executor:
            return self._answer.result(60)
