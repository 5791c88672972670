"""``peerd events``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from peerd.cli.follow import answers, follow_option, show, time_of
from peerd.cli.options import control_option, json_option

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
    show(answers(path, "events", {}, follow=follow), _as_text, as_json=as_json)


def _as_text(event: dict[str, Any]) -> str:
    who = event.get("peer_id") or event.get("what") or ""
    details = "  ".join(
        f"{name}={_as_word(value)}"
        for name, value in event.items()
        if name not in COLUMNS_AND_HIDDEN and value is not False
    )
    return f"{time_of(event)}  {event['event']:12}  {who}  {details}".rstrip()


def _as_word(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text else text
