"""``peerd status``"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import orjson

from peerd import control
from peerd.cli.options import control_option, did_you_mean, json_option

Show = Callable[[dict[str, Any]], None]


@click.command()
@control_option
@click.option(
    "--watch",
    is_flag=True,
    help="Repeat every second until Ctrl-C. On a terminal: full screen, with rates; q ends it.",
)
@click.option(
    "-o",
    "--fields",
    metavar="FIELD[,FIELD...]",
    help="For scripts: print these fields of the JSON, one line per peer, separated by tabs, '-' for null. "
    "Nested fields have dots: counters.rx_messages.",
)
@json_option
def status(path: Path | None, watch: bool, fields: str | None, as_json: bool) -> None:
    """Show the state of a running supervisor and its peers.

    \b
    Columns:
      STATE      starting, ready, stopping, backoff (restarts soon) or crashloop (parked); if a ready peer is
                 not healthy, the reason and for how long: late (event loop blocked), full (too many waiting
                 handlers), unread (socket not read), starved (waits for a CPU), stopped or stuck
      RST        restarts
      RX, TX     messages received and sent
      BEAT       time since the worker's loop completed an iteration
      QUEUE      bytes in the kernel's receive buffer
      DROP       datagrams dropped: receive buffer full, or no room for replies
      LOST       datagrams that a dead worker had read and not answered
      ERR        truncated and malformed datagrams, and handlers that raised
      REG        whether the peer's record is in etcd

    \b
    For scripts:
      peerd status -o slot,pid,state,last_exit.how

    \b
    Exit codes:
      0    all peers are ready and healthy (with --watch: always)
      1    some are not
      3    no supervisor runs
    """
    if fields is not None and as_json:
        raise click.UsageError("give either -o or --json")
    where = path or control.find_running()
    show = _shower(fields, as_json, indent=not watch)
    if watch:
        from peerd.cli.status_watch import watch_on_screen, watch_status

        # A terminal that can move its cursor.
        has_screen = os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")
        if fields is None and not as_json and has_screen and sys.stdout.isatty():
            watch_on_screen(where)
        else:
            watch_status(where, show)
        return
    report: dict[str, Any] = control.request(where, "status")
    show(report)
    if report["supervisor"]["state"] != "ready":
        sys.exit(1)


def _shower(fields: str | None, as_json: bool, *, indent: bool) -> Show:
    if fields is not None:
        names = [name.strip() for name in fields.split(",")]
        return lambda report: _show_fields(report, names)
    if as_json:
        option = orjson.OPT_INDENT_2 if indent else None
        return lambda report: click.echo(orjson.dumps(report, option=option))
    return _show_table


def _show_table(report: dict[str, Any]) -> None:
    from peerd.cli import status_view
    from peerd.cli.text_output import print_columns

    for line in status_view.head(report):
        click.echo(line)
    click.echo()
    print_columns(status_view.columns(report))
    for line in status_view.notes(report):
        click.echo(line)


def _show_fields(report: dict[str, Any], names: Sequence[str]) -> None:
    from peerd.supervisor.status import EXIT_FIELDS

    known = dict.fromkeys(name for peer in report["peers"] for name in _field_names(peer))
    known.update(dict.fromkeys(f"last_exit.{name}" for name in EXIT_FIELDS))
    for name in names:
        if name not in known:
            top = ", ".join(field for field in known if "." not in field)
            raise click.BadParameter(
                f"there is no field {name!r}{did_you_mean(name, known) or ':'} there are: {top}",
                param_hint="-o",
            )
    for peer in report["peers"]:
        click.echo("\t".join(_as_field(_find(peer, name)) for name in names))


def _field_names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _field_names(value, f"{prefix}{name}.")


def _find(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _as_field(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return " ".join(text.split())  # a tab or a newline would start another field or line
