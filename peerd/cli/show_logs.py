"""``peerd logs``"""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import orjson

from peerd.cli.options import control_option, json_option, slot_argument
from peerd.supervisor import control

POLL_S = 0.3


@click.command()
@slot_argument(required=False)
@control_option
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="How many of the last ones to begin with.",
)
@json_option
def logs(slot: int | None, path: Path | None, follow: bool, lines: int, as_json: bool) -> None:
    """Show the last lines about the peers, or one: what their workers print and log, dead ones included.

    The supervisor keeps 200 lines a peer. With --json, one object a line; "time" is this machine's clock
    now minus the line's age.
    """
    where = path or control.find_running()
    asked: dict[str, Any] = {"slot": slot, "after": 0}
    found = control.request(where, "logs", asked)
    shown = found[-lines:] if lines else []
    while True:
        for line in shown:
            click.echo(_as_json(line) if as_json else _as_text(line))
        if found:
            asked["after"] = found[-1]["number"]
        if not follow:
            return
        time.sleep(POLL_S)
        shown = found = control.request(where, "logs", asked)


def _time(line: dict[str, Any]) -> datetime:
    return datetime.now() - timedelta(seconds=line["age_s"])


def _as_json(line: dict[str, Any]) -> bytes:
    return orjson.dumps({"time": _time(line).isoformat(timespec="milliseconds"), **line})


def _as_text(line: dict[str, Any]) -> str:
    when = _time(line).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    return (
        f"{when} {line['level'].upper():<8} peer={line['peer_id']} port={line['port']} "
        f"pid={line['pid']} gen={line['generation']}: {line['message']}"
    )
