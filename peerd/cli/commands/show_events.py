"""``peerd events``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from peerd.cli.follow import answers, follow_option, show, time_of
from peerd.cli.options import control_option, json_option

OWN_PLACE = ("number", "age_s", "event", "peer_id", "what", "last_lines")
"""What of an event is shown elsewhere in its line, or nowhere."""


@click.command()
@control_option
@follow_option
@json_option
def events(path: Path | None, follow: bool, as_json: bool) -> None:
    """Show what has happened to the processes of a supervisor: the last thousand events.

    A death says how, for how long the worker had been ready, and how many datagrams it had read and not
    answered; peerd logs has its last lines. With --json, one object a line; "time" is this machine's clock
    now minus the event's age.
    """
    show(answers(path, "events", {}, follow=follow), _as_text, as_json=as_json)


def _as_text(event: dict[str, Any]) -> str:
    who = event.get("peer_id") or event.get("what") or ""
    details = "  ".join(
        f"{name}={_as_word(value)}"
        for name, value in event.items()
        if name not in OWN_PLACE and value is not False
    )
    return f"{time_of(event)}  {event['event']:12}  {who}  {details}".rstrip()


def _as_word(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text else text
