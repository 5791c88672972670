"""The commands that control a supervisor: ``peerd reload``, ``restart``, ``scale``, ``stop`` and ``wait``."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import Any

import click
import orjson

from peerd import control
from peerd.cli.option_types import integer
from peerd.cli.options import control_option, json_option, seconds_option, slot_argument
from peerd.cli.text_output import counted, print_table
from peerd.errors import ControlError, NotRunningError, PeerdError
from peerd.settings import MAX_PEERS

POLL_S = 0.1
ANSWER_S = 1.0

timeout_option = seconds_option(
    "--timeout",
    "timeout_s",
    default=120.0,
    help="Seconds to wait for the result. The supervisor continues even if they are over.",
)


@click.command()
@control_option
@timeout_option
@json_option
def reload(path: Path | None, timeout_s: float, as_json: bool) -> None:
    """Replace every worker by one that has loaded the app again, one at a time, without losing datagrams.

    A successor loads the app beside the worker that serves. Then the worker answers what it has read and
    exits, and the successor takes over its socket. If a successor cannot start, the reload ends: its worker
    and the workers after it stay as they were, and its traceback is printed. SIGHUP does the same.

    \b
    Exit codes:
      0    every worker was replaced
      1    a successor cannot start, or the timeout is over
      3    no supervisor runs
    """
    _show_replaced(control.request(_socket(path), "reload", timeout_s=timeout_s), as_json)


@click.command()
@slot_argument()
@control_option
@timeout_option
@json_option
def restart(slot: int, path: Path | None, timeout_s: float, as_json: bool) -> None:
    """Replace the worker of one slot, as reload does. A peer that is parked in a crash loop is started.

    \b
    Exit codes:
      0    the worker was replaced
      1    its successor cannot start, or the timeout is over
      3    no supervisor runs
    """
    result = control.request(_socket(path), "restart", {"slot": slot}, timeout_s=timeout_s)
    _show_replaced(result, as_json)


@click.command()
@click.argument("peers", type=integer("number of peers", 1, MAX_PEERS))
@control_option
@timeout_option
@json_option
def scale(peers: int, path: Path | None, timeout_s: float, as_json: bool) -> None:
    """Run PEERS peers from now on.

    New peers take the ports after the last one. All their ports are bound before anything changes. Peers are
    removed from the highest port down: the record is revoked, the queue served, the port closed. SIGTTIN adds
    a peer and SIGTTOU removes one. The number lasts until the supervisor ends: a new one starts with --peers.

    \b
    Exit codes:
      0    done
      1    a port is taken (then nothing has changed), or the timeout is over
      3    no supervisor runs
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
    """Stop a supervisor gracefully, as SIGTERM does, and wait until it has exited.

    \b
    Exit codes:
      0    it has exited
      1    the timeout is over
      3    no supervisor runs
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
                f"the supervisor, pid {pid}, has not ended within {timeout_s:g} s; it continues to stop"
            )
    finally:
        os.close(pidfd)
    click.echo(f"supervisor pid {pid} has stopped")


@click.command()
@control_option
@seconds_option("--timeout", "timeout_s", default=30.0, help="Seconds to wait.")
def wait(path: Path | None, timeout_s: float) -> None:
    """Wait until a supervisor runs and all its peers are ready.

    If several supervisors run, --control says which one to wait for; without it, they are an error.

    \b
    Exit codes:
      0    all peers are ready
      1    some peers were not ready in time
      3    no supervisor was started in time
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
    """The reason; None if all peers are ready, which is printed."""
    try:
        report = control.request(where, "status", timeout_s=answer_s)
    except (NotRunningError, ControlError) as error:
        return error
    state, pid = report["supervisor"]["state"], report["supervisor"]["pid"]
    if state != "ready":
        return ControlError(f"supervisor pid {pid} is {state}: {report['supervisor']['summary']}")
    click.echo(f"{counted(len(report['peers']), 'peer')} of supervisor pid {pid} ready")
    return None


def _socket(path: Path | None) -> Path:
    return path or control.find_running()


def _show_replaced(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2))
        return
    rows, gaps_ms = [], []
    for each in result["replaced"]:
        gap_ms = None  # unknown if there was no worker before
        if each["old_pid"] is not None:
            gap_ms = round(float(each["gap_ms"]), 1)
            gaps_ms.append(gap_ms)
        rows.append((each["slot"], each["peer_id"], each["pid"], each["old_pid"], gap_ms))
    print_table(("#", "PEER", "PID", "BEFORE", "GAP MS"), rows)
    longest = f"{max(gaps_ms)} ms" if gaps_ms else "-"
    click.echo(f"{counted(len(rows), 'worker')} replaced, longest gap {longest}")
