"""Entries of a supervisor, for ``peerd events`` and ``peerd logs``; with ``-f``, also those that follow.

A follower continues when the supervisor is restarted. Each supervisor numbers its entries from 1, so an
answer names its supervisor, and a request names the last entry seen and the supervisor that it is from.
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
from peerd.cli.text_output import time_text
from peerd.errors import PeerdError

POLL_S = 0.3

AWAY_S = 15.0
"""How long a follower waits for a restarted supervisor: the stop of one and the start of the next."""

Entry = dict[str, Any]

follow_option = click.option(
    "-f",
    "--follow",
    is_flag=True,
    help="Print new entries until Ctrl-C, also those of a supervisor that replaces this one.",
)


def show(answers: Iterator[list[Entry]], as_text: Callable[[Entry], str], *, as_json: bool) -> None:
    for entries in answers:
        for entry in entries:
            click.echo(_as_json(entry) if as_json else as_text(entry))


def answers(
    path: Path | None, command: str, arguments: Mapping[str, Any], *, follow: bool
) -> Iterator[list[Entry]]:
    """The entries of a supervisor, and with ``follow`` those that come, in batches.

    Raises NotRunningError or ControlError; after the first answer, only if there is none for AWAY_S.
    """
    where = path or control.find_running()
    asked = {**arguments, "after": 0, "supervisor": None}
    answer = control.request(where, command, asked)
    while True:
        if asked["supervisor"] not in (None, answer["supervisor"]):
            click.echo(f"peerd {command}: the supervisor was restarted", err=True)
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
    return time_text(_when(entry))


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
    """Raises BrokenPipeError when the reader of standard output has gone. A follower without new entries does
    not write, and would never notice."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # poll() always reports errors
    if poll.poll(POLL_S * 1000):
        raise BrokenPipeError
