"""``peerd reload``, ``restart``, ``scale`` and ``stop``: what a supervisor is told to do; and ``wait``."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import Any

import click
import orjson

from peerd import control
from peerd.cli.option_types import SECONDS, integer
from peerd.cli.options import control_option, json_option, slot_argument
from peerd.cli.text_output import counted, print_table
from peerd.errors import ControlError, NotRunningError, PeerdError
from peerd.settings import MAX_PEERS

POLL_S = 0.1
ANSWER_S = 1.0

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
    _show_replaced(control.request(_socket(path), "reload", timeout_s=timeout_s), as_json)


@click.command()
@slot_argument()
@control_option
@timeout_option
@json_option
def restart(slot: int, path: Path | None, timeout_s: float, as_json: bool) -> None:
    """Replace the worker of one slot as reload does; start it if it is parked in a crash loop."""
    result = control.request(_socket(path), "restart", {"slot": slot}, timeout_s=timeout_s)
    _show_replaced(result, as_json)


@click.command()
@click.argument("peers", type=integer("number of peers", 1, MAX_PEERS))
@control_option
@timeout_option
@json_option
def scale(peers: int, path: Path | None, timeout_s: float, as_json: bool) -> None:
    """Run PEERS peers from now on.

    New ones take the ports after the last; all are bound before anything changes. Those with the highest
    ports go first: record revoked, queue served, port closed. SIGTTIN and SIGTTOU are one more and one
    less. It lasts until the supervisor ends: its options say how many it starts with.
    """
    result = control.request(_socket(path), "scale", {"peers": peers}, timeout_s=timeout_s)
    if as_json:
        click.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2))
        return
    for peer in result["started"]:
        click.echo(f"started {peer['peer_id']}, pid {peer['pid']}")
    for peer in result["stopped"]:
        click.echo(f"stopped {peer['peer_id']} in {peer['took_ms']:.0f} ms")
    before, now = result["before"], result["peers"]
    click.echo(f"{counted(now, 'peer')}, {'as' if before == now else before} before")


@click.command()
@control_option
@timeout_option
def stop(path: Path | None, timeout_s: float) -> None:
    """Stop a supervisor in order, as SIGTERM does, and wait until it has.

    Exit code 1 when it takes longer than the timeout, 3 when none runs.
    """
    deadline_s = time.monotonic() + timeout_s
    pid = int(control.request(_socket(path), "stop", timeout_s=timeout_s)["pid"])
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([pidfd], [], [], max(deadline_s - time.monotonic(), 0))[0]:
            raise ControlError(
                f"the supervisor, pid {pid}, has not ended within {timeout_s:g} s; it goes on stopping"
            )
    finally:
        os.close(pidfd)
    click.echo(f"supervisor pid {pid} has stopped")


@click.command()
@control_option
@click.option(
    "--timeout",
    "timeout_s",
    type=SECONDS,
    default=30.0,
    show_default=True,
    help="Seconds to wait.",
)
def wait(path: Path | None, timeout_s: float) -> None:
    """Wait until a supervisor runs and all its peers are ready.

    Exit code 0 then, 1 when some are not ready in time, 3 when no supervisor has appeared. Where several
    run, --control says which; without it that is an error at once.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        left_s = deadline_s - time.monotonic()
        try:
            where = _socket(path)
            error: PeerdError | None = _not_ready(where, min(max(left_s, POLL_S), ANSWER_S))
        except NotRunningError as absence:
            error = absence
        if error is None:
            return
        if left_s <= 0:
            raise error
        time.sleep(min(POLL_S, left_s))


def _not_ready(where: Path, answer_s: float) -> PeerdError | None:
    """Why not; None, and that is printed, when all peers are."""
    try:
        report = control.request(where, "status", timeout_s=answer_s)
    except (NotRunningError, ControlError) as error:
        return error
    state, pid = report["supervisor"]["state"], report["supervisor"]["pid"]
    if state == "ready":
        click.echo(f"{counted(len(report['peers']), 'peer')} of supervisor pid {pid} ready")
        return None
    return ControlError(f"supervisor pid {pid} is {state}: {report['supervisor']['summary']}")


def _socket(path: Path | None) -> Path:
    return path or control.find_running()


def _show_replaced(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2))
        return
    replaced = result["replaced"]
    gaps_ms = [_gap_ms(row) for row in replaced]
    print_table(
        ("#", "PEER", "PID", "BEFORE", "GAP MS"),
        [
            (row["slot"], row["peer_id"], row["pid"], row["old_pid"], gap_ms)
            for row, gap_ms in zip(replaced, gaps_ms, strict=True)
        ],
    )
    known_ms = [gap_ms for gap_ms in gaps_ms if gap_ms is not None]
    longest = f"{max(known_ms)} ms" if known_ms else "-"
    click.echo(f"{counted(len(replaced), 'worker')} replaced, longest gap {longest}")


def _gap_ms(row: dict[str, Any]) -> float | None:
    """None where there was no worker before: nobody knows for how long nobody has read."""
    return None if row["old_pid"] is None else round(float(row["gap_ms"]), 1)
