"""``peerd chaos``: peerd.cli imports this module when the command is used."""

from __future__ import annotations

import dataclasses
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from peerd.cli.option_types import SECONDS
from peerd.cli.options import json_option
from peerd.cli.text_output import print_table
from peerd.settings import MAX_PEERS
from peerd_chaos.schedule import ChaosSettings, Kind

if TYPE_CHECKING:
    from peerd_chaos.drive import ChaosReport

KINDS = ", ".join(Kind)


def _kinds(_ctx: click.Context, _param: click.Parameter, text: str | None) -> frozenset[Kind]:
    names = {name.strip() for name in (text or KINDS).split(",")}
    if unknown := names - set(Kind):
        listed = ", ".join(sorted(unknown))
        raise click.BadParameter(f"unknown actions: {listed}; known actions: {KINDS}")
    return frozenset(Kind(name) for name in names)


@click.command()
@click.option(
    "--seconds",
    type=SECONDS,
    default=ChaosSettings.seconds,
    show_default=True,
    help="Duration of the faults.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Repeat the run of this seed.  [default: random]"
)
@click.option(
    "--peers",
    type=click.IntRange(1, MAX_PEERS),
    default=ChaosSettings.peers,
    show_default=True,
    help="Peers at the beginning.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=1),
    default=ChaosSettings.rate,
    show_default=True,
    help="Datagrams per second to all peers.",
)
@click.option(
    "--actions",
    "kinds",
    callback=_kinds,
    metavar="KIND[,KIND...]",
    help=f"Only these faults, of {KINDS}.",
)
@click.option("--coroutines", is_flag=True, help="Use coroutines as handlers.")
@click.option("--keep", is_flag=True, help="Keep the supervisor's log in any case.")
@click.option(
    "--log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the log in this directory.  [default: a new one, if the log is kept]",
)
@json_option
def chaos(
    seed: int | None, keep: bool, log_dir: Path | None, as_json: bool, **settings_of_run: Any
) -> None:
    """Inject faults into a supervisor under load and verify its guarantees.

    The command starts a supervisor and an etcd. Workers and the registrar are killed, stopped and
    replaced, peers are added and removed, etcd stops and dies, at random times that the seed decides.
    Afterwards every peer must be ready again, every loss must be reported, and nothing may be left over.
    Otherwise the supervisor's log is kept.

    \b
    Exit codes:
      0    every guarantee holds
      1    a guarantee does not hold
    """
    from peerd_chaos.drive import run  # not imported at the top, so that --help is fast

    seed = random.randrange(1 << 32) if seed is None else seed
    settings = ChaosSettings(seed=seed, **settings_of_run)
    click.echo(f"repeat with: {_command_line(settings)}", err=True)
    if log_dir is None:
        folder = Path(tempfile.mkdtemp(prefix="peerd-chaos-"))
    else:
        folder = log_dir / f"seed-{settings.seed}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise click.BadParameter(
                f"cannot make {folder}: {error.strerror}", param_hint="--log-dir"
            ) from None
    broken = True
    try:
        report = run(
            settings, folder, lambda at_s, text: click.echo(f"{at_s:7.2f}  {text}", err=True)
        )
        broken = bool(report.broken)
    finally:
        if broken or keep or log_dir is not None:
            click.echo(f"the supervisor's log is {folder / 'err'}", err=True)
        else:
            shutil.rmtree(folder)
    _show(report, as_json)
    if broken:
        for row in report.broken:
            click.echo(f"peerd chaos: seed {report.seed}: {row.name}: {row.counted}", err=True)
        sys.exit(1)


def _show(report: ChaosReport, as_json: bool) -> None:
    if as_json:
        document = {"holds": not report.broken, **dataclasses.asdict(report)}
        click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2))
        return
    print_table(
        ("INVARIANT", "HOLDS", "COUNTED"),
        [(row.name, "yes" if row.holds else "NO", row.counted) for row in report.invariants],
    )


def _command_line(settings: ChaosSettings) -> str:
    """The command that repeats this run."""
    seconds, rate = (repr(each).removesuffix(".0") for each in (settings.seconds, settings.rate))
    words = [f"peerd chaos --seed {settings.seed} --seconds {seconds}"]
    words.append(f"--peers {settings.peers} --rate {rate}")
    if settings.coroutines:
        words.append("--coroutines")
    if settings.kinds != frozenset(Kind):
        words.append(f"--actions {','.join(kind for kind in Kind if kind in settings.kinds)}")
    return " ".join(words)
