"""``peerd reload``, ``peerd restart`` and ``peerd stop``: what a running supervisor is told to do."""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Any

import click
import orjson

from peerd.cli.options import SECONDS, control_option, json_option
from peerd.cli.table import print_table
from peerd.errors import ControlError
from peerd.supervisor import control

timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=SECONDS,
    default=120.0,
    show_default=True,
    help="Seconds to wait for the end. The supervisor goes on all the same.",
)


@click.command()
@control_option
@timeout_option
@json_option
def reload(path: Path | None, timeout_s: float, as_json: bool) -> None:
    """Replace every worker by one that has loaded the app anew, one at a time, losing nothing.

    A successor loads the app beside the worker that serves, which then finishes what it has read and
    leaves its socket to it. One that cannot start is the end: its worker and those after it stay as
    they were, its traceback is shown, and the exit code is 1. SIGHUP does the same.
    """
    _show(control.request(_socket(path), "reload", timeout_s=timeout_s), as_json)


@click.command()
@click.argument("slot", type=click.IntRange(min=0))
@control_option
@timeout_option
@json_option
def restart(slot: int, path: Path | None, timeout_s: float, as_json: bool) -> None:
    """Replace the worker of one slot as reload does; start it if it is parked in a crash loop."""
    _show(control.request(_socket(path), "restart", {"slot": slot}, timeout_s=timeout_s), as_json)


@click.command()
@control_option
@timeout_option
def stop(path: Path | None, timeout_s: float) -> None:
    """Stop a supervisor in order, as SIGTERM does, and wait until it has.

    Exit code 1 when it takes longer than the timeout, 3 when none runs.
    """
    where = _socket(path)
    pid = int(control.request(where, "stop")["pid"])
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([pidfd], [], [], timeout_s)[0]:
            raise ControlError(f"the supervisor, pid {pid}, has not ended within {timeout_s:g} s")
    finally:
        os.close(pidfd)
    click.echo(f"supervisor pid {pid} has stopped")


def _socket(path: Path | None) -> Path:
    return path or control.find_running()


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2))
        return
    print_table(
        ("#", "PEER", "PID", "BEFORE", "GAP MS"),
        [
            (row["slot"], row["peer_id"], row["pid"], row["old_pid"], row["gap_ms"])
            for row in result["replaced"]
        ],
    )
