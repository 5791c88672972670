"""``peerd logs``"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from peerd.cli.follow import answers, follow_option, show, time_of
from peerd.cli.options import control_option, json_option, slot_argument


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
    found = answers(path, "logs", {"slot": slot}, follow=follow)
    show(_from_last(found, lines), _as_text, as_json=as_json)


def _from_last(found: Iterator[list[dict[str, Any]]], count: int) -> Iterator[list[dict[str, Any]]]:
    first = next(found)
    yield first[-count:] if count else []
    yield from found


def _as_text(line: dict[str, Any]) -> str:
    return (
        f"{time_of(line)} {line['level'].upper():<8} peer={line['peer_id']} port={line['port']} "
        f"pid={line['pid']} gen={line['generation']}: {line['message']}"
    )
