"""What ``peerd events`` and ``peerd logs`` share: entries of a supervisor and, with ``-f``, those to come.

A follower outlives the supervisor. The numbers of the entries begin anew with each, so an answer says
whose they are, and a request whose the last one was that has been seen.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import orjson

from peerd import control
from peerd.errors import PeerdError

POLL_S = 0.3

AWAY_S = 15.0
"""For how long a supervisor may be away that is restarted: its stop and the next one's start."""

Entry = dict[str, Any]

follow_option = click.option(
    "-f",
    "--follow",
    is_flag=True,
    help="Go on with what comes, also when the supervisor is restarted, until Ctrl-C.",
)


def show(answers: Iterator[list[Entry]], as_text: Callable[[Entry], str], *, as_json: bool) -> None:
    for entries in answers:
        for entry in entries:
            click.echo(_as_json(entry) if as_json else as_text(entry))


def answers(
    path: Path | None, command: str, arguments: Mapping[str, Any], *, follow: bool
) -> Iterator[list[Entry]]:
    """What there is, and with ``follow`` what comes, each time as much as is there.

    Raises NotRunningError or ControlError; once something was answered, not before AWAY_S without.
    """
    where = path or control.find_running()
    asked = {**arguments, "after": 0, "supervisor": None}
    answer = control.request(where, command, asked)
    while True:
        if asked["supervisor"] not in (None, answer["supervisor"]):
            click.echo(f"peerd {command}: the supervisor has been restarted", err=True)
            asked["after"] = 0
        asked["supervisor"], entries = answer["supervisor"], answer["entries"]
        if entries:
            asked["after"] = entries[-1]["number"]
        yield entries
        if not follow:
            return
        _pause()
        answer = _next_answer(where, command, asked)


def time_of(entry: Entry) -> str:
    return _when(entry).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _as_json(entry: Entry) -> bytes:
    return orjson.dumps({"time": _when(entry).isoformat(timespec="milliseconds"), **entry})


def _when(entry: Entry) -> datetime:
    return datetime.now() - timedelta(seconds=entry["age_s"])


def _next_answer(where: Path, command: str, asked: Mapping[str, Any]) -> Any:
    give_up_s = time.monotonic() + AWAY_S
    while True:
        try:
            return control.request(where, command, asked)
        except PeerdError:
            if time.monotonic() >= give_up_s:
                raise
        _pause()


def _pause() -> None:
    """Raises BrokenPipeError when nobody reads standard output any more: a quiet follower would never
    find out by writing."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are told unasked
    if poll.poll(POLL_S * 1000):
        raise BrokenPipeError
