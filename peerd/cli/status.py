"""``peerd status``"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import orjson

from peerd.cli.options import control_option, json_option
from peerd.cli.table import print_table
from peerd.supervisor import control

STUCK_S = 1.0
"""A loop that turns writes its heartbeat every quarter of a second."""


@click.command()
@control_option
@json_option
def status(path: Path | None, as_json: bool) -> None:
    """Show what a running supervisor and its peers do.

    Exit code 0 when all peers are ready and get on, 1 when some are not, 3 when no supervisor runs.
    """
    report: dict[str, Any] = control.request(path or control.find_running(), "status")
    if as_json:
        click.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    else:
        _print(report)
    if report["supervisor"]["state"] != "ready":
        sys.exit(1)


def _print(report: dict[str, Any]) -> None:
    supervisor, registry = report["supervisor"], report["registry"]
    click.echo(
        f"supervisor pid {supervisor['pid']}, {supervisor['state']}, "
        f"up {_duration(supervisor['uptime_s'])}, peerd {supervisor['version']}"
    )
    click.echo(f"registry {registry['state']}, etcd at {registry['endpoint']}\n")
    print_table(
        (
            "#",
            "PEER",
            "STATE",
            "UP",
            "RST",
            "REG",
            "RX",
            "TX",
            "DROP",
            "LOST",
            "ERR",
            "PID",
            "MiB",
            "CPU%",
        ),
        [
            (
                peer["slot"],
                peer["peer_id"],
                _state(peer),
                _duration(peer["uptime_s"]),
                peer["restarts"],
                "yes" if peer["registered"] else "no",
                peer["rx_messages"],
                peer["tx_messages"],
                peer["rx_dropped"] + peer["tx_dropped"],
                peer["lost_in_flight"],
                peer["decode_errors"] + peer["handler_errors"],
                peer["pid"],
                round(peer["rss_bytes"] / 2**20, 1),
                peer["cpu_percent"],
            )
            for peer in report["peers"]
        ],
    )
    for peer in report["peers"]:
        if peer["conflict"]:
            click.echo(f"slot {peer['slot']}: {peer['conflict']}")


def _state(peer: dict[str, Any]) -> str:
    age_s = peer["heartbeat_age_s"]
    if peer["state"] == "ready" and age_s is not None and age_s > STUCK_S:
        return f"stuck {age_s:.0f}s"
    return str(peer["state"])


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
