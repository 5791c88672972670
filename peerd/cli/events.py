"""``peerd events``"""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import orjson

from peerd.cli.options import control_option, json_option
from peerd.supervisor import control

POLL_S = 0.5


@click.command()
@control_option
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@json_option
def events(path: Path | None, follow: bool, as_json: bool) -> None:
    """Show what has happened to the processes of a supervisor: the last thousand events.

    A death says how, for how long the worker had been ready, and how many datagrams it had read and not
    answered; peerd logs has its last lines. With --json, one object a line; "time" is this machine's clock
    now minus the event's age.
    """
    where = path or control.find_running()
    last = 0
    while True:
        for event in control.request(where, "events", {"after": last}):
            last = event["number"]
            click.echo(_as_json(event) if as_json else _as_text(event))
        if not follow:
            return
        time.sleep(POLL_S)


def _time(event: dict[str, Any]) -> datetime:
    return datetime.now() - timedelta(seconds=event["age_s"])


def _as_json(event: dict[str, Any]) -> bytes:
    return orjson.dumps({"time": _time(event).isoformat(timespec="milliseconds"), **event})


def _as_text(event: dict[str, Any]) -> str:
    who = event.get("peer_id") or event.get("what") or ""
    details = "  ".join(
        f"{name}={value}"
        for name, value in event.items()
        if name not in ("number", "age_s", "event", "peer_id", "what", "last_lines")
    )
    time_text = _time(event).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    return f"{time_text}  {event['event']:12}  {who}  {details}".rstrip()
