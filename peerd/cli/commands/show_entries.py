"""``peerd events`` and ``peerd logs``: entries of a supervisor; with ``-f``, also those that follow.

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
from peerd.cli.options import control_option, json_option, slot_argument
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

COLUMNS_AND_HIDDEN = ("number", "age_s", "event", "peer_id", "what", "last_lines")
"""Fields that have a place of their own in the line, or none."""


@click.command()
@control_option
@follow_option
@json_option
def events(path: Path | None, follow: bool, as_json: bool) -> None:
    """Show the last 1,000 events of a supervisor: deaths, replacements, scaling and others.

    A death says how the worker died, how long it had been ready, and how many datagrams it had read but not
    answered; 'peerd logs' has its last lines. With --json, prints one object per line; "time" is this
    machine's clock now minus the age of the event.

    \b
    Exit codes:
      0    done
      3    no supervisor runs
    """
    _show(_answers(path, "events", {}, follow=follow), _event_text, as_json=as_json)


def _event_text(event: Entry) -> str:
    who = event.get("peer_id") or event.get("what") or ""
    details = "  ".join(
        f"{name}={_as_word(value)}"
        for name, value in event.items()
        if name not in COLUMNS_AND_HIDDEN and value is not False
    )
    return f"{time_text(_when(event))}  {event['event']:12}  {who}  {details}".rstrip()


def _as_word(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text else text


@click.command()
@slot_argument(required=False)
@control_option
@follow_option
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Number of lines to begin with.",
)
@json_option
def logs(slot: int | None, path: Path | None, follow: bool, lines: int, as_json: bool) -> None:
    """Show the last lines that workers printed or logged, those of dead workers included.

    SLOT limits this to one peer. The supervisor keeps 200 lines per peer. With --json, prints one object per
    line; "time" is this machine's clock now minus the age of the line.

    \b
    Exit codes:
      0    done
      3    no supervisor runs
    """
    found = _answers(path, "logs", {"slot": slot}, follow=follow)
    _show(_from_last(found, lines), _log_text, as_json=as_json)


def _from_last(found: Iterator[list[Entry]], count: int) -> Iterator[list[Entry]]:
    first = next(found)
    yield first[-count:] if count else []
    yield from found


def _log_text(line: Entry) -> str:
    return (
        f"{time_text(_when(line))} {line['level'].upper():<8} peer={line['peer_id']} port={line['port']} "
        f"pid={line['pid']} gen={line['generation']}: {line['message']}"
    )


def _show(found: Iterator[list[Entry]], as_text: Callable[[Entry], str], *, as_json: bool) -> None:
    for entries in found:
        for entry in entries:
            click.echo(_as_json(entry) if as_json else as_text(entry))


def _answers(
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
